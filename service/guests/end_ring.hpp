// The end of a ring whose producer has died within the DESTROY of its hwpt, as its successor puts it.
#pragma once

#include "ring/layout.h"
#include "ring/producer.hpp"

#include <cstdint>

namespace dirtyring::service {

using DirtyRing = ring::Producer<std::uint64_t>;

inline bool has_ended(const DirtyRing &ring)
{
    return ring.staged() > 0 && ring.last() == dr_marker(DR_MARKER_END, 0);
}

// Publishes what is staged, with END behind it unless that is there, or there is no room. Its consumer is to be called,
// whatever it has armed.
inline void end_ring(DirtyRing &ring)
{
    if (!has_ended(ring) && ring.room() > 0) {
        ring.put(0, dr_marker(DR_MARKER_END, 0));
        ring.stage(1);
    }
    static_cast<void>(ring.publish());
}

} // namespace dirtyring::service
