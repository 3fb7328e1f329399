// On whom a guest waits: what its shards say, as the front-end sees it in dr_guest_status.
#include "service/control/control.hpp"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <atomic>
#include <functional>

namespace dirtyring::service {

// nullptr: the shard waits no longer.
void Control::on_stalled(const Token &token, std::uint32_t hwpt, unsigned shard, const dr_cell *cell)
{
    const auto found = guests_.find(token);
    if (found == guests_.end())
        return;
    Guest &guest = *found->second;
    std::erase_if(guest.stalls, [&](const Stall &s) { return s.hwpt == hwpt && s.shard == shard; });
    const auto device = std::find_if(guest.devices.begin(), guest.devices.end(), [&](const auto &d) {
        const std::span<dr_cell> cells = d.second->threads.cells;
        // The cell may be one of a device that is gone: only compared, and not with < of pointers into two arrays.
        return std::greater_equal<>()(cell, cells.data()) && std::less<>()(cell, cells.data() + cells.size());
    });
    if (device != guest.devices.end())
        guest.stalls.push_back({hwpt, shard, device->first});
    show_stalls(guest);
}

void Control::end_stalls(Guest &guest, const std::function<bool(const Stall &)> &where)
{
    std::erase_if(guest.stalls, where);
    show_stalls(guest);
}

// The first of them; the others when it is over.
void Control::show_stalls(Guest &guest)
{
    dr_guest_status &status = guest.status();
    const std::atomic_ref since(status.since);
    if (guest.stalls.empty()) {
        since.store(0, std::memory_order_release);
        return;
    }
    const Device &device = *guest.devices.at(guest.stalls.front().device);
    if (status.since != 0 && status.device == device.slot->id)
        return;
    since.store(0, std::memory_order_release);
    std::atomic_ref(status.device).store(device.slot->id, std::memory_order_release);
    std::atomic_ref(status.pid).store(device.slot->pid, std::memory_order_release);
    since.store(monotonic_ns() - guest.stall_ns(), std::memory_order_release); // with what it says
    spdlog::warn("guest {}: device {} (process {}) has held it up for {} ms", guest.number(), device.slot->id,
                 device.slot->pid, guest.stall_ns() / 1'000'000);
    ask({{guest.home, [home = guest.home, fd = guest.call.get()] { home->call(fd); }}}, [] {});
}

} // namespace dirtyring::service
