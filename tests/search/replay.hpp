// A schedule that the search has found, as a test: nothing goes wrong in it any more, unless its rule is broken again.
#pragma once

#include "tests/engine/hook.hpp"
#include "tests/search/isolated.hpp"

#include <gtest/gtest.h>

#include <utility>
#include <vector>

namespace dirtyring::search {

// rule: Rule::none if there is none whose break shows it.
inline void replay(Rule rule, Schedule::Step attributes, std::vector<Schedule::Step> steps)
{
    Coverage coverage;
    const Schedule schedule{std::move(attributes), std::move(steps)};
    const Result mended = run_isolated(Choices(schedule), coverage);
    EXPECT_FALSE(mended.finding) << mended.finding->kind << ": " << mended.finding->text;
    if (rule == Rule::none)
        return;
    const test::Breaking breaking(rule);
    EXPECT_TRUE(run_isolated(Choices(schedule), coverage).finding) << "the schedule shows nothing any more";
}

} // namespace dirtyring::search
