#include "service/walker.hpp"

#include "service/commands.hpp"

#include <algorithm>
#include <ctime>
#include <rte_pause.h>

namespace dirtyring::service {

namespace {

// Longer than a round trip of a busy peer, shorter than a scheduler's tick.
constexpr std::uint64_t spin_ns = 50'000;

template <class List, class T> auto find_owned(List &list, const T &item)
{
    return std::find_if(list.begin(), list.end(), [&](const auto &o) { return o.item == &item; });
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
    for (const Owned<Commands> &c : commands_)
        worked |= c.item->poll();
    for (const Owned<Shard> &s : shards_)
        worked |= s.item->step(now_ns);
    uring_.submit();
    reap();
    return worked;
}

void Walker::adopt(Shard &shard, int doorbell)
{
    shards_.push_back({&shard, watch(doorbell)});
}

void Walker::drop(Shard &shard)
{
    const auto it = find_owned(shards_, shard);
    unwatch(it->bell);
    shards_.erase(it);
}

void Walker::adopt(Commands &commands, int doorbell)
{
    commands_.push_back({&commands, watch(doorbell)});
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
        // A poll that ended by itself (the completion queue overflowed) is made again.
        if (const auto it = bells_.find(bell); it != bells_.end() && (flags & IORING_CQE_F_MORE) == 0 && result >= 0)
            uring_.poll(it->second, bell);
    });
}

void Walker::rest(std::uint64_t now_ns)
{
    bool busy = false;
    std::uint64_t until_ns = UINT64_MAX;
    for (const Owned<Shard> &s : shards_) {
        const Rest r = s.item->prepare_sleep(now_ns);
        busy |= r.busy;
        until_ns = std::min(until_ns, r.until_ns);
    }
    for (const Owned<Commands> &c : commands_)
        busy |= !c.item->prepare_sleep();
    busy |= !inbox_.prepare_sleep();
    if (!busy) {
        uring_.submit_and_wait(now_ns, until_ns);
        reap();
    }
    inbox_.wake();
    for (const Owned<Commands> &c : commands_)
        c.item->wake();
    for (const Owned<Shard> &s : shards_)
        s.item->wake();
}

} // namespace dirtyring::service
