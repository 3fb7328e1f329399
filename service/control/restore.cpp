// After a restart: takes up the guests that another service has left in the store.
#include "service/control/control.hpp"

#include "iommu/rules.hpp"
#include "service/guests/rings_left.hpp"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <cstring>
#include <sys/stat.h>

namespace dirtyring::service {

namespace {

Result<ring::Region> map_record(ring::Fd fd)
{
    struct stat status {
    };
    ring::Region region;
    if (::fstat(fd.get(), &status) != 0 || static_cast<std::size_t>(status.st_size) < sizeof(GuestRecord))
        return refusal(
            EINVAL, fmt::format("its record has {} bytes, expected {} or more", status.st_size, sizeof(GuestRecord)));
    const auto size = static_cast<std::size_t>(status.st_size);
    if (const int error = region.map.map(fd.get(), size, PROT_READ | PROT_WRITE); error != 0)
        return refusal(-error, fmt::format("its record cannot be mapped: {}", std::strerror(-error)));
    region.fd = std::move(fd);
    return region;
}

Result<void> check(const GuestRecord &r, std::uint32_t number, std::size_t size)
{
    // Acquire: with what was stored before it.
    const std::uint64_t version =
        std::atomic_ref(const_cast<std::uint64_t &>(r.version)).load(std::memory_order_acquire);
    if (version == 0)
        return refusal(ENOENT, "it was not whole yet, or given up already");
    if (r.magic != GuestRecord::magic_expected || version != GuestRecord::version_expected)
        return refusal(EINVAL,
                       fmt::format("its record has magic {:#x} and version {}, this service reads {:#x} and {}",
                                   r.magic, version, GuestRecord::magic_expected, GuestRecord::version_expected));
    if (r.number != number || size != GuestRecord::size(r.command_entries))
        return refusal(EINVAL, fmt::format("its record of {} bytes is one of guest {} with {} command entries", size,
                                           r.number, r.command_entries));
    return {};
}

} // namespace

tl::expected<void, std::string> Control::restore()
{
    const std::uint64_t begin = monotonic_ns();
    std::vector<std::uint32_t> left;
    for (const std::string &name : store_.names()) {
        if (const auto number = guest_of(name))
            left.push_back(*number);
    }
    if (left.empty()) {
        store_.drop_rest();
        return {};
    }
    point(Point::restart_begun);
    for (const std::uint32_t number : left) {
        if (const auto pid = lock(store_.get(kept_name('P', number))))
            return tl::unexpected(
                fmt::format("process {} still serves guest {} of those that were handed over", *pid, number));
    }
    point(Point::restart_locked);
    for (const std::uint32_t number : left) {
        next_guest_ = std::max(next_guest_, number + 1);
        const RingsLeft rings(store_, number);
        if (auto ok = take_up(number); !ok)
            spdlog::warn("guest {} is dropped, all it had is dirty in {} rings: {}", number, rings.mark_all_dirty(),
                         ok.error().sentence);
    }
    store_.drop_rest();
    point(Point::restart_rebuilt);

    std::vector<std::shared_ptr<Guest>> guests;
    std::size_t hwpts = 0;
    std::size_t devices = 0;
    for (const auto &[token, guest] : guests_) {
        guests.push_back(guest);
        hwpts += guest->hwpts.size();
        devices += guest->devices.size();
    }
    taken_up_ = guests.size();
    for (const auto &guest : guests) { // which may be given up at once
        put_to_work(guest, [this, begin, count = guests.size(), hwpts, devices] {
            if (--taken_up_ == 0)
                spdlog::info("took up {} guests, {} hwpts, {} devices in {:.1f} ms", count, hwpts, devices,
                             static_cast<double>(monotonic_ns() - begin) / 1e6);
        });
    }
    return {};
}

// All of the guest, or nothing: what does not fit leads to wrong places.
Result<void> Control::take_up(std::uint32_t number)
{
    Holdings holdings(store_, Holdings::Way::out);
    auto fd = holdings.take(kept_name('P', number));
    auto memfd = fd ? map_record(std::move(*fd)) : tl::unexpected(fd.error());
    if (!memfd)
        return tl::unexpected(memfd.error());
    if (auto ok = check(*memfd->map.as<GuestRecord>(), number, memfd->map.size()); !ok)
        return ok;
    auto restored = Guest::restore(std::move(*memfd), *walkers_[number % walkers_.size()], holdings);
    if (!restored)
        return tl::unexpected(restored.error());
    const std::shared_ptr<Guest> guest = std::move(*restored);
    if (auto process = holdings.take(kept_name('W', number, guest->record->front_end)))
        guest->front_end_process = std::move(*process);
    guest->names = holdings.hold();
    auto ok = take_up_hwpts(*guest);
    if (ok)
        ok = take_up_devices(*guest);
    if (!ok) {
        forget(store_, guest->all_names());
        return ok;
    }
    guests_.emplace(guest->token(), guest);
    return {};
}

Result<void> Control::take_up_hwpts(Guest &guest)
{
    GuestRecord &record = *guest.record;
    // What a DESTROY had begun. The slot goes last: as long as there is one, the next worker ends the rings.
    const auto destroyed = static_cast<std::uint32_t>(record.destroyed >> 32);
    if (IoasSlot *slot = slot_of_id(record.ioases, destroyed))
        free_slot_again(*slot);
    if (HwptSlot *slot = slot_of_id(record.hwpts, destroyed)) {
        if (!broken(Rule::destroy_not_ended))
            RingsLeft(store_, guest.number(), destroyed).end();
        free_slot_again(*slot);
        point(Point::object_forgotten);
    }

    for (const IoasSlot &slot : record.ioases) {
        if (slot.state == slot_taken)
            guest.ioases.emplace(slot.id, false);
    }
    for (HwptSlot &slot : record.hwpts) {
        if (slot.state != slot_taken)
            continue;
        Holdings holdings(store_, Holdings::Way::out);
        auto made = Hwpt::make(plan(guest, slot.id, slot.request), walkers_, holdings);
        if (!made)
            return tl::unexpected(made.error());
        (*made)->slot = &slot;
        (*made)->names = holdings.hold();
        guest.ioases[slot.request.ioas] = true;
        guest.hwpts.emplace(slot.id, std::move(*made));
    }
    return {};
}

Result<void> Control::take_up_devices(Guest &guest)
{
    for (DeviceSlot &slot : guest.record->devices) {
        if (slot.state != slot_taken)
            continue;
        const auto hwpt = guest.hwpts.find(slot.hwpt);
        if (hwpt == guest.hwpts.end())
            return refusal(ENOENT,
                           fmt::format("its device {} is attached to hwpt {}, which is not there", slot.id, slot.hwpt));
        Holdings holdings(store_, Holdings::Way::out);
        auto pidfd = holdings.take(kept_name('Q', guest.number(), slot.id));
        auto made = Device::make(guest.number(), slot, pidfd ? std::move(*pidfd) : ring::Fd(), holdings);
        if (!made)
            return tl::unexpected(made.error());
        (*made)->names = holdings.hold();
        ++hwpt->second->devices;
        guest.devices.emplace(slot.id, std::move(*made));
    }
    return {};
}

void Control::put_to_work(const std::shared_ptr<Guest> &guest, Then then)
{
    Commands *commands = guest->commands.get();
    for (const MemoryRegion &m : guest->memory)
        commands->add_memory(m.oa, m.length);
    for (const auto &[id, has_hwpt] : guest->ioases)
        commands->add_ioas(id);
    std::vector<Work> works;
    for (const auto &[id, hwpt] : guest->hwpts) {
        commands->add_hwpt(id, hwpt->route());
        std::vector<iommu::SliceRecord> slices;
        for (std::uint32_t i = 0; i < hwpt->geometry.shards; ++i)
            slices.push_back(hwpt->slice_record(i));
        commands->restore_extents(hwpt->slot->request.ioas, slices);
        // Its first step looks at all cells.
        std::vector<iommu::DmaThreads> threads;
        for (const auto &[device_id, device] : guest->devices) {
            if (device->slot->hwpt != id)
                continue;
            threads.push_back(device->threads);
            if (!device->slot->can.tracks(hwpt->geometry.format)) {
                // It had been admitted before it got its slot, so nothing has been enabled since.
                [[maybe_unused]] const bool admitted = commands->admit(id, device_id);
                assert(admitted);
            }
        }
        for (const ShardHome &s : hwpt->shards) {
            works.emplace_back(s.owner, [owner = s.owner, shard = s.shard.get(), bell = s.doorbell.get(), threads] {
                for (const iommu::DmaThreads &t : threads)
                    shard->add(t);
                owner->adopt(*shard, bell);
            });
        }
    }
    // Behind the shards' owners: parts that it sends find them adopted.
    works.emplace_back(guest->home, [guest] {
        guest->commands->restored();
        guest->home->adopt(*guest->commands, guest->kick.get());
    });
    ask(std::move(works), std::move(then));

    // The front-end has no connection; it comes back, or its process ends.
    if (guest->record->left != 0)
        linger(guest);
    else
        watch(guest->front_end_process, guest->token(), 0);
    for (const auto &[id, device] : guest->devices)
        watch(device->pidfd, guest->token(), id);
}

} // namespace dirtyring::service
