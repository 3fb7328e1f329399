// Leaves become runs: as long as they can be, never longer than an entry holds, never into what is staged.
#include "service/engine/run_writer.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <bit>
#include <utility>
#include <vector>

namespace dirtyring::service {
namespace {

using testing::ElementsAre;

constexpr std::uint64_t page = DR_PAGE;
constexpr std::uint64_t large = page << DR_LARGE_UNIT_LG2;

class Output
{
  public:
    explicit Output(std::uint64_t capacity)
        : memory_(ring::producer_region_size(capacity, 8) / sizeof(dr_ring_producer))
    {
        dr_ring_header header{};
        header.capacity = capacity;
        header.entry_size = 8;
        ring::make_producer_region(memory_.data(), header);
        ring.emplace(memory_.data(), &consumer_);
    }
    [[nodiscard]] std::vector<std::uint64_t> staged() const
    {
        const auto *entries = reinterpret_cast<const std::uint64_t *>(memory_.data() + 1);
        return {entries, entries + ring->staged()};
    }
    std::optional<ring::Producer<std::uint64_t>> ring;

  private:
    std::vector<dr_ring_producer> memory_;
    dr_ring_consumer consumer_{};
};

std::uint64_t run(std::uint64_t address, std::uint32_t n, bool is_large = false)
{
    return dr_run(address >> DR_PAGE_LG2, is_large, n);
}

TEST(RunWriter, JoinsNeighbours)
{
    Output out(64);
    RunWriter w(*out.ring, 60);
    for (const std::uint64_t i : {3, 4, 5, 7, 8, 1, 2}) // forwards only
        EXPECT_TRUE(w.add(i * page, page));
    EXPECT_EQ(w.stage(), 3u);
    EXPECT_THAT(out.staged(), ElementsAre(run(3 * page, 3), run(7 * page, 2), run(page, 2)));
}

TEST(RunWriter, EndsARunAt2047)
{
    Output out(64);
    RunWriter w(*out.ring, 60);
    for (std::uint64_t i = 0; i < 2 * 2047 + 1; ++i)
        EXPECT_TRUE(w.add(i * page, page));
    w.stage();
    EXPECT_THAT(out.staged(), ElementsAre(run(0, 2047), run(2047 * page, 2047), run(2 * 2047 * page, 1)));
}

TEST(RunWriter, LargeUnits)
{
    Output out(64);
    RunWriter w(*out.ring, 60);
    EXPECT_TRUE(w.add(0, large));
    EXPECT_TRUE(w.add(large, 512 * large)); // 1 GiB, not aligned to itself
    EXPECT_TRUE(w.add(513 * large, page));  // smaller: another unit
    EXPECT_TRUE(w.add(513 * large + page, page));
    EXPECT_TRUE(w.add(514 * large, large));
    w.stage();
    EXPECT_THAT(out.staged(), ElementsAre(run(0, 513, true), run(513 * large, 2), run(514 * large, 1, true)));
}

TEST(RunWriter, LargeLeafAtAnUnalignedAddressIsCountedInPages)
{
    Output out(64);
    RunWriter w(*out.ring, 60);
    EXPECT_TRUE(w.add(large + 3 * page, large));
    w.stage();
    EXPECT_THAT(out.staged(), ElementsAre(run(large + 3 * page, 512)));
}

TEST(RunWriter, LongerThanOneEntry)
{
    Output out(16);
    RunWriter w(*out.ring, 2);
    EXPECT_FALSE(w.add(page, 2 * 2047 * page + page)) << "three entries";
    EXPECT_TRUE(w.add(page, 2047 * page + page));
    EXPECT_TRUE(w.add(2049 * page, page)) << "the last run grows";
    EXPECT_FALSE(w.add(0, page));
    w.stage();
    EXPECT_THAT(out.staged(), ElementsAre(run(page, 2047), run(2048 * page, 2)));
}

TEST(RunWriter, ARunNeverGrowsIntoWhatIsStaged)
{
    Output out(16);
    RunWriter w(*out.ring, 3);
    EXPECT_TRUE(w.add(0, page));
    EXPECT_EQ(w.stage(), 1u);
    EXPECT_TRUE(w.add(page, page));
    EXPECT_EQ(w.stage(), 1u);
    EXPECT_EQ(w.stage(), 0u);
    EXPECT_TRUE(w.add(2 * page, page));
    EXPECT_FALSE(w.add(9 * page, page)) << "three slots in all";
    w.stage();
    EXPECT_THAT(out.staged(), ElementsAre(run(0, 1), run(page, 1), run(2 * page, 1)));
}

// Whatever leaves come in, the entries name exactly them, in order, and in as many slots as it says.
TEST(RunWriter, NamesExactlyWhatWasAdded)
{
    EXPECT_TRUE(rc::check([] {
        const auto slots = *rc::gen::inRange<std::uint64_t>(0, 60);
        const auto steps = *rc::gen::container<std::vector<std::pair<std::uint64_t, int>>>(
            rc::gen::pair(rc::gen::inRange<std::uint64_t>(0, 40), rc::gen::inRange(0, 8)));
        Output out(64);
        RunWriter w(*out.ring, slots);
        std::vector<std::uint64_t> wanted; // pages
        std::uint64_t at = 0;
        for (const auto &[gap, what] : steps) {
            if (what == 7)
                w.stage();
            const bool is_large = what >= 5;
            at = gap < 20 ? at : at + (gap - 20) * page;
            at = is_large ? (at + large - 1) / large * large : at;
            const std::uint64_t length = is_large ? large : page;
            if (!w.add(at, length))
                break;
            for (std::uint64_t p = at; p < at + length; p += page)
                wanted.push_back(p);
            at += length;
        }
        w.stage();
        std::vector<std::uint64_t> named;
        RC_ASSERT(out.staged().size() <= slots);
        for (const std::uint64_t e : out.staged()) {
            RC_ASSERT(!dr_is_marker(e));
            for (std::uint64_t p = dr_run_address(e); p < dr_run_address(e) + dr_run_length(e); p += page)
                named.push_back(p);
        }
        RC_ASSERT(named == wanted);
    }));
}

constexpr RunWriter::Window everywhere{0, ~0ull, 0};

RunWriter::AddedLines add_lines(RunWriter &w, std::vector<std::pair<std::uint64_t, unsigned>> lines,
                                const RunWriter::Window &window = everywhere)
{
    std::vector<iommu::LineEntries> entries;
    for (const auto &[at, pages] : lines)
        entries.push_back({nullptr, at, pages, 0, 0});
    iommu::LinesAhead none;
    return w.add_lines(entries, window, none);
}

std::uint64_t add_line(RunWriter &w, std::uint64_t at, unsigned pages)
{
    const auto added = add_lines(w, {{at, pages}});
    EXPECT_EQ(added.lines, added.pages != 0 ? 1u : 0u);
    return added.pages;
}

// Lines of which some pages are dirty: what is in the entries is as it would be page by page.
TEST(RunWriter, LinesAreAsPageByPage)
{
    EXPECT_TRUE(rc::check([] {
        const auto slots = *rc::gen::inRange<std::uint64_t>(0, 60);
        const auto lines = *rc::gen::container<std::vector<std::pair<unsigned, unsigned>>>(
            rc::gen::pair(rc::gen::inRange(0u, 3u), rc::gen::oneOf(rc::gen::inRange(1u, 256u), rc::gen::just(255u))));
        const bool staged_between = *rc::gen::arbitrary<bool>();
        Output by_line(64);
        Output by_page(64);
        RunWriter l(*by_line.ring, slots);
        RunWriter p(*by_page.ring, slots);
        std::uint64_t at = *rc::gen::element(0ull, large);
        if (at != 0 && slots > 0)
            RC_ASSERT(l.add(0, large) && p.add(0, large)); // to which no page is joined
        for (const auto &[gap, pages] : lines) {
            at += gap * line_pages * page;
            const std::uint64_t n = add_line(l, at, pages);
            RC_ASSERT(n == 0 || n == static_cast<std::uint64_t>(std::popcount(pages)));
            if (n == 0)
                break; // no room for as many as a line can have
            for (unsigned rest = pages; rest != 0; rest &= rest - 1)
                RC_ASSERT(p.add(at + static_cast<unsigned>(std::countr_zero(rest)) * page, page));
            at += line_pages * page;
            if (staged_between)
                RC_ASSERT(l.stage() == p.stage());
        }
        RC_ASSERT(l.stage() == p.stage());
        RC_ASSERT(by_line.staged() == by_page.staged());
    }));
}

TEST(RunWriter, ALineGoesOnWithARunUpTo2047)
{
    Output out(64);
    RunWriter w(*out.ring, 60);
    for (unsigned i = 0; i < 255; ++i)
        EXPECT_EQ(add_line(w, i * line_pages * page, 0xff), line_pages);
    EXPECT_EQ(add_line(w, 255 * line_pages * page, 0xff), 0u) << "2048";
    EXPECT_EQ(add_line(w, 255 * line_pages * page, 0x7f), 7u);
    EXPECT_EQ(add_line(w, 256 * line_pages * page, 0x81), 2u);
    w.stage();
    EXPECT_THAT(out.staged(), ElementsAre(run(0, 2047), run(2048 * page, 1), run(2055 * page, 1)));
}

TEST(RunWriter, ALineNeedsRoomForTheMostRunsItCanHave)
{
    Output out(16);
    RunWriter w(*out.ring, line_runs_max);
    EXPECT_EQ(add_line(w, 0, 0x55), 4u);
    EXPECT_EQ(add_line(w, 0, 1), 0u);
    w.stage();
    EXPECT_THAT(out.staged(), ElementsAre(run(0, 1), run(2 * page, 1), run(4 * page, 1), run(6 * page, 1)));
}

TEST(RunWriter, LinesUpToTheFirstThatReachesOutOfTheWindow)
{
    constexpr std::uint64_t start = 4 * page; // half a line
    constexpr std::uint64_t line = line_pages * page;
    const RunWriter::Window window{start, 3 * line, 16 * line - start};
    Output out(64);
    RunWriter w(*out.ring, 60);
    EXPECT_EQ(add_lines(w, {{0, 0xff}, {line, 0xff}}, window).lines, 0u) << "begins before it";
    const auto added = add_lines(w, {{line, 0x81}, {2 * line, 0x80}, {3 * line, 1}}, window);
    EXPECT_EQ(added.lines, 2u) << "ends behind it";
    EXPECT_EQ(added.pages, 3u);
    EXPECT_EQ(add_lines(w, {{line, 1}}, {line, line - page, 0}).lines, 0u) << "shorter than a line";
    w.stage();
    EXPECT_THAT(out.staged(), ElementsAre(run(16 * line + 4 * page, 1), run(16 * line + 11 * page, 1),
                                          run(17 * line + 11 * page, 1)));
}

// Until the ring's memory begins anew there is no row for another line; add() goes on.
TEST(RunWriter, LinesEndWithTheRingsMemory)
{
    Output out(16);
    RunWriter w(*out.ring, 14);
    for (unsigned i = 0; i < 13; ++i)
        EXPECT_TRUE(w.add(2 * i * page, page));
    w.stage();
    EXPECT_EQ(add_line(w, 64 * page, 1), 0u);
    EXPECT_TRUE(w.add(64 * page, page));
    w.stage();
    EXPECT_EQ(out.staged().back(), run(64 * page, 1));
}

} // namespace
} // namespace dirtyring::service
