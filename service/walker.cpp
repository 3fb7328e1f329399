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
            sleep(now);
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
    worked |= visit(commands_, now_ns);
    worked |= visit(shards_, now_ns);
    uring_.submit();
    reap();
    return worked;
}

template <class T> bool Walker::visit(Flock<T> &flock, std::uint64_t now_ns)
{
    if (flock.stirred || now_ns >= flock.until_ns)
        wake(flock, [&](const Owned<T> &o) { return o.item->stirred().is_set() || now_ns >= o.until_ns; });
    bool worked = false;
    for (std::size_t i = 0; i < flock.awake.size();) {
        Owned<T> &owned = flock.awake[i];
        if (work(*owned.item, now_ns)) {
            owned.worked_ns = now_ns;
            worked = true;
        } else if (now_ns >= owned.worked_ns + nap_after_ns && nap(flock, i, now_ns)) {
            continue; // another one is in its place
        }
        ++i;
    }
    return worked;
}

// False: it has something to do.
template <class T> bool Walker::nap(Flock<T> &flock, std::size_t which, std::uint64_t now_ns)
{
    Owned<T> &owned = flock.awake[which];
    const Rest rest = prepare_sleep(*owned.item, now_ns);
    if (rest.busy || owned.item->stirred().is_set()) {
        owned.item->wake();
        return false;
    }
    owned.item->stirred().report_to(&flock.stirred);
    owned.until_ns = rest.until_ns;
    flock.until_ns = std::min(flock.until_ns, rest.until_ns);
    flock.napping.push_back(owned);
    owned = flock.awake.back();
    flock.awake.pop_back();
    return true;
}

template <class T, class Which> void Walker::wake(Flock<T> &flock, Which which)
{
    flock.stirred = false;
    flock.until_ns = UINT64_MAX;
    std::erase_if(flock.napping, [&](const Owned<T> &o) {
        if (!which(o)) {
            flock.stirred |= o.item->stirred().is_set();
            flock.until_ns = std::min(flock.until_ns, o.until_ns);
            return false;
        }
        o.item->stirred().report_to(nullptr);
        o.item->wake();
        flock.awake.push_back(o);
        return true;
    });
}

template <class T> void Walker::ring(Flock<T> &flock, std::uint64_t bell)
{
    if (!fault(Fault::nap_ignores_bell))
        wake(flock, [&](const Owned<T> &o) { return o.bell == bell; });
}

template <class T> Rest Walker::rest(Flock<T> &flock, std::uint64_t now_ns)
{
    for (std::size_t i = 0; i < flock.awake.size();)
        i += nap(flock, i, now_ns) ? 0 : 1;
    return {.busy = !flock.awake.empty() || flock.stirred, .until_ns = flock.until_ns};
}

template <class T> void Walker::adopt(Flock<T> &flock, T &item, int doorbell)
{
    flock.awake.push_back({.item = &item, .bell = watch(doorbell), .worked_ns = monotonic_ns()});
}

template <class T> void Walker::drop(Flock<T> &flock, const T &item)
{
    wake(flock, [&](const Owned<T> &o) { return o.item == &item; });
    std::erase_if(flock.awake, [&](const Owned<T> &o) {
        if (o.item == &item)
            unwatch(o.bell);
        return o.item == &item;
    });
}

void Walker::adopt(Shard &shard, int doorbell)
{
    adopt(shards_, shard, doorbell);
}

void Walker::drop(Shard &shard)
{
    drop(shards_, shard);
}

void Walker::adopt(Commands &commands, int doorbell)
{
    adopt(commands_, commands, doorbell);
}

void Walker::drop(Commands &commands)
{
    drop(commands_, commands);
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
    uring_.reap([this](std::uint64_t bell, int /*result*/, unsigned flags) {
        const auto it = bells_.find(bell);
        if (it == bells_.end()) // a call to a peer, or a poll that was cancelled
            return;
        ring(shards_, bell);
        ring(commands_, bell);
        // A poll that ended by itself is made again: the completion queue overflowed, or the kernel had no memory for it. Whatever the
        // result: a bell that is not polled is a lost wake-up, and one that fails each time costs a look in each round.
        if ((flags & IORING_CQE_F_MORE) == 0)
            uring_.poll(it->second, bell);
    });
}

void Walker::sleep(std::uint64_t now_ns)
{
    const Rest shards = rest(shards_, now_ns);
    const Rest commands = rest(commands_, now_ns);
    if (inbox_.prepare_sleep() && !shards.busy && !commands.busy) {
        uring_.submit_and_wait(now_ns, std::min(shards.until_ns, commands.until_ns));
        reap();
    }
    inbox_.wake();
}

} // namespace dirtyring::service
