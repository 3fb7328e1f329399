// The rings that a service before has left in the store and that this one does not take up: of a guest that cannot be,
// whose VMM must not take their silence for cleanliness, or of an hwpt that was being destroyed, whose consumers wait
// for the end.
#pragma once

#include "ring/region.hpp"
#include "service/keeper/fd_store.hpp"

#include <cstdint>
#include <string>
#include <vector>

namespace dirtyring::service {

class RingsLeft
{
  public:
    // Of the guest, or of one of its hwpts. Nothing is taken out of the store. Nobody else writes into these rings.
    RingsLeft(const FdStore &store, std::uint32_t guest);
    RingsLeft(const FdStore &store, std::uint32_t guest, std::uint32_t hwpt);

    // Puts ALL_DIRTY into each ring that has room for it and can be made sense of, and calls. How many.
    unsigned mark_all_dirty() const;

    // Publishes what is staged in each ring, then END where there is room and it is not there yet, and calls each
    // consumer, whatever it has armed: a service before may have come to any of these steps. How many.
    unsigned end() const;

  private:
    struct Ring {
        ring::Fd producer;
        ring::Fd consumer;
        ring::Fd call;
    };

    // Calls with(ring), then the ring's consumer if it answered true. How many.
    template <class With> unsigned for_each(With with) const;
    // Those whose name begins so.
    RingsLeft(const FdStore &store, const std::string &prefix);

    std::vector<Ring> rings_;
};

} // namespace dirtyring::service
