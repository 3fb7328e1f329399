// Devices: how they attach, leave, and die; and the processes of devices and front-ends.
#include "service/control/control.hpp"

#include "iommu/rules.hpp"
#include "service/guests/peer_fds.hpp"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <poll.h>
#include <utility>

namespace dirtyring::service {

namespace {

struct Answer {
    dr_device payload{};
    std::vector<ring::Fd> fds;
};

// What a device gets of its guest.
Result<Answer> answer_for(const Guest &guest, const Hwpt &hwpt, const Device &device)
{
    Answer answer;
    answer.payload.id = device.slot->id;
    Collector fds;
    fds.add(duplicate(hwpt.tables.fd.get()));
    fds.add(read_only(hwpt.translation));
    fds.add(duplicate(device.cells.fd.get()));
    for (const ShardHome &s : hwpt.shards) {
        fds.add(duplicate(s.doorbell.get()));
        ++answer.payload.shards;
    }
    for (const MemoryRegion &m : guest.memory) {
        fds.add(duplicate(m.fd.get()));
        answer.payload.region[answer.payload.regions++] = {m.oa, m.length, m.offset};
    }
    if (!fds.ok())
        return tl::unexpected(fds.ok().error());
    answer.fds = fds.take();
    return answer;
}

Result<void> check(const dr_device_attach &request)
{
    if (request.threads == 0 || request.threads > DR_DEVICE_THREADS_MAX || request.key == 0)
        return refusal(EINVAL, fmt::format("threads is {} (expected 1 to {}), key {:#x} (expected a random number, "
                                           "not 0)",
                                           request.threads, DR_DEVICE_THREADS_MAX, request.key));
    if (request.pins > DR_DEVICE_PINS_MAX / request.threads)
        return refusal(EINVAL, fmt::format("{} threads with {} pins each, expected at most {} pins in all",
                                           request.threads, request.pins, DR_DEVICE_PINS_MAX));
    return {};
}

// Does the device suit the hwpt?
Result<void> check(const Capabilities &can, const Hwpt &hwpt, std::uint64_t features)
{
    const std::uint32_t format = hwpt.geometry.format;
    if (!can.walks(format))
        return refusal(EINVAL,
                       fmt::format("device \"{}\" walks {}; hwpt {} is in {}", can.name, format_names(can.formats),
                                   hwpt.slot->id, format_names(DR_FORMAT_BIT(format))));
    if (hwpt.required && !can.tracks(format))
        return refusal(EINVAL, fmt::format("device \"{}\" {}; hwpt {} requires dirty tracking", can.name,
                                           can.why_not(format), hwpt.slot->id));
    if (hwpt.tracks && (features & DR_FEATURE_SUMMARY) == 0)
        return refusal(EOPNOTSUPP, fmt::format("device \"{}\" did not offer the summary feature, which the rings of "
                                               "hwpt {} need",
                                               can.name, hwpt.slot->id));
    return {};
}

} // namespace

void Control::device_attach(Connection &c)
{
    dr_device_attach request{};
    if (read(c, request))
        admit_or_attach(c, request, 0);
}

// `admitted`: the id under which the home walker has let the device in, though it cannot be tracked; 0: not asked yet.
void Control::admit_or_attach(Connection &c, const dr_device_attach &request, std::uint32_t admitted)
{
    const auto found = guests_.find(std::to_array(request.token));
    if (found == guests_.end())
        return refuse(c.id, {EACCES, "no guest has this token"});
    const std::shared_ptr<Guest> guest = found->second;
    const auto hwpt = guest->hwpts.find(request.hwpt);
    if (hwpt == guest->hwpts.end())
        return refuse(c.id, {ENOENT, fmt::format("there is no hwpt {}", request.hwpt)});
    const auto can = Capabilities::of(request);
    if (refused(c.id, check(request)) || refused(c.id, can) || refused(c.id, check(*can, *hwpt->second, c.features)))
        return;
    auto process = peer_process(c.socket.get());
    if (refused(c.id, process))
        return;
    const auto before = std::find_if(guest->devices.begin(), guest->devices.end(),
                                     [&](const auto &d) { return d.second->slot->key == request.key; });
    if (before != guest->devices.end())
        return attach_again(c, guest, *before->second, request, *process);
    const std::uint32_t id = admitted != 0 ? admitted : guest->record->new_id();
    if (admitted == 0 && !can->tracks(hwpt->second->geometry.format))
        return admit(c, guest, request, id);
    attach(c, guest, {slot_free, id, request.hwpt, process->pid, request.threads, request.pins, 0, request.key, *can},
           std::move(*process));
}

// An ENABLE may be on its way, so the home walker decides; and before the device has its slot, as a restart that finds
// one asks nobody. Meanwhile anything may happen to the guest, so all is looked at again.
void Control::admit(Connection &c, const std::shared_ptr<Guest> &guest, const dr_device_attach &request,
                    std::uint32_t device)
{
    const auto in = std::make_shared<bool>(false);
    ask({{guest->home, [guest, in, hwpt = request.hwpt, device] { *in = guest->commands->admit(hwpt, device); }}},
        [this, id = c.id, guest, request, device, in] {
            if (!*in)
                return refuse(id, {EINVAL, fmt::format("device \"{}\" cannot set Dirty bits in hwpt {}, which is "
                                                       "enabled",
                                                       request.name, request.hwpt)});
            if (Connection *still = find(id))
                admit_or_attach(*still, request, device);
            if (guest->devices.count(device) == 0) // it has come to nothing
                withdraw(guest, request.hwpt, device, [] {});
        });
}

void Control::withdraw(const std::shared_ptr<Guest> &guest, std::uint32_t hwpt, std::uint32_t device, Then then)
{
    ask({{guest->home, [guest, hwpt, device] { guest->commands->withdraw(hwpt, device); }}}, std::move(then));
}

// The device has lost its connection, or its reply.
void Control::attach_again(Connection &c, const std::shared_ptr<Guest> &guest, const Device &device,
                           const dr_device_attach &request, const Process &process)
{
    const DeviceSlot &slot = *device.slot;
    // A process of this number may be another one by now.
    if (slot.pid != process.pid || device.leaving || has_ended(device.pidfd))
        return refuse(c.id, {EBUSY, fmt::format("process {} has device {} of this key", slot.pid, slot.id)});
    if (slot.hwpt != request.hwpt || slot.threads != request.threads || slot.pins != request.pins ||
        Capabilities::of(request) != slot.can)
        return refuse(c.id,
                      {EINVAL, fmt::format("device {} of this key, \"{}\", is attached to hwpt {} with {} threads "
                                           "of {} pins, flags {:#x}, formats {:#x}",
                                           slot.id, slot.can.name, slot.hwpt, slot.threads, slot.pins, slot.can.flags,
                                           slot.can.formats)});
    auto answer = answer_for(*guest, *guest->hwpts.at(slot.hwpt), device);
    if (refused(c.id, answer))
        return;
    for (auto &[id, other] : connections_) {
        if (other->role == Connection::Role::device && other->device_guest == guest->token() &&
            other->device == slot.id)
            dismiss(*other);
    }
    c.role = Connection::Role::device;
    c.device_guest = guest->token();
    c.device = slot.id;
    reply(c.id, answer->payload, std::move(answer->fds));
    spdlog::info("connection {}: device {} of process {} is back", c.id, slot.id, slot.pid);
}

void Control::attach(Connection &c, const std::shared_ptr<Guest> &guest, const DeviceSlot &filled, Process process)
{
    DeviceSlot *slot = free_slot(guest->record->devices);
    if (slot == nullptr)
        return refuse(c.id, {ENOSPC, fmt::format("a guest has at most {} devices", devices_max)});
    *slot = filled;
    Hwpt &hwpt = *guest->hwpts.at(slot->hwpt);
    Holdings holdings(store_, Holdings::Way::in);
    if (refused(c.id, holdings.put(kept_name('Q', guest->number(), slot->id), process.pidfd.get())))
        return;
    auto made = Device::make(guest->number(), *slot, std::move(process.pidfd), holdings);
    if (refused(c.id, made))
        return;
    const std::shared_ptr<Device> device = std::move(*made);
    auto answer = answer_for(*guest, hwpt, *device);
    if (refused(c.id, answer))
        return;
    point(Point::object_stored);
    device->names = holdings.hold();
    take_slot(*slot, *slot);
    point(Point::object_recorded);
    guest->devices.emplace(slot->id, device);
    ++hwpt.devices;
    c.role = Connection::Role::device;
    c.device_guest = guest->token();
    c.device = slot->id;
    watch(device->pidfd, guest->token(), slot->id);

    std::vector<Work> works;
    for (const ShardHome &s : hwpt.shards)
        works.emplace_back(s.owner, [shard = s.shard.get(), device] { shard->add(device->threads); });
    ask(std::move(works), [this, id = c.id, out = std::make_shared<Answer>(std::move(*answer))] {
        reply(id, out->payload, std::move(out->fds));
    });
    spdlog::info("connection {}: device {} ({}) of process {} attached to hwpt {}", c.id, slot->id, slot->can.name,
                 slot->pid, slot->hwpt);
}

void Control::device_detach(Connection &c)
{
    dr_empty request{};
    if (!read(c, request))
        return;
    const auto found = guests_.find(c.device_guest);
    // Gone already, or being buried: its process has ended, but the socket lives on in another one.
    if (found == guests_.end() || found->second->devices.count(c.device) == 0 ||
        found->second->devices.at(c.device)->leaving) {
        c.role = Connection::Role::greeted;
        return reply(c.id, dr_empty{});
    }
    const std::shared_ptr<Guest> guest = found->second;
    const std::shared_ptr<Device> device = guest->devices.at(c.device);
    for (dr_cell &cell : device->threads.cells) {
        // Acquire: what the thread wrote in its sections is before what we do now (S1).
        if ((std::atomic_ref(cell.count).load(std::memory_order_acquire) & 1) != 0)
            return refuse(c.id, {EBUSY, "a DMA thread of the device is inside a section"});
    }
    for (dr_pin &pin : device->threads.pins) {
        if ((std::atomic_ref(pin.count).load(std::memory_order_acquire) & 1) != 0) // P2
            return refuse(c.id, {EBUSY, "a DMA thread of the device holds a pin"});
    }
    c.role = Connection::Role::greeted;
    device->leaving = true;
    std::vector<Work> works;
    for (const ShardHome &s : guest->hwpts.at(device->slot->hwpt)->shards)
        works.emplace_back(s.owner, [shard = s.shard.get(), device] { shard->remove(device->threads); });
    ask(std::move(works),
        [this, id = c.id, guest, device = c.device] { release(guest, device, [this, id] { reply(id, dr_empty{}); }); });
    spdlog::info("connection {}: device {} detached", c.id, c.device);
}

// ---- ends -----------------------------------------------------------------------------------------------------------

void Control::watch(const ring::Fd &pidfd, const Token &guest, std::uint32_t device)
{
    const std::uint64_t id = next_id_++;
    watched_.emplace(id, Watched{guest, device, pidfd.get()});
    if (!pidfd) // whoever kept it has thrown it away, for the process was gone
        return tell([this, id] { on_process_gone(id); });
    poll_process(id);
}

void Control::poll_process(std::uint64_t watch)
{
    const auto watched = watched_.find(watch);
    if (watched == watched_.end())
        return;
    io_uring_sqe *entry = uring_.sqe(0);
    io_uring_prep_poll_add(entry, watched->second.pidfd, POLLIN);
    entry->user_data = tag(gone, watch);
}

void Control::unwatch_if(const std::function<bool(const Watched &)> &matches)
{
    std::erase_if(watched_, [&](const auto &w) {
        if (!matches(w.second))
            return false;
        uring_.cancel_poll(tag(gone, w.first), 0);
        return true;
    });
}

void Control::on_process_gone(std::uint64_t watch)
{
    const auto watched = watched_.find(watch);
    if (watched == watched_.end())
        return;
    const auto [token, id, pidfd] = watched->second;
    watched_.erase(watched);
    const auto found = guests_.find(token);
    if (found == guests_.end())
        return;
    const std::shared_ptr<Guest> guest = found->second;
    if (id == 0)
        return linger(guest);
    if (const auto device = guest->devices.find(id); device != guest->devices.end())
        on_device_gone(guest, device->second);
}

// Whatever its threads were doing, they do it no more.
void Control::on_device_gone(const std::shared_ptr<Guest> &guest, const std::shared_ptr<Device> &device)
{
    const DeviceSlot &slot = *device->slot;
    spdlog::info("device {}: process {} has ended", slot.id, slot.pid);
    if (std::exchange(device->leaving, true))
        return;
    const Hwpt &hwpt = *guest->hwpts.at(slot.hwpt);
    device->unreported = hwpt.shards.size();
    std::vector<Work> works;
    for (const ShardHome &s : hwpt.shards) {
        works.emplace_back(s.owner, [this, shard = s.shard.get(), device, token = guest->token(), id = slot.id] {
            shard->bury(device->threads, [this, token, id] { tell([this, token, id] { on_reported(token, id); }); });
        });
    }
    ask(std::move(works),
        [this, guest, id = slot.id] { end_stalls(*guest, [id](const Stall &s) { return s.device == id; }); });
}

// One shard more. Until all have, a restart must find what the device had pinned.
void Control::on_reported(const Token &token, std::uint32_t id)
{
    const auto guest = guests_.find(token);
    if (guest != guests_.end() && --guest->second->devices.at(id)->unreported == 0)
        release(guest->second, id, [] {});
}

// No owner knows the device's cells any more.
void Control::release(const std::shared_ptr<Guest> &guest, std::uint32_t id, Then then)
{
    const std::shared_ptr<Device> device = std::move(guest->devices.at(id));
    guest->devices.erase(id);
    const std::uint32_t hwpt = device->slot->hwpt;
    if (const auto found = guest->hwpts.find(hwpt); found != guest->hwpts.end())
        --found->second->devices;
    unwatch_if([&](const Watched &w) { return w.guest == guest->token() && w.device == id; });
    end_stalls(*guest, [id](const Stall &s) { return s.device == id; });
    free_slot_again(*device->slot);
    point(Point::object_forgotten);
    forget(store_, device->names);
    // Last: as long as there is a slot, a restart would find it in the way of an ENABLE that had begun.
    withdraw(guest, hwpt, id, std::move(then));
}

} // namespace dirtyring::service
