#include "service/walker.hpp"

#include "iommu/fault.hpp"
#include "service/commands.hpp"

#include <algorithm>
#include <ctime>
#include <rte_pause.h>

namespace dirtyring::service {

namespace {

// Longer than a round trip of a busy peer, shorter than a scheduler's tick.
constexpr std::uint64_t spin_ns = 50'000;

// Who rings pays a system call: a device that writes more often than this pays none.
constexpr std::uint64_t nap_after_ns = 1'000'000;

template <class List, class T> auto find_owned(List &list, const T &item)
{
    return std::find_if(list.begin(), list.end(), [&](const auto &o) { return o.item == &item; });
}

bool work(Shard &shard, std::uint64_t now_ns)
{
    return shard.step(now_ns);
}
bool work(Commands &commands, std::uint64_t)
{
    return commands.poll();
}

Rest prepare_sleep(Shard &shard, std::uint64_t now_ns)
{
    return shard.prepare_sleep(now_ns);
}
Rest prepare_sleep(Commands &commands, std::uint64_t)
{
    return {.busy = !commands.prepare_sleep()};
}

} // namespace

std::uint64_t monotonic_ns()
{
    timespec now{};
    ::clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(now.tv_nsec);
}

Walker::Walker()
{
    watch(inbox_.fd());
}

void Walker::run()
{
    std::uint64_t last_work = monotonic_ns();
    while (!stopping_.load(std::memory_order_acquire)) { // pairs with stop(): what was posted before it is seen
        const std::uint64_t now = monotonic_ns();
        if (do_work(now))
            last_work = now;
        else if (now - last_work < spin_ns)
            rte_pause();
        else
            rest(now);
    }
    inbox_.drain();
}

void Walker::stop()
{
    struct Nothing final : Task {
        void run() override {}
    };
    static Nothing nothing;
    stopping_.store(true, std::memory_order_release); // pairs with run()
    post(nothing);
}

bool Walker::do_work(std::uint64_t now_ns)
{
    bool worked = inbox_.drain();
    for (Owned<Commands> &c : commands_)
        worked |= visit(c, now_ns);
    for (Owned<Shard> &s : shards_)
        worked |= visit(s, now_ns);
    uring_.submit();
    reap();
    return worked;
}

template <class T> bool Walker::visit(Owned<T> &owned, std::uint64_t now_ns)
{
    if (owned.naps) {
        if (now_ns < owned.until_ns && !owned.item->stirred())
            return false;
        wake(owned);
    }
    if (work(*owned.item, now_ns)) {
        owned.worked_ns = now_ns;
        return true;
    }
    if (now_ns >= owned.worked_ns + nap_after_ns)
        nap(owned, now_ns);
    return false;
}

template <class T> void Walker::nap(Owned<T> &owned, std::uint64_t now_ns)
{
    const Rest rest = prepare_sleep(*owned.item, now_ns);
    if (rest.busy)
        return owned.item->wake();
    owned.naps = true;
    owned.until_ns = rest.until_ns;
}

template <class T> void Walker::wake(Owned<T> &owned)
{
    owned.naps = false;
    owned.item->wake();
}

template <class T> void Walker::wake_whose(std::vector<Owned<T>> &list, std::uint64_t bell)
{
    for (Owned<T> &o : list) {
        if (o.bell == bell && o.naps && !fault(Fault::nap_ignores_bell))
            wake(o);
    }
}

template <class T> Rest Walker::nap_all(std::vector<Owned<T>> &list, std::uint64_t now_ns)
{
    Rest rest;
    for (Owned<T> &o : list) {
        if (!o.naps)
            nap(o, now_ns);
        rest.busy |= !o.naps || o.item->stirred();
        rest.until_ns = std::min(rest.until_ns, o.until_ns);
    }
    return rest;
}

void Walker::adopt(Shard &shard, int doorbell)
{
    shards_.push_back({.item = &shard, .bell = watch(doorbell), .worked_ns = monotonic_ns()});
}

void Walker::drop(Shard &shard)
{
    const auto it = find_owned(shards_, shard);
    unwatch(it->bell);
    shards_.erase(it);
}

void Walker::adopt(Commands &commands, int doorbell)
{
    commands_.push_back({.item = &commands, .bell = watch(doorbell), .worked_ns = monotonic_ns()});
}

void Walker::drop(Commands &commands)
{
    const auto it = find_owned(commands_, commands);
    unwatch(it->bell);
    commands_.erase(it);
}

std::uint64_t Walker::watch(int fd)
{
    const std::uint64_t bell = next_bell_++;
    bells_.emplace(bell, fd);
    uring_.poll(fd, bell);
    return bell;
}

void Walker::unwatch(std::uint64_t bell)
{
    bells_.erase(bell);
    uring_.cancel_poll(bell, 0);
    uring_.submit();
}

void Walker::reap()
{
    uring_.reap([this](std::uint64_t bell, int result, unsigned flags) {
        const auto it = bells_.find(bell);
        if (it == bells_.end()) // a call to a peer, or a poll that was cancelled
            return;
        wake_whose(shards_, bell);
        wake_whose(commands_, bell);
        // A poll that ended by itself (the completion queue overflowed) is made again.
        if ((flags & IORING_CQE_F_MORE) == 0 && result >= 0)
            uring_.poll(it->second, bell);
    });
}

void Walker::rest(std::uint64_t now_ns)
{
    const Rest shards = nap_all(shards_, now_ns);
    const Rest commands = nap_all(commands_, now_ns);
    if (inbox_.prepare_sleep() && !shards.busy && !commands.busy) {
        uring_.submit_and_wait(now_ns, shards.until_ns);
        reap();
    }
    inbox_.wake();
}

} // namespace dirtyring::service
