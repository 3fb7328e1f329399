// A unit of work that a walker owns and steps: a shard, or a guest's command ring.
#pragma once

#include "service/engine/stir.hpp"

#include <cstdint>

namespace dirtyring::service {

// When a walker that sleeps must look at an agent again.
struct Rest {
    bool busy = false; // do not sleep
    std::uint64_t until_ns = UINT64_MAX;
};

// All of it is called on the walker's thread.
class Agent
{
  public:
    // Within a round those that hand out work come before those that do it.
    enum class Turn { first, second };

    explicit Agent(Turn turn) : turn_(turn) {}
    virtual ~Agent() = default;
    Agent(const Agent &) = delete;
    Agent &operator=(const Agent &) = delete;

    // Does a bounded piece of work; true if there was any. `now_ns`: CLOCK_MONOTONIC.
    virtual bool step(std::uint64_t now_ns) = 0;

    // Raises the flags that make peers wake the walker, and looks again (R4, R5, S5, P3). wake() lowers them.
    virtual Rest prepare_sleep(std::uint64_t now_ns) = 0;
    virtual void wake() = 0;

    // Since its last step its owner has given it something to do, or taken it away: it does not sleep on.
    [[nodiscard]] Stir &stirred() { return stirred_; }

    [[nodiscard]] Turn turn() const { return turn_; }

  protected:
    Stir stirred_;

  private:
    Turn turn_;
};

} // namespace dirtyring::service
