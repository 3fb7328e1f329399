// A walker: an agent on one lcore that owns shards and polls the command rings of the guests whose home it is.
//
// do_work() goes once round everything it has and never waits. When a while has brought nothing it climbs down the idle ladder:
// spin with pauses, then sleep until a peer rings, a task comes, or a shard's time is up.
//
// What has nothing to do while others keep the walker awake naps: it asks its peers to ring, as before a sleep, and is not looked at
// until one does. So guests that do nothing cost their neighbours a look at a word or two, however many they are.
#pragma once

#include "service/inbox.hpp"
#include "service/shard.hpp"
#include "service/uring.hpp"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace dirtyring::service {

class Commands;

std::uint64_t monotonic_ns();

class Walker
{
  public:
    Walker();

    // From any thread: runs the task between two rounds.
    void post(Task &task) { inbox_.post(task); }

    // The lcore's loop, until stop().
    void run();
    // From any thread.
    void stop();

    // ---- on the walker's own thread ----

    bool do_work(std::uint64_t now_ns);

    // A peer's write to `doorbell` ends the walker's sleep.
    void adopt(Shard &shard, int doorbell);
    void drop(Shard &shard);
    void adopt(Commands &commands, int doorbell);
    void drop(Commands &commands);

    // Calls a peer; never blocks. Sent at the end of the round, or by flush().
    void call(int eventfd) { uring_.write_eventfd(eventfd, 0); }
    void flush() { uring_.submit(); }

  private:
    template <class T> struct Owned {
        T *item;
        std::uint64_t bell;
        std::uint64_t worked_ns;    // when it had work
        std::uint64_t until_ns = 0; // it naps
    };
    template <class T> struct Flock {
        std::vector<Owned<T>> awake;
        std::vector<Owned<T>> napping;
        // Of those that nap:
        bool stirred = false;                // one was given something
        std::uint64_t until_ns = UINT64_MAX; // one wants to be looked at
    };

    template <class T> void adopt(Flock<T> &flock, T &item, int doorbell);
    template <class T> void drop(Flock<T> &flock, const T &item);
    template <class T> static bool visit(Flock<T> &flock, std::uint64_t now_ns);
    template <class T> static bool nap(Flock<T> &flock, std::size_t which, std::uint64_t now_ns);
    template <class T, class Which> static void wake(Flock<T> &flock, Which which);
    template <class T> static void ring(Flock<T> &flock, std::uint64_t bell);
    template <class T> static Rest rest(Flock<T> &flock, std::uint64_t now_ns);
    std::uint64_t watch(int fd);
    void unwatch(std::uint64_t bell);
    void reap();
    void sleep(std::uint64_t now_ns);

    Inbox inbox_;
    Uring uring_{256};
    std::map<std::uint64_t, int> bells_; // by user_data; an id is never used again
    std::uint64_t next_bell_ = 1;
    Flock<Shard> shards_;
    Flock<Commands> commands_;
    std::atomic<bool> stopping_{false};
};

} // namespace dirtyring::service
