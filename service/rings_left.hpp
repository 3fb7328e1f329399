// The rings of a guest that a service before has left in the store: should the guest not be taken up, its VMM must not take their
// silence for cleanliness.
#pragma once

#include "ring/region.hpp"
#include "service/fd_store.hpp"

#include <cstdint>
#include <vector>

namespace dirtyring::service {

class RingsLeft
{
  public:
    // Nothing is taken out of the store.
    RingsLeft(const FdStore &store, std::uint32_t guest);

    // Puts ALL_DIRTY into each ring that has room for it and can be made sense of, and calls. How many. Without a service of this
    // guest nobody else writes there.
    unsigned mark_all_dirty() const;

  private:
    struct Ring {
        ring::Fd producer;
        ring::Fd consumer;
        ring::Fd call;
    };
    std::vector<Ring> rings_;
};

} // namespace dirtyring::service
