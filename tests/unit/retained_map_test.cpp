#include "client/retained_map.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <deque>
#include <map>
#include <random>
#include <utility>
#include <vector>

namespace {

using dirtyring::RetainedMap;
using testing::ElementsAre;
using testing::IsEmpty;
using testing::Pair;

constexpr std::uint64_t page = 4096;
constexpr std::uint32_t slice_lg2 = 16; // 16 pages
constexpr std::uint64_t slice = std::uint64_t{1} << slice_lg2;

using Pieces = std::vector<std::pair<std::uint64_t, std::uint64_t>>;

Pieces translate(const RetainedMap &map, std::uint32_t shard, std::uint64_t start, std::uint64_t length)
{
    Pieces pieces;
    if (!map.translate(shard, start, length, [&](std::uint64_t oa, std::uint64_t n) { pieces.emplace_back(oa, n); }))
        return {};
    return pieces;
}

TEST(RetainedMap, TranslatesWhatIsLive)
{
    RetainedMap map(1, slice_lg2);
    map.map(page, 4 * page, 100 * page);
    EXPECT_THAT(translate(map, 0, 2 * page, 2 * page), ElementsAre(Pair(101 * page, 2 * page)));
    EXPECT_THAT(translate(map, 0, 4 * page, 2 * page), IsEmpty());
    EXPECT_THAT(translate(map, 0, 0, page), IsEmpty());
}

TEST(RetainedMap, ARunIsCutWhereTheOaBreaks)
{
    RetainedMap map(1, slice_lg2);
    map.map(0, 2 * page, 100 * page);
    map.map(2 * page, 2 * page, 50 * page);
    EXPECT_THAT(translate(map, 0, page, 3 * page), ElementsAre(Pair(101 * page, page), Pair(50 * page, 2 * page)));
}

TEST(RetainedMap, MappingAgainChangesNothingAndFillsGaps)
{
    RetainedMap map(1, slice_lg2);
    map.map(page, page, 101 * page);
    map.map(0, 4 * page, 100 * page);
    EXPECT_THAT(translate(map, 0, 0, 4 * page),
                ElementsAre(Pair(100 * page, page), Pair(101 * page, page), Pair(102 * page, 2 * page)));
}

TEST(RetainedMap, ARunMeansTheOldestMapUntilItsMarkerHasPassed)
{
    RetainedMap map(1, slice_lg2);
    map.map(0, page, 10 * page);
    map.unmapped(0, page, 5);
    map.map(0, page, 20 * page);
    map.unmapped(0, page, 9);
    map.map(0, page, 30 * page);
    EXPECT_EQ(map.retained(), 2u);

    EXPECT_THAT(translate(map, 0, 0, page), ElementsAre(Pair(10 * page, page)));
    map.passed(0, 5);
    EXPECT_THAT(translate(map, 0, 0, page), ElementsAre(Pair(20 * page, page)));
    map.passed(0, 9);
    EXPECT_THAT(translate(map, 0, 0, page), ElementsAre(Pair(30 * page, page)));
    EXPECT_EQ(map.retained(), 0u);
}

TEST(RetainedMap, AMarkerMayComeTwice)
{
    RetainedMap map(1, slice_lg2);
    map.map(0, page, 10 * page);
    map.passed(0, 5); // before its unmap is heard to be complete, and again
    map.passed(0, 5);
    map.unmapped(0, page, 5);
    EXPECT_EQ(map.retained(), 0u);

    map.map(0, page, 20 * page);
    map.unmapped(0, page, 9);
    map.map(0, page, 30 * page);
    map.passed(0, 5);
    EXPECT_THAT(translate(map, 0, 0, page), ElementsAre(Pair(20 * page, page))) << "that was another unmap's";
    map.passed(0, 9);
    map.passed(0, 9);
    EXPECT_THAT(translate(map, 0, 0, page), ElementsAre(Pair(30 * page, page)));
    map.unmapped(0, page, 12);
    EXPECT_EQ(map.retained(), 1u);
}

// A run that was published before a restart and comes again after it, longer by what was written since.
TEST(RetainedMap, ARunMayHaveHoles)
{
    RetainedMap map(1, slice_lg2);
    map.map(page, page, 11 * page);
    map.map(3 * page, page, 13 * page);
    map.map(5 * page, page, 15 * page);
    map.unmapped(5 * page, page, 7);
    Pieces pieces;
    EXPECT_FALSE(map.translate(0, 0, 8 * page, [&](std::uint64_t oa, std::uint64_t n) { pieces.emplace_back(oa, n); }));
    EXPECT_THAT(pieces, ElementsAre(Pair(11 * page, page), Pair(13 * page, page), Pair(15 * page, page)));
}

TEST(RetainedMap, AMarkerReadBeforeTheCompletionRetainsNothing)
{
    RetainedMap map(1, slice_lg2);
    map.map(0, page, 10 * page);
    map.passed(0, 5);
    map.unmapped(0, page, 5);
    EXPECT_EQ(map.retained(), 0u);
    EXPECT_THAT(translate(map, 0, 0, page), IsEmpty());
}

TEST(RetainedMap, AnUnmapWithoutAMarkerRetainsNothing)
{
    RetainedMap map(1, slice_lg2);
    map.map(0, page, 10 * page);
    map.unmapped(0, page, 0);
    EXPECT_EQ(map.retained(), 0u);
}

TEST(RetainedMap, AMarkerConcernsItsSliceOnly)
{
    RetainedMap map(2, slice_lg2);
    map.map(slice - page, 2 * page, 0);
    map.unmapped(slice - page, 2 * page, 7);
    map.passed(0, 7);
    EXPECT_THAT(translate(map, 0, slice - page, page), IsEmpty());
    EXPECT_THAT(translate(map, 1, slice, page), ElementsAre(Pair(page, page)));
    map.passed(1, 7);
    EXPECT_EQ(map.retained(), 0u);
}

TEST(RetainedMap, AnUnmapOfPartOfAMapRetainsThatPart)
{
    RetainedMap map(1, slice_lg2);
    map.map(0, 4 * page, 100 * page);
    map.unmapped(page, page, 3);
    map.map(page, page, 7 * page);
    EXPECT_THAT(translate(map, 0, 0, 4 * page),
                ElementsAre(Pair(100 * page, page), Pair(101 * page, page), Pair(102 * page, 2 * page)));
    map.passed(0, 3);
    EXPECT_THAT(translate(map, 0, 0, 4 * page),
                ElementsAre(Pair(100 * page, page), Pair(7 * page, page), Pair(102 * page, 2 * page)));
}

TEST(RetainedMap, AnUnmapOfTheRestEndsWithTheSpace)
{
    RetainedMap map(2, slice_lg2);
    map.map(0, 2 * slice, 0);
    map.unmapped(page, UINT64_MAX, 1);
    map.unmapped(4 * slice, UINT64_MAX, 2);
    map.passed(0, 1);
    map.passed(1, 1);
    EXPECT_THAT(translate(map, 0, 0, page), ElementsAre(Pair(0, page)));
    EXPECT_THAT(translate(map, 0, page, page), IsEmpty());
    EXPECT_THAT(translate(map, 1, slice, page), IsEmpty());
}

// Unmaps of other IOVAs may overtake one that waits for pins, or for its part in another slice.
TEST(RetainedMap, MarkersOfOtherUnmapsSayNothing)
{
    RetainedMap map(1, slice_lg2);
    map.map(0, 2 * page, 10 * page);
    map.passed(0, 6);
    map.unmapped(page, page, 6);
    map.unmapped(0, page, 5);
    EXPECT_EQ(map.retained(), 1u);
    EXPECT_THAT(translate(map, 0, 0, page), ElementsAre(Pair(10 * page, page)));
    map.passed(0, 7);
    EXPECT_EQ(map.retained(), 1u);
    map.passed(0, 5);
    EXPECT_EQ(map.retained(), 0u);
}

TEST(RetainedMap, ForEachVisitsAllThatARunMayMean)
{
    RetainedMap map(2, slice_lg2);
    map.map(0, page, 10 * page);
    map.unmapped(0, page, 5);
    map.map(0, page, 20 * page);
    map.map(slice, page, 30 * page);
    Pieces pieces;
    map.for_each(0, [&](std::uint64_t oa, std::uint64_t n) { pieces.emplace_back(oa, n); });
    EXPECT_THAT(pieces, ElementsAre(Pair(10 * page, page), Pair(20 * page, page)));
}

// Against a list of maps for each page: random maps, unmaps, and a reader that lags behind.
TEST(RetainedMap, AgreesWithAnOracle)
{
    struct Meaning {
        std::uint64_t oa;
        std::uint64_t until; // epoch, 0: live
    };
    constexpr std::uint64_t pages = 32;
    for (unsigned seed = 0; seed < 10; ++seed) {
        std::mt19937_64 random(seed);
        RetainedMap map(2, slice_lg2);
        std::vector<std::deque<Meaning>> oracle(pages); // oldest first
        std::uint64_t epoch = 0;
        for (unsigned step = 0; step < 1000; ++step) {
            const std::uint64_t first = random() % pages;
            const std::uint64_t count = 1 + random() % std::min<std::uint64_t>(pages - first, 6);
            switch (random() % 3) {
            case 0: {
                const std::uint64_t oa = random() % 1'000'000 * page;
                map.map(first * page, count * page, oa);
                for (std::uint64_t i = 0; i < count; ++i)
                    if (auto &list = oracle[first + i]; list.empty() || list.back().until != 0)
                        list.push_back({oa + i * page, 0});
                break;
            }
            case 1:
                map.unmapped(first * page, count * page, ++epoch);
                for (std::uint64_t i = 0; i < count; ++i)
                    if (auto &list = oracle[first + i]; !list.empty() && list.back().until == 0)
                        list.back().until = epoch;
                break;
            default: {
                // The reader passes the marker of any unmap that is the oldest on all its pages.
                const auto shard = static_cast<std::uint32_t>(random() % 2);
                const auto list_of = [&](std::uint64_t i) -> std::deque<Meaning> & {
                    return oracle[shard * pages / 2 + i];
                };
                const auto &chosen = list_of(random() % (pages / 2));
                const std::uint64_t until = chosen.empty() ? 0 : chosen.front().until;
                bool oldest = until != 0;
                for (std::uint64_t i = 0; i < pages / 2; ++i) {
                    for (std::size_t n = 1; n < list_of(i).size(); ++n)
                        oldest &= list_of(i)[n].until != until;
                }
                if (!oldest)
                    break;
                map.passed(shard, until);
                for (std::uint64_t i = 0; i < pages / 2; ++i) {
                    if (!list_of(i).empty() && list_of(i).front().until == until)
                        list_of(i).pop_front();
                }
            }
            }
            for (std::uint64_t i = 0; i < pages; ++i) {
                const auto shard = static_cast<std::uint32_t>(i / (pages / 2));
                if (oracle[i].empty())
                    ASSERT_THAT(translate(map, shard, i * page, page), IsEmpty());
                else
                    ASSERT_THAT(translate(map, shard, i * page, page), ElementsAre(Pair(oracle[i].front().oa, page)));
            }
        }
    }
}

} // namespace
