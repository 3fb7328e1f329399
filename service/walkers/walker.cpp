#include "service/walkers/walker.hpp"

#include "iommu/rules.hpp"

#include <algorithm>
#include <ctime>
#include <rte_pause.h>

namespace dirtyring::service {

namespace {

// Longer than a round trip of a busy peer, shorter than a scheduler's tick.
constexpr std::uint64_t spin_ns = 50'000;

// Who rings pays a system call: a device that writes more often than this pays none.
constexpr std::uint64_t nap_after_ns = 1'000'000;

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
    inbox_.post(nothing);
}

bool Walker::do_work(std::uint64_t now_ns)
{
    bool worked = inbox_.drain();
    for (Flock &flock : flocks_)
        worked |= visit(flock, now_ns);
    uring_.submit();
    reap();
    return worked;
}

bool Walker::visit(Flock &flock, std::uint64_t now_ns)
{
    if (flock.stirred || now_ns >= flock.until_ns)
        wake(flock, [&](const Owned &o) { return o.agent->stirred().is_set() || now_ns >= o.until_ns; });
    bool worked = false;
    for (std::size_t i = 0; i < flock.awake.size();) {
        Owned &owned = flock.awake[i];
        if (owned.agent->step(now_ns)) {
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
bool Walker::nap(Flock &flock, std::size_t which, std::uint64_t now_ns)
{
    Owned &owned = flock.awake[which];
    const Rest rest = owned.agent->prepare_sleep(now_ns);
    if (rest.busy || owned.agent->stirred().is_set()) {
        owned.agent->wake();
        return false;
    }
    owned.agent->stirred().report_to(&flock.stirred);
    owned.until_ns = rest.until_ns;
    flock.until_ns = std::min(flock.until_ns, rest.until_ns);
    flock.napping.push_back(owned);
    owned = flock.awake.back();
    flock.awake.pop_back();
    return true;
}

template <class Which> void Walker::wake(Flock &flock, Which which)
{
    flock.stirred = false;
    flock.until_ns = UINT64_MAX;
    std::erase_if(flock.napping, [&](const Owned &o) {
        if (!which(o)) {
            flock.stirred |= o.agent->stirred().is_set();
            flock.until_ns = std::min(flock.until_ns, o.until_ns);
            return false;
        }
        o.agent->stirred().report_to(nullptr);
        o.agent->wake();
        flock.awake.push_back(o);
        return true;
    });
}

Rest Walker::rest(Flock &flock, std::uint64_t now_ns)
{
    for (std::size_t i = 0; i < flock.awake.size();)
        i += nap(flock, i, now_ns) ? 0 : 1;
    return {.busy = !flock.awake.empty() || flock.stirred, .until_ns = flock.until_ns};
}

void Walker::adopt(Agent &agent, int doorbell)
{
    flock_of(agent).awake.push_back({.agent = &agent, .bell = watch(doorbell), .worked_ns = monotonic_ns()});
}

void Walker::drop(Agent &agent)
{
    Flock &flock = flock_of(agent);
    wake(flock, [&](const Owned &o) { return o.agent == &agent; });
    std::erase_if(flock.awake, [&](const Owned &o) {
        if (o.agent == &agent)
            unwatch(o.bell);
        return o.agent == &agent;
    });
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
        if (!broken(Rule::nap_ignores_bell)) {
            for (Flock &flock : flocks_)
                wake(flock, [&](const Owned &o) { return o.bell == bell; });
        }
        // A poll that ended by itself is made again: the completion queue overflowed, or the kernel had no memory for
        // it. Whatever the result: a bell that is not polled is a lost wake-up, and one that fails each time costs a
        // look in each round.
        if ((flags & IORING_CQE_F_MORE) == 0)
            uring_.poll(it->second, bell);
    });
}

void Walker::sleep(std::uint64_t now_ns)
{
    Rest all;
    for (Flock &flock : flocks_) {
        const Rest one = rest(flock, now_ns);
        all.busy |= one.busy;
        all.until_ns = std::min(all.until_ns, one.until_ns);
    }
    if (inbox_.prepare_sleep() && !all.busy) {
        uring_.submit_and_wait(now_ns, all.until_ns);
        reap();
    }
    inbox_.wake();
}

} // namespace dirtyring::service
