// What the control plane does for each request of ring/control.h, and when a peer is gone.
#include "service/control.hpp"

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>

namespace dirtyring::service {

namespace {

constexpr std::uint64_t gone_tag = 7ull << 56;
constexpr std::size_t devices_max = 64;
constexpr std::size_t objects_max = 64; // ioases and hwpts of a guest
constexpr std::size_t guests_max = 256;

// SO_PEERPIDFD is newer than Debian 12's headers.
constexpr int so_peerpidfd = 77;

Result<ring::Fd> duplicate(int fd)
{
    ring::Fd copy(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (!copy)
        return tl::unexpected<Refusal>({errno, fmt::format("out of descriptors: {}", std::strerror(errno))});
    return copy;
}

Result<ring::Fd> read_only(const ring::Region &region)
{
    ring::Fd copy;
    if (const int error = region.read_only(copy); error != 0)
        return tl::unexpected<Refusal>(
            {-error, fmt::format("cannot reopen a region read-only: {}", std::strerror(-error))});
    return copy;
}

// Collects descriptors for a reply; remembers the first failure.
class Collector
{
  public:
    void add(Result<ring::Fd> fd)
    {
        if (fd)
            fds_.push_back(std::move(*fd));
        else if (ok_)
            ok_ = tl::unexpected(fd.error());
    }
    [[nodiscard]] const Result<void> &ok() const { return ok_; }
    std::vector<ring::Fd> take() { return std::move(fds_); }

  private:
    std::vector<ring::Fd> fds_;
    Result<void> ok_;
};

struct Process {
    int pid;
    ring::Fd pidfd;
};

Result<Process> peer_process(int socket)
{
    ucred credentials{};
    socklen_t size = sizeof credentials;
    if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0)
        return tl::unexpected<Refusal>({ESRCH, "the peer's process is not known"});
    int pidfd = -1;
    size = sizeof pidfd;
    if (::getsockopt(socket, SOL_SOCKET, so_peerpidfd, &pidfd, &size) != 0)
        pidfd = static_cast<int>(::syscall(SYS_pidfd_open, credentials.pid, 0));
    if (pidfd < 0)
        return tl::unexpected<Refusal>(
            {ESRCH, fmt::format("process {} cannot be watched: {}", credentials.pid, std::strerror(errno))});
    return Process{credentials.pid, ring::Fd(pidfd)};
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
    };
    static constexpr std::string_view roles[] = {
        "a connection before HELLO", "one after HELLO, neither front-end nor device", "a front-end", "a device"};
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

template <class Payload> bool Control::read(Connection &c, Payload &out)
{
    const int error = ring::read_payload(c.payload.data(), c.payload.size(), out);
    if (error != 0)
        refuse(c.id, {-error, fmt::format("payload of {} bytes, expected {} with zeroes behind them", c.payload.size(),
                                          sizeof out)});
    return error == 0;
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

void Control::guest_create(Connection &c)
{
    dr_guest_create request{};
    if (!read(c, request))
        return;
    if (guests_.size() == guests_max)
        return refuse(c.id, {ENOSPC, fmt::format("{} guests are here already", guests_max)});
    auto made = Guest::make(request.command_entries, *walkers_[next_home_++ % walkers_.size()]);
    if (refused(c.id, made))
        return;
    const std::shared_ptr<Guest> guest = std::move(*made);
    Collector fds;
    fds.add(duplicate(guest->front_end.fd.get()));
    fds.add(read_only(guest->service));
    fds.add(duplicate(guest->kick.get()));
    fds.add(duplicate(guest->call.get()));
    if (refused(c.id, fds.ok()))
        return;
    c.role = Connection::Role::front_end;
    c.guest = guest;
    guests_.emplace(guest->token, guest);
    dr_guest payload{};
    payload.command_entries = guest->command_entries;
    std::copy(guest->token.begin(), guest->token.end(), payload.token);
    std::copy(guest->secret.begin(), guest->secret.end(), payload.secret);
    Walker *home = guest->home;
    ask({{home, [home, guest] { home->adopt(*guest->commands, guest->kick.get()); }}},
        [this, id = c.id, payload, out = std::make_shared<Fds>(fds.take())] { reply(id, payload, std::move(*out)); });
    spdlog::info("connection {}: a guest", c.id);
}

void Control::memory_add(Connection &c)
{
    dr_memory_region request{};
    if (!read(c, request))
        return;
    Guest &guest = *c.guest;
    if (refused(c.id, guest.add_memory(request, c.fds)))
        return;
    ask({{guest.home,
          [commands = guest.commands.get(), request] { commands->add_memory(request.oa, request.length); }}},
        [this, id = c.id] { reply(id, dr_empty{}); });
}

void Control::ioas_alloc(Connection &c)
{
    dr_empty request{};
    if (!read(c, request))
        return;
    Guest &guest = *c.guest;
    if (guest.ioases.size() + guest.hwpts.size() >= objects_max)
        return refuse(c.id, {ENOSPC, fmt::format("a guest has at most {} ioases and hwpts", objects_max)});
    const std::uint32_t ioas = guest.next_id++;
    guest.ioases.emplace(ioas, false);
    ask({{guest.home, [commands = guest.commands.get(), ioas] { commands->add_ioas(ioas); }}}, [this, id = c.id, ioas] {
        reply(id, dr_object{0, ioas});
    });
}

void Control::hwpt_alloc(Connection &c)
{
    dr_hwpt_alloc request{};
    if (!read(c, request))
        return;
    Guest &guest = *c.guest;
    const auto ioas = guest.ioases.find(request.ioas);
    if (ioas == guest.ioases.end())
        return refuse(c.id, {ENOENT, fmt::format("there is no ioas {}", request.ioas)});
    if (ioas->second)
        return refuse(c.id, {EBUSY, fmt::format("ioas {} has an hwpt", request.ioas)});
    if (guest.ioases.size() + guest.hwpts.size() >= objects_max)
        return refuse(c.id, {ENOSPC, fmt::format("a guest has at most {} ioases and hwpts", objects_max)});
    if (request.space == DR_SPACE_OA && (c.features & DR_FEATURE_OA_SPACE) == 0)
        return refuse(c.id, {EOPNOTSUPP, "rings in OA space are a feature that this connection did not offer"});
    auto made = Hwpt::make(request, walkers_);
    if (refused(c.id, made))
        return;
    ioas->second = true;
    const std::uint32_t id = guest.next_id++;
    const Hwpt &hwpt = *guest.hwpts.emplace(id, std::move(*made)).first->second;

    HwptRoute route{request.ioas, hwpt.geometry.aperture_lg2,     hwpt.geometry.slice_lg2,
                    hwpt.tracks,  request.space == DR_SPACE_IOVA, {}};
    std::vector<Work> works;
    for (const ShardHome &s : hwpt.shards) {
        route.shards.push_back({s.shard.get(), s.owner});
        works.emplace_back(
            s.owner, [owner = s.owner, shard = s.shard.get(), bell = s.doorbell.get()] { owner->adopt(*shard, bell); });
    }
    works.emplace_back(guest.home, [commands = guest.commands.get(), id, route] { commands->add_hwpt(id, route); });
    ask(std::move(works), [this, connection = c.id, id, route] {
        reply(connection, dr_hwpt{0, id, static_cast<std::uint32_t>(route.shards.size()), route.slice_lg2});
    });
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
    Commands *commands = guest.commands.get();
    if (const auto ioas = guest.ioases.find(request.id); ioas != guest.ioases.end()) {
        if (ioas->second)
            return refuse(c.id, {EBUSY, fmt::format("ioas {} has an hwpt", request.id)});
        guest.ioases.erase(ioas);
        return ask({{guest.home, [commands, id = request.id] { commands->remove_ioas(id); }}},
                   [this, id = c.id] { reply(id, dr_empty{}); });
    }
    const auto found = guest.hwpts.find(request.id);
    if (found == guest.hwpts.end())
        return refuse(c.id, {ENOENT, fmt::format("there is no object {}", request.id)});
    if (found->second->devices > 0)
        return refuse(c.id,
                      {EBUSY, fmt::format("{} devices are attached to hwpt {}", found->second->devices, request.id)});
    const std::shared_ptr<Hwpt> hwpt = std::move(found->second);
    guest.hwpts.erase(found);
    guest.ioases[hwpt->ioas] = false;

    // No new parts; then the shards give theirs back; then the home walker has seen them all.
    std::vector<Work> drops;
    for (const ShardHome &s : hwpt->shards) {
        drops.emplace_back(s.owner, [owner = s.owner, shard = s.shard.get()] {
            shard->cancel();
            owner->drop(*shard);
        });
    }
    Walker *home = guest.home;
    ask({{home, [commands, id = request.id] { commands->remove_hwpt(id); }}},
        [this, home, hwpt, drops = std::move(drops), id = c.id] {
            ask(drops, [this, home, hwpt, id] {
                ask({{home, [home] { home->flush(); }}}, [this, hwpt, id] { reply(id, dr_empty{}); });
            });
        });
}

void Control::device_attach(Connection &c)
{
    dr_device_attach request{};
    if (!read(c, request))
        return;
    Token token;
    std::copy(std::begin(request.token), std::end(request.token), token.begin());
    const auto found = guests_.find(token);
    if (found == guests_.end())
        return refuse(c.id, {EACCES, "no guest has this token"});
    const std::shared_ptr<Guest> guest = found->second;
    const auto hwpt_found = guest->hwpts.find(request.hwpt);
    if (hwpt_found == guest->hwpts.end())
        return refuse(c.id, {ENOENT, fmt::format("there is no hwpt {}", request.hwpt)});
    Hwpt &hwpt = *hwpt_found->second;
    if (request.threads == 0 || request.threads > DR_DEVICE_THREADS_MAX ||
        (request.flags & ~DR_DEVICE_CAN_TRACK) != 0 || request.reserved != 0)
        return refuse(
            c.id, {EINVAL,
                   fmt::format("threads is {} (expected 1 to {}), flags {:#x} (known {:#x}), reserved {} (expected 0)",
                               request.threads, DR_DEVICE_THREADS_MAX, request.flags, DR_DEVICE_CAN_TRACK,
                               request.reserved)});
    if (request.pins > DR_DEVICE_PINS_MAX / request.threads)
        return refuse(c.id, {EINVAL, fmt::format("{} threads with {} pins each, expected at most {} pins in all",
                                                 request.threads, request.pins, DR_DEVICE_PINS_MAX)});
    if (hwpt.tracks && (request.flags & DR_DEVICE_CAN_TRACK) == 0)
        return refuse(
            c.id, {EINVAL,
                   fmt::format("the device cannot set Dirty bits, and hwpt {} requires dirty tracking", request.hwpt)});
    if (hwpt.tracks && (c.features & DR_FEATURE_SUMMARY) == 0)
        return refuse(c.id, {EOPNOTSUPP, "the device did not offer the summary feature, which dirty tracking needs"});
    if (guest->devices.size() == devices_max)
        return refuse(c.id, {ENOSPC, fmt::format("a guest has at most {} devices", devices_max)});
    auto process = peer_process(c.socket.get());
    if (refused(c.id, process))
        return;

    const auto device = std::make_shared<Device>();
    device->id = guest->next_id++;
    device->hwpt = request.hwpt;
    device->pid = process->pid;
    device->pidfd = std::move(process->pidfd);
    const std::size_t pins = std::size_t{request.threads} * request.pins;
    const std::size_t cells_size = request.threads * sizeof(dr_cell);
    if (const int error =
            device->cells.make("dirtyring-cells", cells_size + pins * sizeof(dr_pin), ring::Pages::present);
        error != 0)
        return refuse(c.id, {-error, "no memory for the device's cells"});
    device->threads = {{device->cells.map.as<dr_cell>(), request.threads},
                       {device->cells.map.as<dr_pin>(cells_size), pins}};

    dr_device payload{};
    payload.id = device->id;
    Collector fds;
    fds.add(duplicate(hwpt.tables.fd.get()));
    fds.add(read_only(hwpt.translation));
    fds.add(duplicate(device->cells.fd.get()));
    for (const ShardHome &s : hwpt.shards) {
        fds.add(duplicate(s.doorbell.get()));
        ++payload.shards;
    }
    for (const MemoryRegion &m : guest->memory) {
        fds.add(duplicate(m.fd.get()));
        payload.region[payload.regions++] = {m.oa, m.length, m.offset};
    }
    if (refused(c.id, fds.ok()))
        return;

    guest->devices.emplace(device->id, device);
    ++hwpt.devices;
    c.role = Connection::Role::device;
    c.device_guest = token;
    c.device = device->id;
    watch(*device, token);

    std::vector<Work> works;
    for (const ShardHome &s : hwpt.shards)
        works.emplace_back(s.owner, [shard = s.shard.get(), device] { shard->add(device->threads); });
    ask(std::move(works),
        [this, id = c.id, payload, out = std::make_shared<Fds>(fds.take())] { reply(id, payload, std::move(*out)); });
    spdlog::info("connection {}: device {} of process {} attached to hwpt {}", c.id, device->id, device->pid,
                 request.hwpt);
}

void Control::device_detach(Connection &c)
{
    dr_empty request{};
    if (!read(c, request))
        return;
    const auto found = guests_.find(c.device_guest);
    if (found == guests_.end() || found->second->devices.count(c.device) == 0) {
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
    std::vector<Work> works;
    for (const ShardHome &s : guest->hwpts.at(device->hwpt)->shards)
        works.emplace_back(s.owner, [shard = s.shard.get(), device] { shard->remove(device->threads); });
    ask(std::move(works), [this, id = c.id, guest, device] {
        release(*guest, device->id);
        reply(id, dr_empty{});
    });
    spdlog::info("connection {}: device {} detached", c.id, device->id);
}

// ---- ends --------------------------------------------------------------------------------------------------------------------

void Control::watch(const Device &device, const Token &guest)
{
    const std::uint64_t id = next_id_++;
    watched_.emplace(id, Watched{guest, device.id});
    io_uring_sqe *entry = uring_.sqe(gone_tag | id);
    io_uring_prep_poll_add(entry, device.pidfd.get(), POLLIN);
    entry->user_data = gone_tag | id;
}

void Control::unwatch_if(const std::function<bool(const Watched &)> &matches)
{
    std::erase_if(watched_, [&](const auto &w) {
        if (!matches(w.second))
            return false;
        uring_.cancel_poll(gone_tag | w.first, 0);
        return true;
    });
}

// The process of a device has ended: whatever its threads were doing, they do it no more.
void Control::on_process_gone(std::uint64_t watch)
{
    const auto watched = watched_.find(watch);
    if (watched == watched_.end())
        return;
    const auto [token, id] = watched->second;
    watched_.erase(watched);
    const auto found = guests_.find(token);
    if (found == guests_.end() || found->second->devices.count(id) == 0)
        return;
    const std::shared_ptr<Guest> guest = found->second;
    const std::shared_ptr<Device> device = guest->devices.at(id);
    spdlog::info("device {}: process {} has ended", id, device->pid);
    std::vector<Work> works;
    for (const ShardHome &s : guest->hwpts.at(device->hwpt)->shards)
        works.emplace_back(s.owner, [shard = s.shard.get(), device] { shard->bury(device->threads); });
    ask(std::move(works), [this, guest, id = id] { release(*guest, id); });
}

// No owner knows the device's cells any more.
void Control::release(Guest &guest, std::uint32_t id)
{
    const auto device = guest.devices.find(id);
    if (device == guest.devices.end())
        return;
    if (const auto hwpt = guest.hwpts.find(device->second->hwpt); hwpt != guest.hwpts.end())
        --hwpt->second->devices;
    unwatch_if([&](const Watched &w) { return w.guest == guest.token && w.device == id; });
    guest.devices.erase(device);
}

// The front-end is gone: frees all that the guest has, when no walker uses it any more.
void Control::retire(std::shared_ptr<Guest> guest)
{
    guests_.erase(guest->token);
    unwatch_if([&](const Watched &w) { return w.guest == guest->token; });
    for (auto &[id, connection] : connections_) {
        if (connection->role == Connection::Role::device && connection->device_guest == guest->token)
            ::shutdown(connection->socket.get(), SHUT_RDWR);
    }
    std::vector<Work> drops;
    for (const auto &[id, hwpt] : guest->hwpts) {
        for (const ShardHome &s : hwpt->shards) {
            drops.emplace_back(s.owner, [owner = s.owner, shard = s.shard.get()] {
                shard->cancel();
                owner->drop(*shard);
            });
        }
    }
    Walker *home = guest->home;
    ask({{home,
          [home, guest] {
              home->drop(*guest->commands);
              guest->commands->cancel();
          }}},
        [this, home, guest, drops = std::move(drops)] {
            ask(drops, [this, home, guest] {
                ask({{home, [home] { home->flush(); }}}, [guest] { spdlog::info("a guest is gone"); });
            });
        });
}

} // namespace dirtyring::service
