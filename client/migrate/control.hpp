// The control block: what the processes of a migration tell each other, in memory that the parent owns.
#pragma once

#include "client/migrate/options.hpp"
#include "ring/control.h"

#include <atomic>
#include <cstdint>

namespace dirtyring::migrate {

// In this order. The source moves on; the devices and the replay of maps follow.
enum class Phase : std::uint32_t {
    setting_up, // until the source has an hwpt
    attaching,  // until every device is attached
    running,    // devices write, the source copies
    stopping,   // devices stop at the end of a section; last copy
    finished,   // devices detach
};

// What a round sent, and what was reported meanwhile.
struct Round {
    std::uint64_t pages;
    std::uint64_t reported;
    std::uint64_t us;
};

// Changes all the time, so it lies on cache lines of its own.
struct alignas(DR_LINE_PAIR) Count {
    std::atomic<std::uint64_t> value;
};

struct Control {
    // All down to the flags of the bells is waited for under a Bell, hence seq_cst; each release-acquire pair it forms
    // carries what is said below.
    Count maps_done;                  // of the trace, in order
    Count accesses_done[devices_max]; // of the trace, by each device
    // One total order of writes (stamped by devices) and reports (stamped by the source): see journal.hpp.
    Count tick;
    std::atomic<Phase> phase;
    std::atomic<std::uint32_t> attached; // devices now attached
    std::atomic<std::uint32_t> stopped;  // devices that will write no more

    // Flags of the bells.
    std::atomic<std::uint32_t> source_asleep;
    std::atomic<std::uint32_t> mapper_asleep;
    std::atomic<std::uint32_t> device_asleep[devices_max];

    // The first failure. Whoever turns `failure` from 0 to 1 writes the sentence and stores 2 (release; the parent
    // acquires).
    std::atomic<std::uint32_t> failure;
    char sentence[1024];

    // Stored by the source before it moves on to `attaching`; read by the devices after they saw that.
    std::uint8_t token[DR_TOKEN_BYTES];
    std::uint32_t hwpt;
    // The same for `running`: when time 0 of the devices' load was, CLOCK_MONOTONIC.
    std::uint64_t start_ns;

    // With --kill-service: when a worker was last killed, stored once it is dead (release), when the source had the
    // first run of its successor, and when it had the last run of all. CLOCK_MONOTONIC; 0: not yet.
    std::atomic<std::uint64_t> killed_ns;
    std::atomic<std::uint64_t> back_ns;
    std::atomic<std::uint64_t> reported_ns;
    std::atomic<std::uint64_t> service_kills;

    // Statistics, by the source for the parent: relaxed while it runs, exact once it has ended. rounds_done is stored
    // with release behind its round and loaded with acquire.
    std::atomic<std::uint64_t> pages_copied;
    std::atomic<std::uint64_t> pages_remaining;
    std::atomic<std::uint64_t> pages_reported;
    std::atomic<std::uint64_t> over_reported;
    std::atomic<std::uint64_t> runs_published;
    std::atomic<std::uint64_t> runs_while_writing;
    std::atomic<std::uint64_t> pages_gone;     // in runs that came again when what they name was unmapped
    std::atomic<std::uint64_t> longest_gap_ns; // from a kill to back_ns
    std::atomic<std::uint64_t> bytes_sent;
    std::atomic<std::uint64_t> link_rate; // bytes/s
    std::atomic<std::uint64_t> total_ns;
    std::atomic<std::uint64_t> downtime_ns;
    std::atomic<std::uint32_t> converged; // 1: stopped because the rest fitted the downtime limit
    std::atomic<std::uint32_t> rounds_done;
    Round rounds[rounds_max];
};

inline std::uint64_t next_tick(Control &control)
{
    return control.tick.value.fetch_add(1, std::memory_order_seq_cst) + 1;
}

inline Phase phase(const Control &control)
{
    return control.phase.load(std::memory_order_seq_cst);
}

static_assert(std::atomic<std::uint64_t>::is_always_lock_free, "atomics lie in shared memory");

// Of a statistic of Control.
inline std::uint64_t load(const std::atomic<std::uint64_t> &statistic)
{
    return statistic.load(std::memory_order_relaxed);
}

} // namespace dirtyring::migrate
