// Negative controls: each rule that keeps a dirty page from being lost can be broken on purpose, in test binaries only
// (DIRTYRING_BREAKABLE). tests/README.md names the test that goes red for each.
#pragma once

#if DIRTYRING_BREAKABLE
#include <atomic>
#include <functional>
#endif

namespace dirtyring {

// Each rule has the name of what is done instead.
// clang-format off
#define DIRTYRING_RULES(X) \
    /* device */ \
    X(tag_after_walk) /* the IOTLB tag is loaded after the walk */ \
    X(iotlb_across_regions) /* an IOTLB entry of a large leaf spans regions */ \
    X(section_without_order) /* entering a section is a release store */ \
    X(leave_relaxed) /* leaving a section releases nothing */ \
    X(summary_without_order) /* the summary is set before D */ \
    X(summary_shared) /* 1 GiB leaves of all shards share summary words */ \
    X(no_doorbell) /* a sleeping walker is not rung */ \
    X(section_over_io) /* a thread with a pin stays in its section */ \
    X(pin_after_look) /* a slot is taken after the look at what is closed */ \
    X(mark_before_data) /* D is set when a pin is taken, not when the data has landed */ \
    X(no_pin_bell) /* a walker that waits for a pin is not rung */ \
    /* walker */ \
    X(no_grace) /* publish at once */ \
    X(publish_before_advance) /* publish, then invalidate */ \
    X(advance_plain) /* generations are advanced by load and store */ \
    X(sample_before_advance) /* cells are sampled, then generations advanced */ \
    X(no_leading_grace) /* a sync's pass begins at once */ \
    X(unmap_without_grace) /* an unmap replies at once */ \
    X(unmap_waits_for_room) /* an unmap waits for its consumer instead of answering AGAIN */ \
    X(enable_without_advance) /* enabling tracking leaves the IOTLBs alone */ \
    X(cleaned_for_good) /* a device that dies while ENABLE cleans owes no pass */ \
    X(epoch_at_submission) /* whether an unmap has an epoch is decided before it begins */ \
    X(unmap_passes_enable) /* an unmap of which a slice was not reported goes on where dirt is reported */ \
    X(no_full_scan_on_death) /* a dead device's half-made summary is trusted */ \
    X(unmap_ignores_pins) /* an unmap does not wait for pins */ \
    X(sync_ignores_pins) /* a sync does not wait for pins */ \
    X(no_grace_after_pins) /* a sync's pass begins as soon as the pins are gone */ \
    X(death_ignores_pins) /* what a dead device had pinned is not reported */ \
    X(death_skips_begun) /* nor what it had pinned of a map that a restart has interrupted */ \
    X(detach_stopped) /* a live device's cells are dropped by force */ \
    X(no_want_kick) /* the walker sleeps before a full ring without asking for a kick */ \
    X(no_second_look) /* the walker sleeps without looking again after setting its flag */ \
    X(nap_ignores_bell) /* a walker that is awake does not heed the bell of a shard that naps */ \
    X(arm_without_look) /* the producer publishes without looking at the event index */ \
    X(clear_before_stage) /* D is cleared, then the run staged */ \
    X(take_before_stage) /* leaves are unmapped, then what was dirty staged */ \
    X(split_drops_dirty) /* a leaf that is split is taken for clean */ \
    X(naive_replicated_split) /* a part of a replicated leaf that is split is as dirty as its own replica was */ \
    X(replica_reported_alone) /* a dirty replica reports what its entry spans */ \
    X(resized_not_summarized) /* what a resize makes dirty is not summarized */ \
    X(resized_behind_pass) /* a pass goes on though a resize has moved D to where it has been */ \
    X(break_taken_for_fault) /* a device that finds no entry does not ask whether it is being replaced */ \
    X(collapse_cuts_leaf) /* a collapse that begins in a leaf makes two of it in the record */ \
    X(collapse_goes_on) /* a collapse goes on though dirt is reported again */ \
    X(naive_collapse) /* the leaves of a table that is collapsed are not read again after the grace */ \
    /* restart */ \
    X(restart_without_advance) /* what devices have cached is left alone */ \
    X(restart_without_scan) /* the summary is trusted */ \
    X(restart_without_call) /* consumers are not called */ \
    X(restart_opens_early) /* what was closed can be pinned before everything is advanced */ \
    X(closes_for_devices_only) /* an unmap that begins while no device can pin leaves its range open */ \
    X(resumed_map_not_scanned) /* what devices wrote through a map before it was interrupted is left to the summary */ \
    X(failed_map_not_scanned) /* the same, of a map that is done again in vain, is left to its roll-back */ \
    X(failed_map_is_whole) /* nor does the record say that it is not whole */ \
    X(sync_marks_again) /* a sync that a restart does again waits for room, though its marker is there */ \
    X(cut_not_noted) /* an unmap that ended for want of room goes on after a restart, behind its marker */ \
    X(commands_not_recorded) /* a command that is taken is not recorded before it is begun */ \
    X(no_lock) /* a guest is taken up though another worker has it */ \
    X(present_forgotten) /* which tables have memory is forgotten */ \
    X(relinked_at_once) /* a table is linked where devices may have found a leaf, without a grace period */ \
    X(collapse_forgotten) /* a collapse that the end of reporting began is not gone on with */ \
    X(sync_takes_last_slot) /* a sync leaves no slot for the marker of an unmap that is done again */ \
    X(leaf_left_in_part) /* an unmap that finds no room leaves replicas out that a death had taken out */ \
    X(hole_not_counted) /* an unmap that finds no room behind a hole answers that it came to the hole only */ \
    X(taken_out_stays_mapped) /* an unmap that ends before reporting does not count what a death had it take out */ \
    X(split_raises_limit) /* a split makes leaves that are larger than the record says */ \
    X(due_marker_forgotten) /* an unmap begins though another, which is done again, owes its marker */ \
    X(begun_stays) /* a map that a restart has interrupted, and that is rolled back, is left as it is */ \
    X(takeover_wakes_nobody) /* a front-end's successor is given the guest, and nobody looks at its rings */ \
    X(destroy_not_ended) /* the rings of an hwpt whose DESTROY had begun are not ended */
// clang-format on

enum class Rule {
    none,
#define X(name) name,
    DIRTYRING_RULES(X)
#undef X
};

// A place where a test may step in between two instructions of the protocol, or a process die.
#define DIRTYRING_POINTS(X)             \
    X(device_before_tag)                \
    X(device_between_dirty_and_summary) \
    X(device_before_pin)                \
    X(walker_before_advance)            \
    X(walker_before_sleep)              \
    X(sweep_staged)                     \
    X(sweep_cleared)                    \
    X(sweep_advanced)                   \
    X(sweep_before_publish)             \
    X(sweep_published)                  \
    X(sync_marked)                      \
    X(map_recorded)                     \
    X(map_table_noted)                  \
    X(map_table_linked)                 \
    X(map_leaf_stored)                  \
    X(map_whole)                        \
    X(unmap_staged)                     \
    X(unmap_replica_taken)              \
    X(unmap_taken_out)                  \
    X(unmap_unlinked)                   \
    X(unmap_marked)                     \
    X(unmap_advanced)                   \
    X(unmap_forgotten)                  \
    X(leaf_seen)                        \
    X(split_broken)                     \
    X(split_replica)                    \
    X(split_replicas)                   \
    X(split_limited)                    \
    X(collapse_swapped)                 \
    X(collapse_read)                    \
    X(collapse_finished)                \
    X(enable_cleaning)                  \
    X(enable_cleaned)                   \
    X(enable_armed)                     \
    X(command_recorded)                 \
    X(command_taken)                    \
    X(command_begun)                    \
    X(command_done)                     \
    X(command_completed)                \
    X(object_stored)                    \
    X(object_recorded)                  \
    X(object_forgotten)                 \
    X(destroy_noted)                    \
    X(ring_ended)                       \
    X(death_marked)                     \
    X(restart_begun)                    \
    X(restart_locked)                   \
    X(restart_rebuilt)                  \
    X(restart_advanced)                 \
    X(restart_published)

enum class Point {
#define X(name) name,
    DIRTYRING_POINTS(X)
#undef X
};

#if DIRTYRING_BREAKABLE

inline std::atomic<Rule> broken_rule{Rule::none};
inline bool broken(Rule rule)
{
    return broken_rule.load(std::memory_order_relaxed) == rule;
}

inline std::function<void(Point)> at_point;
inline void point(Point p)
{
    if (at_point)
        at_point(p);
}

#else

constexpr bool broken(Rule)
{
    return false;
}
constexpr void point(Point) {}

#endif

} // namespace dirtyring
