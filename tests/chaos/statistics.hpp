// What a run has done, for its summary.
#pragma once

#include "tests/chaos/options.hpp"
#include "tests/chaos/service.hpp"
#include "tests/chaos/shared.hpp"

#include <cstdint>
#include <map>
#include <vector>

namespace dirtyring::chaos {

struct Statistics {
    std::uint64_t service_kills = 0;
    std::uint64_t device_kills = 0;
    std::uint64_t vmm_kills = 0;
    std::uint64_t visitor_kills = 0;
    std::uint64_t vmm_leaves = 0;
    std::uint64_t stops = 0;
    std::uint64_t stalls = 0;                 // devices that held their guest up, and were named
    std::map<Point, std::uint64_t> points;    // kills there
    std::vector<std::uint64_t> restarts_ns;   // from a kill to the first sync that was asked for behind it
    std::vector<std::uint64_t> recoveries_ns; // to such a sync of every guest
    std::vector<std::int64_t> supervisor_kb;
    std::vector<std::int64_t> worker_kb;
};

void print_summary(const Shared &shared, Statistics statistics, double seconds);

// Throws a Failure if what the supervisor or its workers use has grown from restart to restart.
void expect_flat(const Statistics &statistics);

} // namespace dirtyring::chaos
