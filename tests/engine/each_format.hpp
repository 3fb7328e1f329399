// Tests that run over each format: a suite derives from EachFormat, uses TEST_P, and says EACH_FORMAT(suite).
#pragma once

#include "tests/engine/rig.hpp"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace dirtyring::test {

// While it lives, its format is that of every Rig that asks for none.
class EachFormat : public testing::TestWithParam<unsigned>
{
  protected:
    EachFormat() { default_format = GetParam(); }
    ~EachFormat() override { default_format = iommu::AmdV1::id; }
};

inline std::vector<unsigned> all_formats()
{
    std::vector<unsigned> ids;
    iommu::for_each_format([&](auto f) { ids.push_back(f.id); });
    return ids;
}

inline std::string name_of_format(unsigned format)
{
    return iommu::with_format(format, [](auto f) { return f.name; });
}

// Does a tracked hwpt of the default format have its devices set D from the start?
inline bool always_on()
{
    return iommu::with_format(default_format, [](auto f) { return bool{f.always_on}; });
}

#define EACH_FORMAT(suite)                                                     \
    INSTANTIATE_TEST_SUITE_P(Formats, suite, testing::ValuesIn(all_formats()), \
                             [](const auto &info) { return name_of_format(info.param); })

} // namespace dirtyring::test
