#include "client/migrate/mapper.hpp"

#include "client/migrate/failure.hpp"
#include "client/migrate/load.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <unistd.h>

namespace dirtyring::migrate {
namespace {

constexpr std::uint32_t map_flags = DIRTYRING_READ | DIRTYRING_WRITE | DIRTYRING_IDEMPOTENT;
constexpr std::uint32_t unmap_flags = DIRTYRING_HARVEST_NOW | DIRTYRING_UNMAP_EMPTY_OK;

// user_data: the number of the map or unmap, and which of the two.
constexpr std::uint64_t tag(std::uint64_t id, bool map)
{
    return id << 1 | (map ? 1 : 0);
}

std::uint64_t end_of(std::uint64_t iova, std::uint64_t length)
{
    return length > UINT64_MAX - iova ? UINT64_MAX : iova + length;
}

// False: the queue is full.
bool try_queue(const Result<void> &result)
{
    if (!result && result.error().code != EAGAIN)
        throw Failure(fmt::format("cannot queue a map change: {}", result.error().sentence));
    return result.has_value();
}

} // namespace

void Mapper::start()
{
    finished_.store(false, std::memory_order_seq_cst);
    thread_ = std::thread([this] {
        try {
            run();
        } catch (const std::exception &e) {
            end_failed(shared_.control,
                       fmt::format("source VMM: {}", e.what())); // the other thread would wait for this one
        }
        finished_.store(true, std::memory_order_seq_cst);
        shared_.source_bell.ring();
    });
}

void Mapper::join()
{
    if (thread_.joinable())
        thread_.join();
}

void Mapper::run()
{
    const Plan &plan = shared_.plan;
    const MapChange everything{plan.duration_us, 0, UINT64_MAX, 0, plan.accesses.size(), 0, false};
    const std::uint64_t loops = shared_.options.loops;
    bool going = true;
    for (std::uint64_t loop = 0; going && (loops == 0 || loop < loops); ++loop) {
        // The trace begins with nothing mapped.
        if (loop > 0)
            going = replay(everything, loop - 1);
        for (auto change = plan.changes.begin(); going && change != plan.changes.end(); ++change)
            going = replay(*change, loop);
    }
    pump([&] { return unmaps_.empty() && maps_.empty(); });
}

// False: the devices are to stop.
bool Mapper::replay(const MapChange &change, std::uint64_t loop)
{
    if (!await_turn(change, loop))
        return false;
    if (change.map)
        map(change);
    else
        unmap(change);
    return true;
}

bool Mapper::await_turn(const MapChange &change, std::uint64_t loop)
{
    const std::uint64_t due = shared_.control.start_ns + replay_ns(shared_.options, shared_.plan, loop, change.time_us);
    pump([&] { return stopping() || now_ns() >= due; }, due);
    if (!change.map) {
        const std::uint64_t accesses = loop * shared_.plan.accesses.size() + change.accesses_before;
        pump([&] { return stopping() || accesses_done(accesses); });
    }
    pump([&] { return stopping() || !overlaps_unmap(change); });
    return !stopping();
}

bool Mapper::accesses_done(std::uint64_t first) const
{
    const unsigned devices = shared_.options.devices;
    for (unsigned d = 0; d < devices; ++d)
        if (shared_.control.accesses_done[d].value.load(std::memory_order_seq_cst) < share(first, d, devices))
            return false;
    return true;
}

bool Mapper::overlaps_unmap(const MapChange &change) const
{
    const std::uint64_t end = end_of(change.iova, change.length);
    return std::any_of(unmaps_.begin(), unmaps_.end(),
                       [&](const Unmap &u) { return u.iova < end && change.iova < end_of(u.iova, u.length); });
}

void Mapper::map(const MapChange &change)
{
    if (meanings_ != nullptr) {
        const std::lock_guard lock(meanings_->mutex);
        meanings_->map.map(change.iova, change.length, change.oa);
    }
    const std::uint64_t id = maps_done_ + maps_.size();
    maps_.push_back({change.line, false});
    queue([&] { return guest_.queue_map(ioas_, change.iova, change.length, change.oa, map_flags, tag(id, true)); });
}

void Mapper::unmap(const MapChange &change)
{
    const std::uint64_t id = next_unmap_++;
    unmaps_.push_back({.id = id, .iova = change.iova, .length = change.length, .line = change.line});
    queue([&] { return guest_.queue_unmap(ioas_, change.iova, change.length, unmap_flags, tag(id, false)); });
}

// Queues a command, as soon as there is room for it.
template <class Queue> void Mapper::queue(Queue command)
{
    bool queued = false;
    pump([&] { return queued || (queued = try_queue(command())); });
}

// Submits and reaps until done() or the deadline, asleep while there is nothing to reap. If it is done already, what is
// queued stays queued: commands go out in batches.
template <class Done> void Mapper::pump(Done done, std::uint64_t deadline_ns)
{
    const Bell &bell = shared_.mapper_bell;
    while (!done()) {
        const std::uint64_t retry_at = retry();
        must(guest_.submit(), "cannot submit map changes");
        if (reap())
            continue;
        bell.arm();
        if (!guest_.command_arm() || done())
            continue;
        const auto [called, gone] = bell.sleep(std::min(deadline_ns, retry_at), {guest_.command_fd(), guest_.socket()});
        std::uint64_t calls = 0;
        if (called && ::read(guest_.command_fd(), &calls, sizeof calls) < 0 && errno != EAGAIN)
            throw system_failure("the call of the command ring");
        if (gone)
            must(guest_.reconnect());
    }
}

// Goes on with unmaps that met a full ring, where it is time. Returns when the next one is.
std::uint64_t Mapper::retry()
{
    std::uint64_t next = never;
    for (Unmap &u : unmaps_) {
        if (u.retry_ns == 0)
            continue;
        const std::uint64_t rest = u.length == UINT64_MAX ? UINT64_MAX : u.length - u.done;
        if (now_ns() >= u.retry_ns &&
            try_queue(guest_.queue_unmap(ioas_, u.iova + u.done, rest, unmap_flags, tag(u.id, false))))
            u.retry_ns = 0;
        else
            next = std::min(next, u.retry_ns);
    }
    return next;
}

// False: nothing had completed.
bool Mapper::reap()
{
    std::array<dr_completion, 64> completions;
    const std::uint32_t count = guest_.reap(completions.data(), completions.size());
    for (std::uint32_t i = 0; i < count; ++i) {
        if ((completions[i].user_data & 1) != 0)
            complete_map(completions[i]);
        else
            complete_unmap(completions[i]);
    }
    return count != 0;
}

// Maps of different slices may complete in any order; the devices are told how many have in the trace's.
void Mapper::complete_map(const dr_completion &completion)
{
    Map &map = maps_.at((completion.user_data >> 1) - maps_done_);
    if (completion.result < 0)
        throw Failure(fmt::format("the map of line {} of {} was refused: {}", map.line, shared_.options.trace,
                                  std::strerror(-completion.result)));
    map.done = true;
    while (!maps_.empty() && maps_.front().done) {
        maps_.pop_front();
        ++maps_done_;
    }
    shared_.control.maps_done.value.store(maps_done_, std::memory_order_seq_cst);
    shared_.ring_devices();
}

void Mapper::complete_unmap(const dr_completion &completion)
{
    const auto it =
        std::find_if(unmaps_.begin(), unmaps_.end(), [&](const Unmap &u) { return u.id == completion.user_data >> 1; });
    if (it == unmaps_.end())
        throw Failure("the service completed an unmap that it was not asked for");
    if (meanings_ != nullptr) {
        const std::lock_guard lock(meanings_->mutex);
        meanings_->map.unmapped(it->iova + it->done, completion.done, completion.epoch);
    }
    if (completion.result == -EAGAIN) {
        it->done += completion.done;
        it->retry_ns = now_ns() + retry_pause_ns;
        return;
    }
    if (completion.result < 0)
        throw Failure(fmt::format("the unmap of line {} of {} was refused: {}", it->line, shared_.options.trace,
                                  std::strerror(-completion.result)));
    unmaps_.erase(it);
}

} // namespace dirtyring::migrate
