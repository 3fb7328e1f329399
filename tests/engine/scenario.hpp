// What the scenarios of the negative controls have in common.
#pragma once

#include "tests/engine/rig.hpp"

#include <gtest/gtest.h>

namespace dirtyring::test {

struct Outcome {
    std::uint64_t lost = 0; // pages
    bool hung = false;
    [[nodiscard]] bool bad() const { return lost != 0 || hung; }
};

using Scenario = Outcome (*)();

constexpr std::uint64_t page0 = 0;
constexpr std::uint64_t large = 2 * MiB;

// All that was written is reported and copied, if the engine is sound.
inline Outcome judge(Rig &rig)
{
    if (rig.sync() != 0)
        return {rig.lost(), true};
    return {rig.lost(), false};
}

inline void prepare(Rig &rig)
{
    ASSERT_EQ(rig.map(0, 4 * MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
}

// pin_scenarios.cpp
Outcome published_while_pinned();
Outcome closed_while_pinning();
Outcome swept_while_pinned();
Outcome unpinned_while_asleep();
Outcome unmapped_while_pinned();
Outcome synced_while_pinned();
Outcome unpinned_before_summary();
Outcome died_with_pin();

} // namespace dirtyring::test
