// A walker: one lcore that owns agents, which are shards and the command rings of the guests whose home it is.
//
// do_work() goes once round all agents and never waits. When a while has brought nothing the walker climbs down the
// idle ladder: spin with pauses, then sleep until a peer rings, a task comes, or an agent's time is up.
//
// An agent that has nothing to do while others keep the walker awake naps: it asks its peers to ring, as before a
// sleep, and is not looked at until one does. So guests that do nothing cost their neighbours a look at a word or two,
// however many they are.
#pragma once

#include "service/engine/agent.hpp"
#include "service/walkers/inbox.hpp"
#include "service/walkers/uring.hpp"

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace dirtyring::service {

std::uint64_t monotonic_ns();

class Walker
{
  public:
    Walker();

    // Its tasks are run between two rounds.
    [[nodiscard]] Inbox &inbox() { return inbox_; }

    // The lcore's loop, until stop().
    void run();
    // From any thread.
    void stop();

    // ---- on the walker's own thread ----

    bool do_work(std::uint64_t now_ns);

    // A peer's write to `doorbell` ends the walker's sleep.
    void adopt(Agent &agent, int doorbell);
    void drop(Agent &agent);

    // Calls a peer; never blocks. Sent at the end of the round, or by flush().
    void call(int eventfd) { uring_.write_eventfd(eventfd, 0); }
    void flush() { uring_.submit(); }

  private:
    struct Owned {
        Agent *agent;
        std::uint64_t bell;
        std::uint64_t worked_ns;    // when it had work
        std::uint64_t until_ns = 0; // it naps
    };
    struct Flock {
        std::vector<Owned> awake;
        std::vector<Owned> napping;
        // Of those that nap:
        bool stirred = false;                // one was given something
        std::uint64_t until_ns = UINT64_MAX; // one wants to be looked at
    };

    Flock &flock_of(const Agent &agent) { return flocks_[agent.turn() == Agent::Turn::first ? 0 : 1]; }
    static bool visit(Flock &flock, std::uint64_t now_ns);
    static bool nap(Flock &flock, std::size_t which, std::uint64_t now_ns);
    template <class Which> static void wake(Flock &flock, Which which);
    static Rest rest(Flock &flock, std::uint64_t now_ns);
    std::uint64_t watch(int fd);
    void unwatch(std::uint64_t bell);
    void reap();
    void sleep(std::uint64_t now_ns);

    Inbox inbox_;
    Uring uring_{256};
    std::map<std::uint64_t, int> bells_; // by user_data; an id is never used again
    std::uint64_t next_bell_ = 1;
    std::array<Flock, 2> flocks_; // by turn
    std::atomic<bool> stopping_{false};
};

} // namespace dirtyring::service
