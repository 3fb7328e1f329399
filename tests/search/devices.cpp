// DMA; device_control.cpp has how devices come and go.
#include "tests/search/devices.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>

namespace dirtyring::search {

struct Devices::Running {
    Device *device;
};

Devices::Devices(World &world, Oracle &oracle, Vmm &vmm, Service &service)
    : world_(world), oracle_(oracle), vmm_(vmm), service_(service)
{
    vmm_.held_pins = [this] {
        std::vector<Vmm::HeldPin> all;
        for (const auto &d : devices_) {
            for (const InFlight &p : d->pins) {
                if (d->stage == Stage::attached)
                    all.push_back({p.iova, p.iova + Oracle::slot_size, p.time, p.write});
            }
        }
        return all;
    };
}

// Runs the device's own code, in which it may die.
template <class Work> void Devices::as(Device &d, Work work)
{
    Running r{&d};
    Running *before = std::exchange(running_, &r);
    d.busy = true;
    try {
        work();
    } catch (const DeviceDeath &) {
        world_.say([&] { return fmt::format("device {} dies between D and the summary", d.id); });
        world_.met(Event::device_dies_marking);
        stop(d);
    }
    d.busy = false;
    running_ = before;
}

void Devices::enter(Device &d)
{
    d.entered = ++world_.time;
    d.stamp = oracle_.new_stamp();
    d.engine->enter();
    d.inside = true;
}

void Devices::leave(Device &d)
{
    ring(d.engine->leave());
    d.inside = false;
    for (const Dma &w : std::exchange(d.written, {}))
        oracle_.complete(d.number, w.page, w.stamp);
}

void Devices::stop(Device &d)
{
    d.stage = Stage::dead;
    d.inside = false;
    d.written.clear();
    // What has landed counts, although the device never said so.
    for (const InFlight &p : d.pins) {
        if (p.landed && p.write)
            oracle_.complete(d.number, p.landed->page, p.landed->stamp);
    }
    d.pins.clear();
    d.shards.clear();
}

void Devices::ring(std::uint64_t bells)
{
    for (unsigned i = 0; i < world_.attributes.shards; ++i) {
        if ((bells >> i & 1) != 0 && world_.hwpt)
            world_.hwpt->rings[i]->rung = true;
    }
}

std::uint64_t Devices::any_page(const Plan::Area &area)
{
    const std::uint64_t kind = world_.choices.next(8);
    return kind < 7 ? Plan::hot_page(area, world_.choices.next(Plan::hot_pages))
                    : world_.choices.next(area.length / page_size);
}

// Where others are, or were just now.
std::uint64_t Devices::busy_page(const Plan::Area *&area)
{
    Choices &choices = world_.choices;
    if (choices.one_in(2)) {
        for (const auto &d : devices_) {
            for (const InFlight &p : d->pins) {
                if (const Plan::Area *there = world_.plan.area_of(p.iova); there != nullptr && choices.one_in(2)) {
                    area = there;
                    return (p.iova - there->iova) / page_size;
                }
            }
        }
    }
    if (last_area_ != nullptr)
        area = last_area_;
    return last_page_;
}

void Devices::others_go_on(bool write)
{
    for (std::size_t i = 0; i < devices_.size(); ++i) { // others may come and go within
        Device &d = *devices_[i];
        if (d.stage != Stage::attached || d.busy || d.inside || !world_.hwpt)
            continue;
        if (write && last_area_ != nullptr) {
            enter(d);
            as(d, [&] { this->write(d, *last_area_, last_page_); });
            if (d.inside)
                leave(d);
        }
        for (std::size_t n = 2 * d.pins.size(); !write && n > 0 && !d.pins.empty(); --n)
            as(d, [&] { go_on(d); });
    }
}

void Devices::act()
{
    if (devices_.empty())
        return;
    Choices &choices = world_.choices;
    Device &d = *devices_[choices.next(devices_.size())];
    if (d.stage != Stage::attached || d.busy || !world_.hwpt)
        return;
    const auto &areas = world_.plan.areas();
    const Plan::Area *area =
        world_.attributes.gib && choices.next(2) != 0 ? areas.data() : &areas[choices.next(areas.size())];
    const std::uint64_t page = choices.one_in(4) ? busy_page(area) : any_page(*area);
    const std::uint64_t kind = choices.next(32);
    if (kind == 31 && choices.one_in(4)) {
        world_.say([&] { return fmt::format("device {} dies", d.id); });
        world_.met(Event::device_dies);
        return stop(d);
    }
    if (kind >= 20 && kind < 30 && !d.inside && world_.attributes.pins > 0) {
        if (d.pins.size() < 4 && choices.next(2) != 0)
            as(d, [&] { pin(d, *area, page); });
        else if (!d.pins.empty())
            as(d, [&] { go_on(d); });
        return;
    }
    if (!d.inside)
        enter(d);
    if (kind < 20) {
        as(d, [&] {
            if (kind < 16)
                write(d, *area, page);
            else
                read(d, *area, page);
        });
    }
    if (d.inside && choices.next(4) != 3)
        leave(d);
}

void Devices::judge_fault(const Device &d, const iommu::DmaFault &fault, std::uint64_t iova, bool write)
{
    using iommu::FaultReason;
    if (fault.reason == FaultReason::stalled) {
        if (world_.attributes.how != iommu::Break::stall)
            world_.wrong("fault", "a device stalls where no entry is ever missing");
        return world_.met(Event::device_stalls, iova);
    }
    world_.met(Event::device_faults, iova);
    if (vmm_.is_mapped_since(iova, write, d.entered))
        world_.wrong("fault", fmt::format("device {} has fault {} at {:#x}, which is mapped", d.id,
                                          static_cast<unsigned>(fault.reason), iova));
}

void Devices::write(Device &d, const Plan::Area &area, std::uint64_t page)
{
    const std::uint64_t offset = page * page_size + Oracle::slot_at(d.number);
    const std::uint64_t iova = area.iova + offset;
    last_area_ = &area;
    last_page_ = page;
    for (const std::uint64_t oa : area.oas)
        world_.touch(oa + offset);
    std::uint64_t data[Oracle::slot_size / 8];
    std::fill(std::begin(data), std::end(data), d.stamp);
    world_.say([&] { return fmt::format("device {} writes {:#x}", d.id, iova); });
    world_.met(Event::device_writes, iova);
    const std::uint32_t hwpt = world_.hwpt->id;
    const iommu::DmaFault fault = d.engine->write(iova, data, sizeof data);
    if (!world_.hwpt || world_.hwpt->id != hwpt)
        return world_.wrong("destroyed", "an hwpt went away with a device inside");
    if (fault.reason != iommu::FaultReason::none)
        return judge_fault(d, fault, iova, true);
    bool found = false;
    for (const std::uint64_t oa : area.oas) {
        if (test::peek_word(world_.source.data() + oa + offset) != d.stamp)
            continue;
        d.written.push_back({(oa + offset) / page_size, d.stamp});
        found = found || vmm_.may_reach(iova, oa + offset, true, d.entered);
    }
    if (!found)
        world_.wrong("still translated",
                     fmt::format("device {} writes through {:#x}, which is not mapped so", d.id, iova));
}

void Devices::read(Device &d, const Plan::Area &area, std::uint64_t page)
{
    const std::uint64_t iova = area.iova + page * page_size;
    std::uint64_t data = 0;
    world_.say([&] { return fmt::format("device {} reads {:#x}", d.id, iova); });
    world_.met(Event::device_reads, iova);
    const iommu::DmaFault fault = d.engine->read(iova, &data, sizeof data);
    if (fault.reason != iommu::FaultReason::none)
        return judge_fault(d, fault, iova, false);
    if (std::none_of(area.oas.begin(), area.oas.end(),
                     [&](std::uint64_t oa) { return vmm_.may_reach(iova, oa + page * page_size, false, d.entered); }))
        world_.wrong("still translated", fmt::format("device {} reads {:#x}, which is not mapped", d.id, iova));
}

void Devices::pin(Device &d, const Plan::Area &area, std::uint64_t page)
{
    const std::uint64_t iova = area.iova + page * page_size + Oracle::slot_at(d.number);
    const bool write = world_.choices.next(4) != 3;
    last_area_ = &area;
    last_page_ = page;
    InFlight p{0, write, iova, 0, {}, std::nullopt};
    iommu::DmaFault fault;
    d.entered = ++world_.time;
    world_.say([&] { return fmt::format("device {} pins {:#x} for {}", d.id, iova, write ? "writing" : "reading"); });
    d.engine->enter();
    d.inside = true;
    const int error =
        d.engine->pin(iova, Oracle::slot_size, write, p.slot, fault, [&](std::byte *host, std::uint64_t n) {
            p.memory = {host, n};
        });
    d.inside = false;
    ring(d.engine->leave());
    if (error == -EAGAIN)
        return;
    if (error != 0) {
        if (fault.reason == iommu::FaultReason::closed)
            return world_.met(Event::pin_closed, iova);
        return judge_fault(d, fault, iova, write);
    }
    world_.met(Event::pin_taken, iova);
    const auto oa = static_cast<std::uint64_t>(p.memory.data() - world_.source.data());
    if (!vmm_.may_reach(iova, oa, write, d.entered))
        world_.wrong("still translated", fmt::format("device {} pins {:#x}, which is not mapped so", d.id, iova));
    p.time = ++world_.time;
    d.pins.push_back(p);
}

// The data of the oldest arrives, or it is given back.
void Devices::go_on(Device &d)
{
    InFlight &p = d.pins.front();
    if (!p.landed) {
        const auto oa = static_cast<std::uint64_t>(p.memory.data() - world_.source.data());
        p.landed = Dma{oa / page_size, oracle_.new_stamp()};
        world_.say([&] { return fmt::format("what device {} has pinned at {:#x} lands", d.id, p.iova); });
        world_.met(Event::pin_landed, p.iova);
        if (!p.write)
            return;
        world_.touch(oa);
        for (std::size_t at = 0; at < p.memory.size(); at += 8)
            std::memcpy(p.memory.data() + at, &p.landed->stamp, 8);
        return;
    }
    if ((world_.hwpt->view.breaking(p.iova) & 1) != 0)
        return; // it waits
    world_.say([&] { return fmt::format("device {} unpins {:#x}", d.id, p.iova); });
    world_.met(Event::pin_given_back, p.iova);
    d.entered = ++world_.time;
    d.engine->enter();
    d.inside = true;
    const InFlight pin = p;
    const iommu::DmaFault fault = d.engine->unpin(pin.slot);
    d.pins.pop_front();
    d.inside = false;
    ring(d.engine->leave());
    if (fault.reason == iommu::FaultReason::none && pin.write)
        oracle_.complete(d.number, pin.landed->page, pin.landed->stamp);
    else if (fault.reason != iommu::FaultReason::none && fault.reason != iommu::FaultReason::stalled)
        world_.wrong("fault", fmt::format("device {} has fault {} when it unpins {:#x}", d.id,
                                          static_cast<unsigned>(fault.reason), pin.iova));
}

bool Devices::come_to_rest()
{
    bool rest = true;
    for (const auto &d : devices_) {
        if (d->inside && !d->busy && d->stage == Stage::attached)
            leave(*d);
        while (!d->pins.empty() && d->stage == Stage::attached &&
               (world_.hwpt->view.breaking(d->pins.front().iova) & 1) == 0)
            as(*d, [&] { go_on(*d); });
        rest = rest && d->stage == Stage::attached && d->pins.empty();
    }
    return rest;
}

void Devices::write_everywhere()
{
    for (const auto &d : devices_) {
        if (d->stage != Stage::attached)
            continue;
        for (const Plan::Area &area : world_.plan.areas()) {
            for (std::uint64_t i = 0; i < Plan::hot_pages; ++i) {
                enter(*d);
                as(*d, [&] { write(*d, area, Plan::hot_page(area, i)); });
                leave(*d);
            }
        }
        return;
    }
}

} // namespace dirtyring::search
