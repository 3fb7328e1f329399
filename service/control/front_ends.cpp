// Guests as a whole: how one comes, changes hands, waits for a front-end, and goes.
#include "service/control/control.hpp"

#include "iommu/rules.hpp"
#include "service/guests/peer_fds.hpp"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <cerrno>
#include <sys/socket.h>

namespace dirtyring::service {

namespace {

constexpr std::size_t guests_max = 256;

// What a front-end gets of its guest.
Result<std::vector<ring::Fd>> front_end_fds(const Guest &guest)
{
    Collector fds;
    fds.add(duplicate(guest.front_end.fd.get()));
    fds.add(read_only(guest.service));
    fds.add(duplicate(guest.kick.get()));
    fds.add(duplicate(guest.call.get()));
    if (!fds.ok())
        return tl::unexpected(fds.ok().error());
    return fds.take();
}

std::string front_end_name(const GuestRecord &record, std::uint64_t takeovers)
{
    return kept_name('W', record.number, takeovers);
}

} // namespace

void Control::guest_create(Connection &c)
{
    dr_guest_create request{};
    if (!read(c, request))
        return;
    constexpr std::uint32_t known = DR_GUEST_TAKE | DR_GUEST_AGAIN;
    if ((request.flags & ~known) != 0)
        return refuse(c.id,
                      {EINVAL, fmt::format("flags {:#x} of the guest: only {:#x} is known", request.flags, known)});
    if (std::all_of(std::begin(request.secret), std::end(request.secret), [](std::uint8_t b) { return b == 0; }))
        return refuse(c.id, {EINVAL, "the secret is zero, expected random bytes"});
    create_or_take(c, request);
}

void Control::create_or_take(Connection &c, const dr_guest_create &request)
{
    const auto found = std::find_if(guests_.begin(), guests_.end(), [&](const auto &g) {
        return std::equal(std::begin(request.secret), std::end(request.secret), g.second->record->secret);
    });
    if (found == guests_.end() && request.flags != 0)
        return refuse(c.id, {ENOENT, "no guest has this secret"});
    if (found == guests_.end())
        return create(c, request);
    const std::shared_ptr<Guest> guest = found->second;
    if (guest->changes == 0)
        return take_over(c, guest, request);
    guest->after_changes.emplace_back([this, id = c.id, request] {
        if (Connection *still = find(id))
            create_or_take(*still, request);
    });
}

void Control::create(Connection &c, const dr_guest_create &request)
{
    if (guests_.size() == guests_max)
        return refuse(c.id, {ENOSPC, fmt::format("{} guests are here already", guests_max)});
    auto process = peer_process(c.socket.get());
    if (refused(c.id, process))
        return;
    const std::uint32_t number = next_guest_++;
    Holdings holdings(store_, Holdings::Way::in);
    auto made = Guest::make(number, request, c.header.sequence, *walkers_[number % walkers_.size()], holdings);
    if (refused(c.id, made))
        return;
    const std::shared_ptr<Guest> guest = std::move(*made);
    auto fds = front_end_fds(*guest);
    if (refused(c.id, holdings.put(front_end_name(*guest->record, 0), process->pidfd.get())) || refused(c.id, fds))
        return;
    guest->record->front_end_pid = static_cast<std::uint64_t>(process->pid);
    lock(guest->memfd.fd.get()); // nobody else knows it
    point(Point::object_stored);
    guest->names = holdings.hold();
    std::atomic_ref(guest->record->version).store(GuestRecord::version_expected, std::memory_order_release);
    point(Point::object_recorded);
    guests_.emplace(guest->token(), guest);
    Walker *home = guest->home;
    give_to(c, guest, std::move(*fds), {{home, [home, guest] { home->adopt(*guest->commands, guest->kick.get()); }}});
    spdlog::info("connection {}: guest {}", c.id, number);
}

void Control::take_over(Connection &c, const std::shared_ptr<Guest> &guest, const dr_guest_create &request)
{
    auto process = peer_process(c.socket.get());
    auto fds = front_end_fds(*guest);
    if (refused(c.id, process) || refused(c.id, fds))
        return;
    GuestRecord &record = *guest->record;
    const auto pid = static_cast<std::uint64_t>(process->pid);
    if ((request.flags & DR_GUEST_AGAIN) != 0 && record.front_end_pid != pid)
        return refuse(c.id, {EBUSY, fmt::format("process {} has taken the guest over", record.front_end_pid)});
    const std::uint64_t before = record.front_end;
    Holdings holdings(store_, Holdings::Way::in);
    if (refused(c.id, holdings.put(front_end_name(record, before + 1), process->pidfd.get())))
        return;
    if (request.linger_ms != 0)
        record.linger_ms = request.linger_ms;
    if (request.stall_ms != 0)
        record.stall_ms = request.stall_ms;
    record.left = 0;
    record.front_end_pid = pid;
    std::atomic_ref(record.front_end).store(before + 1, std::memory_order_release);
    store_.remove(front_end_name(record, before));
    std::erase(guest->names, front_end_name(record, before));
    guest->names.push_back(holdings.hold().front());

    stop_lingering(*guest);
    unwatch_if([&](const Watched &w) { return w.guest == guest->token() && w.device == 0; });
    guest->front_end_process = {};
    if (Connection *old = find(guest->connection))
        dismiss(*old);
    give_to(c, guest, std::move(*fds), look_again_at(*guest));
    spdlog::info("connection {}: guest {} is taken over", c.id, record.number);
}

// Its predecessor may have died between a store that asks for a kick and the kick: whatever of the guest sleeps looks
// at its rings.
std::vector<Control::Work> Control::look_again_at(const Guest &guest)
{
    std::vector<Work> works;
    if (broken(Rule::takeover_wakes_nobody))
        return works;
    works.emplace_back(guest.home, [commands = guest.commands.get()] { commands->stirred().set(); });
    for (const auto &[id, hwpt] : guest.hwpts) {
        for (const ShardHome &s : hwpt->shards)
            works.emplace_back(s.owner, [shard = s.shard.get()] { shard->stirred().set(); });
    }
    return works;
}

void Control::give_to(Connection &c, std::shared_ptr<Guest> guest, Fds fds, std::vector<Work> works)
{
    dr_guest payload{};
    payload.command_entries = guest->record->command_entries;
    payload.sequence = guest->record->sequence;
    std::copy(std::begin(guest->record->token), std::end(guest->record->token), payload.token);
    c.role = Connection::Role::front_end;
    c.guest = guest;
    guest->connection = c.id;
    change(guest, std::move(works), [this, id = c.id, payload, out = std::make_shared<Fds>(std::move(fds))] {
        reply(id, payload, std::move(*out));
    });
}

void Control::guest_destroy(Connection &c)
{
    dr_empty request{};
    if (!read(c, request))
        return;
    c.role = Connection::Role::greeted;
    retire(std::move(c.guest), [this, id = c.id] { reply(id, dr_empty{}); });
}

void Control::dismiss(Connection &c)
{
    c.guest.reset();
    c.role = Connection::Role::dismissed;
    ::shutdown(c.socket.get(), SHUT_RDWR);
}

void Control::leave(const std::shared_ptr<Guest> &guest)
{
    guest->connection = 0;
    std::atomic_ref(guest->record->left).store(1, std::memory_order_release);
    linger(guest);
}

void Control::linger(const std::shared_ptr<Guest> &guest)
{
    const std::uint32_t ms = guest->record->linger_ms;
    if (ms == 0)
        return retire(guest);
    guest->lingering = next_id_++;
    Timer &timer = timers_[guest->lingering];
    timer = {guest->token(), {ms / 1000, ms % 1000 * 1'000'000}};
    io_uring_sqe *entry = uring_.sqe(0);
    io_uring_prep_timeout(entry, &timer.time, 0, 0);
    entry->user_data = tag(linger_over, guest->lingering);
    spdlog::info("guest {}: no front-end; waits {} ms for another", guest->number(), ms);
}

void Control::stop_lingering(Guest &guest)
{
    if (guest.lingering == 0)
        return;
    io_uring_sqe *entry = uring_.sqe(0);
    io_uring_prep_timeout_remove(entry, tag(linger_over, std::exchange(guest.lingering, 0)), 0);
    entry->user_data = tag(ignored);
}

void Control::on_linger_over(std::uint64_t timer)
{
    const Token token = timers_.at(timer).guest;
    timers_.erase(timer); // only now: the kernel reads the time when it gets the entry
    const auto guest = guests_.find(token);
    if (guest != guests_.end() && guest->second->lingering == timer)
        retire(guest->second);
}

void Control::retire(std::shared_ptr<Guest> guest, Then then)
{
    const Token token = guest->token();
    guests_.erase(token);
    stop_lingering(*guest);
    unwatch_if([&](const Watched &w) { return w.guest == token; });
    for (auto &[id, connection] : connections_) {
        if (connection->role == Connection::Role::device && connection->device_guest == token)
            ::shutdown(connection->socket.get(), SHUT_RDWR);
    }
    // First: nobody takes it up again, and its secret may be another guest's from here on.
    std::atomic_ref(guest->record->version).store(0, std::memory_order_release);

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
    const Then gone = [this, guest, then = std::move(then)] {
        point(Point::object_forgotten);
        forget(store_, guest->all_names());
        spdlog::info("guest {} is gone", guest->number());
        if (then)
            then();
    };
    ask({{home,
          [home, guest] {
              home->drop(*guest->commands);
              guest->commands->cancel();
          }}},
        [this, home, drops = std::move(drops), gone] {
            ask(drops, [this, home, gone] { ask({{home, [home] { home->flush(); }}}, gone); });
        });
}

} // namespace dirtyring::service
