// A schedule that the search has found, as a test: nothing may go wrong in it any more.
#pragma once

#include "tests/search/run.hpp"

#include <gtest/gtest.h>

#include <utility>
#include <vector>

namespace dirtyring::search {

inline std::optional<Finding> found_by(Schedule::Step attributes, std::vector<Schedule::Step> steps)
{
    Coverage coverage;
    Choices choices(Schedule{std::move(attributes), std::move(steps)});
    return Run(choices, coverage).run();
}

inline void replay(Schedule::Step attributes, std::vector<Schedule::Step> steps)
{
    const auto finding = found_by(std::move(attributes), std::move(steps));
    EXPECT_FALSE(finding) << finding->kind << ": " << finding->text;
}

} // namespace dirtyring::search
