// How threads of the service talk: tasks, handed over by pointer through Boost.Lockfree.
#pragma once

#include "ring/region.hpp"

#include <boost/lockfree/queue.hpp>

#include <atomic>
#include <cstdint>

namespace dirtyring::service {

struct Task {
    virtual void run() = 0; // on the receiving thread
  protected:
    ~Task() = default;
};

// Many producers, one consumer, which may sleep on fd().
class Inbox
{
  public:
    Inbox();

    // From any thread.
    void post(Task &task);

    // Runs what is there; true if there was any.
    bool drain();

    // True: nothing is there, and the next post will write to fd(). Nobody reads it: see Uring::poll().
    [[nodiscard]] bool prepare_sleep();
    void wake();
    [[nodiscard]] int fd() const { return event_.get(); }

  private:
    boost::lockfree::queue<Task *> queue_{256};
    // Store buffering, as with the flags of the rings: post counts then loads asleep_, the sleeper sets asleep_ then
    // looks at the count.
    std::atomic<std::uint64_t> posted_{0};
    std::atomic<bool> asleep_{false};
    std::uint64_t drained_ = 0;
    ring::Fd event_; // never handed out, so that writing it cannot block
};

} // namespace dirtyring::service
