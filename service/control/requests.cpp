// What the control plane does for each request of ring/control.h, but for guests and devices as a whole.
#include "service/control/control.hpp"

#include "iommu/rules.hpp"
#include "service/guests/peer_fds.hpp"

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string_view>

namespace dirtyring::service {

namespace {

// What makes parts for a guest ends with too many.
Result<void> room_for_object(const Guest &guest)
{
    if (guest.ioases.size() + guest.hwpts.size() >= objects_max)
        return refusal(ENOSPC, fmt::format("a guest has at most {} ioases and hwpts", objects_max));
    return {};
}

} // namespace

void Control::handle(Connection &c)
{
    using Role = Connection::Role;
    struct Entry {
        std::uint32_t request;
        std::string_view name;
        Role needs;
        unsigned fds;
        void (Control::*handler)(Connection &);
    };
    static constexpr Entry entries[] = {
        {DR_HELLO, "HELLO", Role::stranger, 0, &Control::hello},
        {DR_GUEST_CREATE, "GUEST_CREATE", Role::greeted, 0, &Control::guest_create},
        {DR_MEMORY_ADD, "MEMORY_ADD", Role::front_end, 1, &Control::memory_add},
        {DR_IOAS_ALLOC, "IOAS_ALLOC", Role::front_end, 0, &Control::ioas_alloc},
        {DR_HWPT_ALLOC, "HWPT_ALLOC", Role::front_end, 0, &Control::hwpt_alloc},
        {DR_RING_GET, "RING_GET", Role::front_end, 0, &Control::ring_get},
        {DR_DESTROY, "DESTROY", Role::front_end, 0, &Control::destroy},
        {DR_DEVICE_ATTACH, "DEVICE_ATTACH", Role::greeted, 0, &Control::device_attach},
        {DR_DEVICE_DETACH, "DEVICE_DETACH", Role::device, 0, &Control::device_detach},
        {DR_GUEST_DESTROY, "GUEST_DESTROY", Role::front_end, 0, &Control::guest_destroy},
        {DR_DEVICE_INFO, "DEVICE_INFO", Role::front_end, 0, &Control::device_info},
        {DR_HWPT_STATUS, "HWPT_STATUS", Role::front_end, 0, &Control::hwpt_status},
    };
    static constexpr std::string_view roles[] = {"a connection before HELLO",
                                                 "one after HELLO, neither front-end nor device", "a front-end",
                                                 "a device", "one that has lost its part to another"};
    const auto *e = std::find_if(std::begin(entries), std::end(entries),
                                 [&](const Entry &entry) { return entry.request == c.header.request; });
    if (e == std::end(entries))
        return refuse(c.id, {EOPNOTSUPP, fmt::format("request {} is not known", c.header.request)});
    if (e->needs != c.role) {
        const bool again = (e->request == DR_GUEST_CREATE && c.role == Role::front_end) ||
                           (e->request == DR_DEVICE_ATTACH && c.role == Role::device);
        return refuse(c.id, {again ? EBUSY : EPROTO,
                             fmt::format("{} is for {}, this is {}", e->name, roles[static_cast<std::size_t>(e->needs)],
                                         roles[static_cast<std::size_t>(c.role)])});
    }
    if (c.fds.count() != e->fds)
        return refuse(
            c.id, {EINVAL, fmt::format("{} came with {} descriptors, expected {}", e->name, c.fds.count(), e->fds)});
    (this->*e->handler)(c);
}

void Control::refuse_size(const Connection &c, int error, std::size_t expected)
{
    refuse(c.id, {error,
                  fmt::format("payload of {} bytes, expected {} with zeroes behind them", c.payload.size(), expected)});
}

void Control::hello(Connection &c)
{
    dr_hello request{};
    if (!read(c, request))
        return;
    if (request.version < DR_PROTOCOL_VERSION)
        return refuse(c.id, {EPROTONOSUPPORT,
                             fmt::format("the peer speaks up to protocol version {}, this service speaks version {}",
                                         request.version, DR_PROTOCOL_VERSION)});
    c.features = request.features & DR_FEATURES_ALL;
    c.role = Connection::Role::greeted;
    reply(c.id, dr_hello{0, DR_PROTOCOL_VERSION, c.features});
}

// A front-end that got no reply asks again, with the same sequence: what was done is not done twice.

void Control::memory_add(Connection &c)
{
    dr_memory_region request{};
    if (!read(c, request))
        return;
    Guest &guest = *c.guest;
    GuestRecord &record = *guest.record;
    if (slot_of_request(record, record.memory, c.header.sequence) != nullptr)
        return reply(c.id, dr_empty{});
    Holdings holdings(store_, Holdings::Way::in);
    if (refused(c.id, guest.add_memory(request, c.header.sequence, c.fds.get(0), holdings)))
        return;
    const Names names = holdings.hold();
    guest.names.insert(guest.names.end(), names.begin(), names.end());
    change(c.guest,
           {{guest.home,
             [commands = guest.commands.get(), request] { commands->add_memory(request.oa, request.length); }}},
           [this, id = c.id] { reply(id, dr_empty{}); });
}

void Control::ioas_alloc(Connection &c)
{
    dr_empty request{};
    if (!read(c, request))
        return;
    Guest &guest = *c.guest;
    GuestRecord &record = *guest.record;
    if (const IoasSlot *before = slot_of_request(record, record.ioases, c.header.sequence))
        return reply(c.id, dr_object{0, before->id});
    if (refused(c.id, room_for_object(guest)))
        return;
    const std::uint32_t ioas = record.new_id();
    guest.ioases.emplace(ioas, false);
    record.change(c.header.sequence);
    take_slot(*free_slot(record.ioases), {0, c.header.sequence, ioas});
    point(Point::object_recorded);
    change(c.guest, {{guest.home, [commands = guest.commands.get(), ioas] { commands->add_ioas(ioas); }}},
           [this, id = c.id, ioas] {
               reply(id, dr_object{0, ioas});
           });
}

HwptPlan Control::plan(const Guest &guest, std::uint32_t id, const dr_hwpt_alloc &request)
{
    return {guest.number(),
            id,
            request,
            guest.stall_ns(),
            [this, token = guest.token(), id](unsigned shard, const dr_cell *cell) {
                tell([this, token, id, shard, cell] { on_stalled(token, id, shard, cell); });
            },
            [this, token = guest.token(), id](unsigned shard, std::uint64_t offset) {
                tell([this, large = LargePage{token, id, shard, offset}] { to_make_large_.insert(large); });
            }};
}

void Control::hwpt_alloc(Connection &c)
{
    dr_hwpt_alloc request{};
    if (!read(c, request))
        return;
    Guest &guest = *c.guest;
    GuestRecord &record = *guest.record;
    if (const HwptSlot *before = slot_of_request(record, record.hwpts, c.header.sequence))
        return reply(c.id, guest.hwpts.at(before->id)->reply());
    const auto ioas = guest.ioases.find(request.ioas);
    if (ioas == guest.ioases.end())
        return refuse(c.id, {ENOENT, fmt::format("there is no ioas {}", request.ioas)});
    if (ioas->second)
        return refuse(c.id, {EBUSY, fmt::format("ioas {} has an hwpt", request.ioas)});
    if (refused(c.id, room_for_object(guest)))
        return;
    if (request.space == DR_SPACE_OA && (c.features & DR_FEATURE_OA_SPACE) == 0)
        return refuse(c.id, {EOPNOTSUPP, "rings in OA space are a feature that this connection did not offer"});
    const std::uint32_t id = record.new_id();
    Holdings holdings(store_, Holdings::Way::in);
    auto made = Hwpt::make(plan(guest, id, request), walkers_, holdings);
    if (refused(c.id, made))
        return;
    point(Point::object_stored);
    Hwpt &hwpt = *guest.hwpts.emplace(id, std::move(*made)).first->second;
    hwpt.names = holdings.hold();
    hwpt.slot = free_slot(record.hwpts);
    ioas->second = true;
    record.change(c.header.sequence);
    take_slot(*hwpt.slot, {0, c.header.sequence, id, request, {}});
    point(Point::object_recorded);

    std::vector<Work> works;
    for (const ShardHome &s : hwpt.shards)
        works.emplace_back(
            s.owner, [owner = s.owner, shard = s.shard.get(), bell = s.doorbell.get()] { owner->adopt(*shard, bell); });
    works.emplace_back(guest.home,
                       [commands = guest.commands.get(), id, route = hwpt.route()] { commands->add_hwpt(id, route); });
    change(c.guest, std::move(works), [this, connection = c.id, answer = hwpt.reply()] { reply(connection, answer); });
}

void Control::ring_get(Connection &c)
{
    dr_ring_get request{};
    if (!read(c, request))
        return;
    const auto hwpt = c.guest->hwpts.find(request.hwpt);
    if (hwpt == c.guest->hwpts.end() || request.shard >= hwpt->second->shards.size())
        return refuse(c.id, {ENOENT, fmt::format("there is no shard {} of an hwpt {}", request.shard, request.hwpt)});
    if (!hwpt->second->tracks)
        return refuse(c.id, {EOPNOTSUPP, fmt::format("hwpt {} has no dirty tracking, hence no rings", request.hwpt)});
    const ShardHome &s = hwpt->second->shards[request.shard];
    Collector fds;
    fds.add(read_only(s.producer));
    fds.add(duplicate(s.consumer.fd.get()));
    fds.add(duplicate(s.call.get()));
    fds.add(duplicate(s.doorbell.get()));
    if (!refused(c.id, fds.ok()))
        reply(c.id, dr_ring{0, static_cast<std::uint32_t>(hwpt->second->shards.size())}, fds.take());
}

void Control::destroy(Connection &c)
{
    dr_object request{};
    if (!read(c, request))
        return;
    Guest &guest = *c.guest;
    GuestRecord &record = *guest.record;
    const std::uint64_t destroyed = std::uint64_t{request.id} << 32 | c.header.sequence;
    if (record.destroyed == destroyed && record.has_seen(c.header.sequence))
        return reply(c.id, dr_empty{});
    const auto ioas = guest.ioases.find(request.id);
    const auto hwpt = guest.hwpts.find(request.id);
    if (ioas == guest.ioases.end() && hwpt == guest.hwpts.end())
        return refuse(c.id, {ENOENT, fmt::format("there is no object {}", request.id)});
    if (ioas != guest.ioases.end() && ioas->second)
        return refuse(c.id, {EBUSY, fmt::format("ioas {} has an hwpt", request.id)});
    if (hwpt != guest.hwpts.end() && hwpt->second->devices > 0)
        return refuse(c.id,
                      {EBUSY, fmt::format("{} devices are attached to hwpt {}", hwpt->second->devices, request.id)});
    // From here on a restart goes through with it.
    record.change(c.header.sequence);
    std::atomic_ref(record.destroyed).store(destroyed, std::memory_order_release);
    point(Point::destroy_noted);
    const Then done = [this, id = c.id] { reply(id, dr_empty{}); };
    if (hwpt != guest.hwpts.end())
        return destroy_hwpt(c.guest, request.id, done);
    guest.ioases.erase(ioas);
    change(c.guest, {{guest.home, [commands = guest.commands.get(), id = request.id] { commands->remove_ioas(id); }}},
           [guest = c.guest, id = request.id, done] {
               free_slot_again(*slot_of_id(guest->record->ioases, id));
               point(Point::object_forgotten);
               done();
           });
}

void Control::destroy_hwpt(const std::shared_ptr<Guest> &guest, std::uint32_t id, Then then)
{
    const std::shared_ptr<Hwpt> hwpt = std::move(guest->hwpts.at(id));
    guest->hwpts.erase(id);
    guest->ioases[hwpt->slot->request.ioas] = false;
    end_stalls(*guest, [id](const Stall &s) { return s.hwpt == id; });

    // No new parts; then the shards give theirs back; then the home walker has seen them all.
    std::vector<Work> drops;
    for (const ShardHome &s : hwpt->shards) {
        drops.emplace_back(s.owner, [owner = s.owner, shard = s.shard.get()] {
            shard->cancel();
            owner->drop(*shard);
        });
    }
    const Then gone = [this, hwpt, then = std::move(then)] {
        free_slot_again(*hwpt->slot);
        point(Point::object_forgotten);
        forget(store_, hwpt->names);
        then();
    };
    change(guest, {{guest->home, [commands = guest->commands.get(), id] { commands->remove_hwpt(id); }}},
           [this, guest, drops = std::move(drops), gone] {
               change(guest, drops, [this, guest, gone] {
                   change(guest, {{guest->home, [home = guest->home] { home->flush(); }}}, gone);
               });
           });
}

void Control::device_info(Connection &c)
{
    dr_object request{};
    if (!read(c, request))
        return;
    const auto next = c.guest->devices.upper_bound(request.id);
    if (next == c.guest->devices.end())
        return refuse(c.id, {ENOENT, fmt::format("there is no device with an id above {}", request.id)});
    const DeviceSlot &slot = *next->second->slot;
    dr_device_info info{0, slot.id, slot.hwpt, slot.pid, slot.can.flags, slot.can.formats, {}};
    std::memcpy(info.name, slot.can.name, sizeof info.name);
    reply(c.id, info);
}

void Control::hwpt_status(Connection &c)
{
    dr_object request{};
    if (!read(c, request))
        return;
    const auto found = c.guest->hwpts.find(request.id);
    if (found == c.guest->hwpts.end())
        return refuse(c.id, {ENOENT, fmt::format("there is no hwpt {}", request.id)});
    const Hwpt &hwpt = *found->second;
    const auto told = std::make_shared<Tracking>();
    ask({{c.guest->home, [guest = c.guest, told, id = request.id] { *told = guest->commands->tracking(id); }}},
        [this, id = c.id, told, tracks = hwpt.tracks, format = hwpt.geometry.format, devices = hwpt.devices] {
            const std::uint32_t flags = (tracks && told->in_the_way == 0 ? DR_TRACKING_SUPPORTED : 0) |
                                        (told->enabled ? DR_TRACKING_ENABLED : 0);
            reply(id, dr_hwpt_status{0, format, flags, devices, told->in_the_way});
        });
}

} // namespace dirtyring::service
