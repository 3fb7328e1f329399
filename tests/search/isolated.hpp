// A schedule in a process of its own, which may die of it.
#pragma once

#include "tests/search/coverage.hpp"
#include "tests/search/run.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace dirtyring::search {

struct Result {
    std::optional<Finding> finding;
    Schedule schedule; // as it was drawn, up to where it went wrong
    std::string attributes;
    std::vector<std::string> told; // of each step, if asked for
};

inline std::size_t steps_of(std::uint64_t seed)
{
    return 60 + seed % 7 * 50;
}

// Died of a signal: that is the finding, and the schedule is what had been drawn.
Result run_isolated(Choices choices, Coverage &coverage, bool telling = false);

// What the first that goes wrong of these seeds leads to: first, first + stride, … .
struct Hunt {
    std::uint64_t seed = 1;
    std::uint64_t schedules = UINT64_MAX; // at most
    double seconds = 1e9;                 // no new one is begun behind that
    unsigned jobs = 1;
    bool all = false; // tell each finding, and go on
    std::string only; // a kind of finding; others are passed over
};
struct Found {
    std::optional<std::uint64_t> seed;
    Finding finding;
    std::uint64_t schedules = 0; // run, all together
    double seconds = 0;
};
Found hunt(const Hunt &what, Coverage &coverage);

// As few steps and numbers as still lead to a finding of this kind; tries at most so often.
Schedule minimise(Schedule schedule, const std::string &kind, Coverage &coverage, unsigned tries);

} // namespace dirtyring::search
