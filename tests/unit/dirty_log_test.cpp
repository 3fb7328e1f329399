// The set of dirty pages behind dirtyring_log against one that is obviously right.
#include "client/dirty_log.hpp"

#include <gtest/gtest.h>

#include <random>
#include <set>
#include <vector>

namespace dirtyring::client {
namespace {

std::vector<std::uint64_t> taken(DirtyLog &log, std::uint64_t first, std::uint64_t last, bool keep)
{
    std::vector<std::uint64_t> pages;
    log.take(first, last, keep, [&](std::uint64_t p) { pages.push_back(p); });
    return pages;
}

TEST(DirtyLog, IsASet)
{
    constexpr std::uint64_t pages = 1ull << 40;
    DirtyLog log;
    ASSERT_EQ(log.open(52), 0);
    std::set<std::uint64_t> right;
    std::mt19937_64 random(7);
    const auto below = [&](std::uint64_t n) { return random() % n; };
    // Near each other, near borders of words, of chunks and of words of chunks, and at both ends of the space.
    const std::uint64_t centres[] = {0, 64, 1u << 15, 1u << 21, 5ull << 21, pages - 1};
    const auto place = [&] {
        const std::uint64_t centre = centres[below(std::size(centres))];
        const std::uint64_t p = centre + below(400) - 200;
        return p < pages ? p : centre;
    };
    for (unsigned i = 0; i < 5'000; ++i) {
        const std::uint64_t first = place();
        if (below(2) == 0) {
            const std::uint64_t n = 1 + below(below(4) == 0 ? 300 : 4);
            log.set(first, n);
            for (std::uint64_t p = first; p < std::min(pages, first + n); ++p)
                right.insert(p);
            continue;
        }
        const std::uint64_t last = std::max(first, below(2) == 0 ? first + below(100) : place());
        const bool keep = below(3) == 0;
        const auto from = right.lower_bound(first);
        const auto upto = right.upper_bound(last);
        ASSERT_EQ(taken(log, first, last, keep), std::vector<std::uint64_t>(from, upto)) << i;
        if (!keep)
            right.erase(from, upto);
    }
    EXPECT_EQ(taken(log, 0, UINT64_MAX, false), std::vector<std::uint64_t>(right.begin(), right.end()));
    EXPECT_TRUE(taken(log, 0, UINT64_MAX, false).empty());
}

TEST(DirtyLog, LeavesOutWhatIsOutsideTheSpace)
{
    DirtyLog log;
    ASSERT_EQ(log.open(30), 0);
    log.set((1u << 18) - 1, 5);
    log.set(1u << 18, 5);
    log.set(UINT64_MAX, 1);
    EXPECT_EQ(taken(log, 0, UINT64_MAX, false), std::vector<std::uint64_t>{(1u << 18) - 1});
}

} // namespace
} // namespace dirtyring::client
