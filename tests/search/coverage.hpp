// What has met what: each event, and how the world stood when it came. The counts lie in memory that processes share.
#pragma once

#include "iommu/rules.hpp"

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace dirtyring::search {

// clang-format off
#define DIRTYRING_EVENTS(X) \
    X(map_begins) X(map_done) X(map_refused) X(unmap_now) X(unmap_deferred) X(unmap_discard) X(unmap_done) \
    X(unmap_refused) X(unmap_again) X(split_begins) X(split_done) X(collapse_begins) X(collapse_done) \
    X(resize_refused) X(enable_begins) X(enable_done) X(enable_refused) X(disable_begins) X(disable_done) \
    X(disable_refused) X(sync_begins) X(sync_done) X(sync_refused) X(cancelled) X(destroy_recorded) \
    X(destroy_unrouted) X(destroy_cancelled) X(destroy_done) X(hwpt_made) X(attach_begins) X(attach_shard) \
    X(attach_done) X(attach_refused) X(detach_begins) X(detach_shard) X(detach_done) X(bury_shard) \
    X(bury_reported) X(made_large) X(service_dies) X(service_returns) X(home_returns) X(device_writes) \
    X(device_reads) X(device_faults) X(device_stalls) X(device_dies) X(device_dies_marking) X(pin_taken) \
    X(pin_closed) X(pin_landed) X(pin_given_back) X(shard_sleeps) X(shard_wakes) X(consumer_sleeps) \
    X(consumer_called) X(vmm_sleeps) X(vmm_called)
// clang-format on

enum class Event {
#define X(name) name,
    DIRTYRING_EVENTS(X)
#undef X
};

// clang-format off
#define DIRTYRING_STATES(X) \
    X(off) X(enabling) X(on) X(disabling) X(empty) X(map_begun) X(mapped) X(unmapping) X(resizing) X(breaking) \
    X(retired) X(map_out) X(unmap_now_out) X(unmap_deferred_out) X(unmap_discard_out) X(pinned_unmap_out) \
    X(split_out) X(collapse_out) X(enable_out) X(disable_out) X(sync_out) X(destroying) X(bury_owed) \
    X(attaching) X(first_life) X(not_begun_again) X(later_life)
// clang-format on

enum class State {
#define X(name) name,
    DIRTYRING_STATES(X)
#undef X
};

class Coverage
{
  public:
    static constexpr std::size_t events = 0
#define X(name) +1
        DIRTYRING_EVENTS(X)
#undef X
        ;
    static constexpr std::size_t states = 0
#define X(name) +1
        DIRTYRING_STATES(X)
#undef X
        ;
    static constexpr std::size_t points = 0
#define X(name) +1
        DIRTYRING_POINTS(X)
#undef X
        ;

    Coverage();
    Coverage(const Coverage &) = delete;
    ~Coverage();

    static constexpr std::uint64_t bit(State s)
    {
        return 1ull << static_cast<unsigned>(s);
    }
    void met(Event e, std::uint64_t states)
    {
        count(static_cast<std::size_t>(e), states);
    }
    // The service died there.
    void died(Point p, std::uint64_t states)
    {
        count(events + static_cast<std::size_t>(p), states);
    }

    // The table, and the pairs that never met; of these `unreachable` explains some, a line each: event, state, reason.
    // False: one of those has met.
    [[nodiscard]] bool print(const std::string &unreachable) const;

  private:
    void count(std::size_t row, std::uint64_t states);

    std::atomic<std::uint32_t> *counts_; // by row and state; the last column: the event by itself
};

} // namespace dirtyring::search
