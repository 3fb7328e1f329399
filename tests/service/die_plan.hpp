// Where a service's worker is to kill itself, in a file that it and whoever disturbs it have mapped: each of its lives
// looks there at each point it passes, so the plan can be changed at any time.
#pragma once

#include <atomic>
#include <cstdint>

namespace dirtyring::test {

struct DiePlan {
    std::atomic<std::uint64_t> at;   // a Point + 1; 0: nowhere
    std::atomic<std::uint64_t> left; // it dies when it gets there for the time that brings this to 0
    std::atomic<std::uint64_t> died; // workers that have done so
};

} // namespace dirtyring::test
