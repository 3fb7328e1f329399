// How devices come and go: as service/control/devices.cpp, one step of it each time.
#include "tests/search/devices.hpp"

#include <fmt/format.h>

#include <algorithm>

namespace dirtyring::search {

bool Devices::owed() const
{
    return std::any_of(devices_.begin(), devices_.end(),
                       [](const auto &d) { return d->stage == Stage::dead || d->stage == Stage::burying; });
}

bool Devices::attaching() const
{
    return std::any_of(devices_.begin(), devices_.end(), [](const auto &d) { return d->stage == Stage::attaching; });
}

void Devices::attach()
{
    if (!world_.hwpt || world_.hwpt->destroying || !service_.alive())
        return;
    const auto coming =
        std::find_if(devices_.begin(), devices_.end(), [](const auto &d) { return d->stage == Stage::attaching; });
    if (coming != devices_.end())
        return tell_shard(**coming);
    const auto alive =
        std::count_if(devices_.begin(), devices_.end(), [](const auto &d) { return d->stage == Stage::attached; });
    if (static_cast<unsigned>(alive) >= world_.attributes.devices)
        return;
    auto d = std::make_unique<Device>();
    while (std::any_of(devices_.begin(), devices_.end(), [&](const auto &o) { return o->number == d->number; }))
        ++d->number;
    if (d->number >= 7)
        return;
    d->id = world_.next_id;
    auto memory = std::make_unique<DeviceMemory>(d->id, world_.attributes.pins);
    memory->capable = !world_.attributes.optional || world_.choices.next(3) != 2;
    if (!memory->capable) {
        bool admitted = false;
        if (!service_.on(0, [&] { admitted = service_.life().commands->admit(world_.hwpt->id, d->id); }))
            return;
        if (!admitted)
            return world_.met(Event::attach_refused);
    }
    ++world_.next_id;
    world_.say(
        [&] { return fmt::format("device {} attaches{}", d->id, memory->capable ? "" : ", which cannot set D"); });
    world_.met(Event::attach_begins);
    d->engine = std::make_unique<iommu::AnyDmaThread>(world_.hwpt->view, world_.guest, memory->threads(), 0);
    d->engine->set_stall_patience(0);
    world_.devices.emplace(d->id, std::move(memory));
    devices_.push_back(std::move(d));
}

// The next step of what the control plane does for it.
void Devices::tell_shard(Device &d)
{
    unsigned shard = 0;
    while (d.shards.contains(shard))
        ++shard;
    if (shard == world_.attributes.shards) {
        if (d.stage == Stage::attaching) {
            world_.say([&] { return fmt::format("device {} is attached", d.id); });
            world_.met(Event::attach_done);
            d.stage = Stage::attached;
        } else if (d.stage == Stage::leaving && service_.is_free(0)) {
            world_.met(Event::detach_done);
            release(d);
        }
        return;
    }
    const iommu::DmaThreads threads = memory(d).threads();
    Device *device = &d;
    const bool told = service_.on(Life::owner(shard), [&] {
        Life &life = service_.life();
        service::Shard &s = *life.shards[shard];
        switch (device->stage) {
        case Stage::attaching:
            s.add(threads);
            return world_.met(Event::attach_shard);
        case Stage::leaving:
            s.remove(threads);
            return world_.met(Event::detach_shard);
        default:
            s.bury(threads, [&life, id = device->id] { life.reported.push_back(id); });
            return world_.met(Event::bury_shard);
        }
    });
    if (told && service_.alive()) {
        d.shards.insert(shard);
        world_.say([&] { return fmt::format("shard {} is told of device {}", shard, d.id); });
    }
}

void Devices::see_off()
{
    if (!world_.hwpt || !service_.alive())
        return;
    for (const auto &d : devices_) {
        if (d->stage == Stage::dead && !d->busy) {
            d->stage = Stage::burying;
            d->unreported = world_.attributes.shards;
            return tell_shard(*d);
        }
        if (d->stage == Stage::unanswered && service_.life().home_begun) {
            world_.say([&] { return fmt::format("device {} attaches again", d->id); });
            d->stage = Stage::attached;
            return;
        }
        if ((d->stage == Stage::burying && d->shards.size() < world_.attributes.shards) || d->stage == Stage::leaving)
            return tell_shard(*d);
    }
}

void Devices::detach()
{
    if (!world_.hwpt || !service_.alive())
        return;
    for (const auto &d : devices_) {
        if (d->stage == Stage::attached && !d->inside && !d->busy && d->pins.empty() &&
            world_.choices.one_in(world_.attributes.destroys ? 2 : 8)) {
            world_.say([&] { return fmt::format("device {} detaches", d->id); });
            world_.met(Event::detach_begins);
            d->stage = Stage::leaving;
            d->shards.clear();
            return;
        }
    }
}

void Devices::take_reports()
{
    if (!service_.is_free(0))
        return;
    for (const std::uint32_t id : std::exchange(service_.life().reported, {})) {
        const auto d = std::find_if(devices_.begin(), devices_.end(), [&](const auto &o) { return o->id == id; });
        if (d == devices_.end())
            world_.wrong("reported", "a dead device is reported too often");
        else if (--(*d)->unreported == 0) {
            world_.say([&] { return fmt::format("device {} is reported by all", id); });
            world_.met(Event::bury_reported);
            release(**d);
        }
    }
}

// No shard knows its cells any more.
void Devices::release(Device &d)
{
    const std::uint32_t id = d.id;
    const bool capable = memory(d).capable;
    world_.devices.erase(id);
    if (!capable && world_.hwpt)
        service_.on(0, [&] { service_.life().commands->withdraw(world_.hwpt->id, id); });
    std::erase_if(devices_, [&](const auto &o) { return o->id == id; });
}

// Slots are what the next worker finds: who has one is attached.
void Devices::service_died()
{
    for (const auto &d : devices_) {
        d->shards.clear();
        if (d->stage == Stage::attaching || d->stage == Stage::leaving)
            d->stage = Stage::unanswered;
        if (d->stage == Stage::burying)
            d->stage = Stage::dead;
    }
}

} // namespace dirtyring::search
