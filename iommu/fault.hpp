// Negative controls: each rule that keeps a dirty page from being lost can be broken on purpose, in test binaries only
// (DIRTYRING_FAULTS). tests/README.md names the test that goes red for each.
#pragma once

#if DIRTYRING_FAULTS
#include <atomic>
#include <functional>
#endif

namespace dirtyring {

enum class Fault {
    none,
    // device
    tag_after_walk,        // the IOTLB tag is loaded after the walk
    iotlb_across_regions,  // an IOTLB entry of a large leaf spans regions
    section_without_order, // entering a section is a release store
    leave_relaxed,         // leaving a section releases nothing
    summary_without_order, // the summary is set before D
    summary_shared,        // 1 GiB leaves of all shards share summary words
    no_doorbell,           // a sleeping walker is not rung
    section_over_io,       // a thread with a pin stays in its section
    pin_after_look,        // a slot is taken after the look at what is closed
    mark_before_data,      // D is set when a pin is taken, not when the data has landed
    no_pin_bell,           // a walker that waits for a pin is not rung
    // walker
    no_grace,               // publish at once
    publish_before_advance, // publish, then invalidate
    advance_plain,          // generations are advanced by load and store
    sample_before_advance,  // cells are sampled, then generations advanced
    no_leading_grace,       // a sync's pass begins at once
    unmap_without_grace,    // an unmap replies at once
    unmap_waits_for_room,   // an unmap waits for its consumer instead of answering AGAIN
    enable_without_advance, // enabling tracking leaves the IOTLBs alone
    no_full_scan_on_death,  // a dead device's half-made summary is trusted
    unmap_ignores_pins,     // an unmap does not wait for pins
    sync_ignores_pins,      // a sync does not wait for pins
    no_grace_after_pins,    // a sync's pass begins as soon as the pins are gone
    death_ignores_pins,     // what a dead device had pinned is not reported
    detach_stopped,         // a live device's cells are dropped by force
    no_want_kick,           // the walker sleeps before a full ring without asking for a kick
    no_second_look,         // the walker sleeps without looking again after setting its flag
    arm_without_look,       // the producer publishes without looking at the event index
};

// A place where a test may step in between two instructions of the protocol.
enum class Point {
    device_before_tag,
    device_between_dirty_and_summary,
    device_before_pin,
    walker_before_advance,
    walker_before_sleep,
};

#if DIRTYRING_FAULTS

inline std::atomic<Fault> active_fault{Fault::none};
inline bool fault(Fault f)
{
    return active_fault.load(std::memory_order_relaxed) == f;
}

inline std::function<void(Point)> at_point;
inline void point(Point p)
{
    if (at_point)
        at_point(p);
}

#else

constexpr bool fault(Fault)
{
    return false;
}
constexpr void point(Point) {}

#endif

} // namespace dirtyring
