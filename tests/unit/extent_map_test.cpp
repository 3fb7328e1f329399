// ExtentMap against a map of single pages.
#include "iommu/extent_map.hpp"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <map>
#include <tuple>
#include <vector>

namespace dirtyring::iommu {
namespace {

constexpr Rights rw{true, true};
constexpr Rights ro{true, false};

TEST(ExtentMap, CutsAtBorders)
{
    ExtentMap m;
    m.insert({10, 20, 110, rw});
    m.erase(13, 15);
    EXPECT_EQ(m.first_in(0, 100)->end, 13u);
    EXPECT_EQ(m.first_in(13, 100)->start, 15u);
    EXPECT_EQ(m.first_in(13, 100)->oa, 115u);
    EXPECT_FALSE(m.first_in(13, 15));
    EXPECT_FALSE(m.first_in(20, 100));
    m.erase(0, 100);
    EXPECT_TRUE(m.empty());
}

TEST(ExtentMap, MapsToSeesThroughBorders)
{
    ExtentMap m;
    m.insert({0, 10, 100, rw});
    m.insert({10, 20, 110, rw});
    m.insert({20, 30, 120, ro});
    EXPECT_TRUE(m.maps_to(0, 20, 100, rw));
    EXPECT_TRUE(m.maps_to(5, 15, 105, rw));
    EXPECT_FALSE(m.maps_to(5, 15, 106, rw));
    EXPECT_FALSE(m.maps_to(5, 25, 105, rw)) << "other rights";
    EXPECT_FALSE(m.maps_to(25, 35, 125, ro)) << "a hole";
}

TEST(ExtentMap, Spans)
{
    ExtentMap m;
    m.insert({10, 20, 0, rw});
    EXPECT_FALSE(m.spans(10));
    EXPECT_TRUE(m.spans(11));
    EXPECT_TRUE(m.spans(19));
    EXPECT_FALSE(m.spans(20));
    EXPECT_FALSE(m.spans(25));
}

TEST(ExtentMap, BehavesLikeAMapOfPages)
{
    constexpr std::uint64_t space = 64;
    EXPECT_TRUE(rc::check([] {
        using Step = std::tuple<bool, std::uint64_t, std::uint64_t, bool>;
        const auto steps = *rc::gen::container<std::vector<Step>>(
            rc::gen::tuple(rc::gen::arbitrary<bool>(), rc::gen::inRange<std::uint64_t>(0, space),
                           rc::gen::inRange<std::uint64_t>(1, 20), rc::gen::arbitrary<bool>()));
        ExtentMap m;
        std::map<std::uint64_t, std::pair<std::uint64_t, Rights>> pages;
        std::uint64_t next_oa = 1000;
        for (const auto &[insert, start, length, writable] : steps) {
            const std::uint64_t end = start + length;
            if (!insert) {
                m.erase(start, end);
                pages.erase(pages.lower_bound(start), pages.lower_bound(end));
            } else if (!m.first_in(start, end)) {
                m.insert({start, end, next_oa, writable ? rw : ro});
                for (std::uint64_t p = start; p < end; ++p)
                    pages[p] = {next_oa + (p - start), writable ? rw : ro};
                next_oa += 100;
            }
            for (std::uint64_t p = 0; p < space + 20; ++p) {
                const auto e = m.first_in(p, p + 1);
                const auto it = pages.find(p);
                RC_ASSERT(e.has_value() == (it != pages.end()));
                if (e) {
                    RC_ASSERT(e->oa + (p - e->start) == it->second.first);
                    RC_ASSERT(e->rights == it->second.second);
                    RC_ASSERT(m.maps_to(p, p + 1, it->second.first, it->second.second));
                }
                RC_ASSERT(!m.spans(p) || (pages.count(p) != 0 && pages.count(p - 1) != 0));
            }
            std::uint64_t before = 0;
            m.for_each([&](const Extent &e) {
                RC_ASSERT(e.start < e.end);
                RC_ASSERT(e.start >= before);
                before = e.end;
            });
            RC_ASSERT(m.empty() == pages.empty());
        }
    }));
}

} // namespace
} // namespace dirtyring::iommu
