// Split and collapse under DMA: what leaves are afterwards, that no dirty is lost, and that devices notice nothing.
#include "tests/engine/hook.hpp"
#include "tests/engine/rig.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <random>
#include <set>
#include <thread>

namespace dirtyring::test {
namespace {

constexpr std::uint64_t P = page_size;

struct Kind {
    const char *name;
    unsigned format = iommu::AmdV1::id;
    bool all_sizes = false;
    iommu::Break how = iommu::Break::none;

    friend void PrintTo(const Kind &k, std::ostream *out) { *out << k.name; }
    [[nodiscard]] RigOptions options() const
    {
        RigOptions o;
        o.format = format;
        o.all_sizes = all_sizes;
        o.how = how;
        return o;
    }
};

const Kind kinds[] = {
    {"AmdV1"},
    {"AmdV1AllSizes", iommu::AmdV1::id, true},
    {"VtdSs", iommu::VtdSs::id},
    {"SmmuV3S2", iommu::SmmuV3S2::id},
    {"SmmuV3S1NotCached", iommu::SmmuV3S1::id, false, iommu::Break::not_cached},
    {"SmmuV3S2Stall", iommu::SmmuV3S2::id, false, iommu::Break::stall},
};

class Resize : public testing::TestWithParam<Kind>
{
};

INSTANTIATE_TEST_SUITE_P(Kinds, Resize, testing::ValuesIn(kinds),
                         [](const auto &info) { return std::string(info.param.name); });

// One thread would wait for itself where devices stall.
class ResizeWithoutStall : public Resize
{
};

INSTANTIATE_TEST_SUITE_P(Kinds, ResizeWithoutStall, testing::ValuesIn(std::begin(kinds), std::end(kinds) - 1),
                         [](const auto &info) { return std::string(info.param.name); });

// ---- what leaves are ------------------------------------------------------------------------------------------------

TEST_P(Resize, SplitsToTheSizeAskedForAndCollapsesAgain)
{
    Rig rig(GetParam().options());
    ASSERT_EQ(rig.map(2 * MiB, 62 * MiB, 2 * MiB), 0);
    ASSERT_EQ(rig.enable(), 0);
    const unsigned large = rig.leaf_lg2(8 * MiB);
    EXPECT_EQ(large, GetParam().all_sizes ? 23u : 21u);
    ASSERT_EQ(rig.split(8 * MiB, 4 * MiB, 12), 0);
    for (std::uint64_t iova = 2 * MiB; iova < 64 * MiB; iova += P)
        ASSERT_LE(rig.leaf_lg2(iova), iova >= 8 * MiB && iova < 12 * MiB ? 12u : 25u) << std::hex << iova;
    EXPECT_EQ(rig.leaf_lg2(11 * MiB), 12u);
    ASSERT_EQ(rig.collapse(8 * MiB, 4 * MiB, 30), 0);
    EXPECT_GE(rig.leaf_lg2(9 * MiB), 21u);
    ASSERT_EQ(rig.split(2 * MiB, 62 * MiB, 12), 0);
    ASSERT_EQ(rig.collapse(2 * MiB, 62 * MiB, 30), 0);
    EXPECT_EQ(rig.leaf_lg2(8 * MiB), large);
    for (std::uint64_t iova = 2 * MiB; iova < 64 * MiB; iova += MiB) {
        ASSERT_EQ(rig.write(0, iova, 8).reason, iommu::FaultReason::none);
        EXPECT_EQ(rig.translates_to(iova), iova);
    }
    ASSERT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.lost(), 0u);
}

TEST_P(Resize, TakesALeafOf1GiBApart)
{
    RigOptions options = GetParam().options();
    options.memory = 2 * GiB;
    Rig rig(options);
    ASSERT_EQ(rig.map(GiB, GiB, GiB), 0);
    ASSERT_EQ(rig.enable(), 0);
    ASSERT_EQ(rig.leaf_lg2(GiB), 30u);
    ASSERT_EQ(rig.split(GiB + 5 * MiB, MiB, 12), 0) << "a range within the leaf";
    EXPECT_EQ(rig.leaf_lg2(GiB + 5 * MiB), 12u);
    ASSERT_EQ(rig.write(0, GiB + 5 * MiB, 8).reason, iommu::FaultReason::none);
    ASSERT_EQ(rig.write(0, 2 * GiB - 8, 8).reason, iommu::FaultReason::none);
    ASSERT_EQ(rig.collapse(GiB, GiB, 30), 0);
    EXPECT_EQ(rig.leaf_lg2(GiB), 30u);
    EXPECT_TRUE(rig.is_dirty(GiB));
}

// No leaf is of two maps: an unmap would cut it.
TEST_P(Resize, CollapsesNoTwoMapsIntoOne)
{
    Rig rig(GetParam().options());
    ASSERT_EQ(rig.map(4 * MiB, MiB, 4 * MiB), 0);
    ASSERT_EQ(rig.map(5 * MiB, MiB, 5 * MiB), 0);
    ASSERT_EQ(rig.enable(), 0);
    ASSERT_EQ(rig.collapse(0, GiB, 30), 0);
    EXPECT_LT(rig.leaf_lg2(4 * MiB), 21u);
    ASSERT_EQ(rig.write(0, 4 * MiB, 8).reason, iommu::FaultReason::none);
    ASSERT_EQ(rig.unmap(5 * MiB, MiB), 0);
    EXPECT_EQ(rig.read(0, 4 * MiB, 8).reason, iommu::FaultReason::none);
    EXPECT_EQ(rig.read(0, 5 * MiB, 8).reason, iommu::FaultReason::not_present);
    ASSERT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.lost(), 0u);
}

TEST_P(Resize, KeepsA)
{
    Rig rig(GetParam().options());
    ASSERT_EQ(rig.map(4 * MiB, 4 * MiB, 4 * MiB), 0);
    ASSERT_EQ(rig.enable(), 0);
    ASSERT_EQ(rig.read(0, 4 * MiB, 8).reason, iommu::FaultReason::none);
    ASSERT_TRUE(rig.is_accessed(4 * MiB));
    ASSERT_EQ(rig.split(4 * MiB, 4 * MiB, 12), 0);
    EXPECT_TRUE(rig.is_accessed(4 * MiB));
    ASSERT_EQ(rig.collapse(4 * MiB, 4 * MiB, 21), 0);
    EXPECT_TRUE(rig.is_accessed(4 * MiB));
}

// The rest of a map, whose front is unmapped, is a map of its own, though another one be put in front of it.
TEST(ResizeReplicas, MakeNoMapOfTwo)
{
    Rig rig({.all_sizes = true, .capacity = 16});
    ASSERT_EQ(rig.map(4 * MiB, 8 * MiB, 4 * MiB), 0);
    ASSERT_EQ(rig.enable(), 0);
    ASSERT_EQ(rig.split(8 * MiB, 4 * MiB, 12), 0);
    for (std::uint64_t at = 8 * MiB; at < 12 * MiB; at += 2 * P)
        rig.write(0, at, 8);
    const Op &unmap = rig.submit_unmap(4 * MiB, 8 * MiB);
    ASSERT_TRUE(rig.run(unmap, false));
    ASSERT_EQ(unmap.result, -EAGAIN);
    ASSERT_GT(unmap.reached, 8 * MiB);
    rig.note_unmapped(unmap);
    ASSERT_EQ(rig.map(4 * MiB, unmap.reached - 4 * MiB, 4 * MiB), 0);
    ASSERT_EQ(rig.split(4 * MiB, unmap.reached - 4 * MiB, 12), 0);
    ASSERT_EQ(rig.unmap(unmap.reached, 12 * MiB - unmap.reached), 0);
    EXPECT_EQ(rig.write(0, 8 * MiB, 8).reason, iommu::FaultReason::none);
    EXPECT_EQ(rig.read(0, unmap.reached, 8).reason, iommu::FaultReason::not_present);
    ASSERT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.lost(), 0u);
}

// A collapse that begins, or ends, in a leaf of many entries. Only one of them has its D.
std::uint64_t lost_around(std::uint64_t first, std::uint64_t end, Rule rule)
{
    Rig rig({.all_sizes = true, .capacity = 16});
    EXPECT_EQ(rig.map(4 * MiB, 4 * MiB, 4 * MiB), 0);
    EXPECT_EQ(rig.split(4 * MiB, 4 * MiB, 18), 0);
    EXPECT_EQ(rig.leaf_lg2(4 * MiB), 18u);
    EXPECT_EQ(rig.enable(), 0);
    for (const std::uint64_t leaf : {4 * MiB, 5 * MiB}) {
        rig.device().enter();
        for (const std::uint64_t page :
             {7u, 2u}) // the second by what is cached of the first: 64 KiB, and that D is set
            rig.write_inside(0, leaf + page * P, P);
        static_cast<void>(rig.device().leave());
    }
    const Breaking breaking(rule);
    EXPECT_EQ(rig.collapse(first, end - first, 30), 0);
    EXPECT_EQ(rig.sync(), 0);
    return rig.lost();
}

TEST(ResizeReplicas, AreNotCutByACollapse)
{
    const std::uint64_t inside = 4 * P;
    EXPECT_EQ(lost_around(4 * MiB + inside, 6 * MiB, Rule::none), 0u);
    EXPECT_EQ(lost_around(4 * MiB, 5 * MiB + inside, Rule::none), 0u);
    EXPECT_EQ(lost_around(5 * MiB + inside, 5 * MiB + 2 * inside, Rule::none), 0u);
    EXPECT_GT(lost_around(4 * MiB + inside, 6 * MiB, Rule::collapse_cuts_leaf), 0u);
    EXPECT_GT(lost_around(4 * MiB, 5 * MiB + inside, Rule::collapse_cuts_leaf), 0u);
}

// ---- dirt -----------------------------------------------------------------------------------------------------------

TEST_P(Resize, ReportsWhatWasDirtyThenWhatIsWritten)
{
    Rig rig(GetParam().options());
    ASSERT_EQ(rig.map(4 * MiB, 8 * MiB, 4 * MiB), 0);
    ASSERT_EQ(rig.enable(), 0);
    rig.write(0, 5 * MiB, 8);
    ASSERT_EQ(rig.split(4 * MiB, 8 * MiB, 12), 0);
    ASSERT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.lost(), 0u);
    EXPECT_GE(rig.pages_reported, 512u) << "nobody knows which page it was";
    const std::uint64_t before = rig.pages_reported;
    rig.write(0, 5 * MiB, 8);
    rig.write(1, 7 * MiB, 8);
    ASSERT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.lost(), 0u);
    EXPECT_EQ(rig.pages_reported - before, 2u) << "over-reporting ends at the next pass";
}

TEST_P(Resize, CollapsesWhatIsCleanToWhatIsClean)
{
    Rig rig(GetParam().options());
    ASSERT_EQ(rig.map(4 * MiB, 8 * MiB, 4 * MiB), 0);
    ASSERT_EQ(rig.enable(), 0);
    ASSERT_EQ(rig.split(4 * MiB, 8 * MiB, 12), 0);
    rig.write(0, 5 * MiB, 8);
    ASSERT_EQ(rig.sync(), 0);
    const std::uint64_t before = rig.pages_reported;
    ASSERT_EQ(rig.collapse(4 * MiB, 8 * MiB, 30), 0);
    ASSERT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.pages_reported, before);
    rig.write(0, 6 * MiB, 8);
    ASSERT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.lost(), 0u);
    EXPECT_GT(rig.pages_reported, before);
}

// A device writes at every place that has a name, to pages it has written before and to others, by what it has cached
// and not; a section that began before goes on.
std::uint64_t lost_at(const Kind &kind, Point where, Rule rule = Rule::none)
{
    RigOptions options = kind.options();
    options.capacity = 4096;
    Rig rig(options);
    static_cast<void>(rig.map(4 * MiB, 16 * MiB, 4 * MiB));
    static_cast<void>(rig.map(24 * MiB, 64 * KiB, 24 * MiB));
    static_cast<void>(rig.enable());
    std::uint64_t faults = 0;
    const auto write = [&](std::uint64_t iova) {
        const auto reason = rig.write(0, iova, 8).reason;
        faults += reason != iommu::FaultReason::none && reason != iommu::FaultReason::stalled;
    };
    const auto all = [&] {
        for (const std::uint64_t iova :
             {4 * MiB, 4 * MiB + P, 5 * MiB + 3 * P, 7 * MiB, 19 * MiB + 17 * P, 24 * MiB, 24 * MiB + 5 * P})
            write(iova);
    };
    std::uint64_t lost = 0;
    for (const OpKind op : {OpKind::split, OpKind::collapse, OpKind::split}) {
        all();
        const Breaking breaking(rule);
        {
            const Hook hook(
                where,
                [&] {
                    all();
                    write(6 * MiB);
                },
                Hook::Times::always);
            EXPECT_EQ(op == OpKind::split ? rig.split(4 * MiB, 28 * MiB, 12) : rig.collapse(4 * MiB, 28 * MiB, 30), 0);
        }
        EXPECT_EQ(rig.sync(), 0);
        lost += rig.lost();
        all();
        EXPECT_EQ(rig.sync(), 0);
        lost += rig.lost();
    }
    EXPECT_EQ(faults, 0u) << kind.name;
    EXPECT_EQ(rig.stray, 0u) << kind.name;
    return lost;
}

constexpr Point places[] = {Point::leaf_seen,      Point::split_broken,    Point::split_replica,
                            Point::split_replicas, Point::split_limited,   Point::collapse_swapped,
                            Point::collapse_read,  Point::map_table_noted, Point::walker_before_advance};

TEST_P(ResizeWithoutStall, LosesNothingWrittenMeanwhile)
{
    for (const Point where : places)
        EXPECT_EQ(lost_at(GetParam(), where), 0u) << static_cast<int>(where);
}

// A device that only reads makes the compare-and-swap of a leaf fail, and the leaf dirty in the owner's name. Lost is
// what a device that finds D set leaves to whoever has set it.
std::uint64_t lost_when_read(const Kind &kind, Rule rule = Rule::none)
{
    RigOptions options = kind.options();
    options.capacity = 4096;
    Rig rig(options);
    static_cast<void>(rig.map(4 * MiB, 64 * KiB, 4 * MiB));
    static_cast<void>(rig.enable());
    EXPECT_EQ(rig.split(4 * MiB, 64 * KiB, 12), 0);
    const Breaking breaking(rule);
    {
        std::uint64_t next = 4 * MiB;
        const Hook hook(
            Point::leaf_seen,
            [&] {
                EXPECT_EQ(rig.read(0, next, 8).reason, iommu::FaultReason::none);
                next += P;
            },
            Hook::Times::always);
        EXPECT_EQ(rig.collapse(4 * MiB, 64 * KiB, 30), 0);
        EXPECT_EQ(hook.fired(), kind.all_sizes);
    }
    for (std::uint64_t at = 4 * MiB; at < 4 * MiB + 64 * KiB; at += P)
        rig.write(0, at, 8);
    EXPECT_EQ(rig.sync(), 0);
    return rig.lost();
}

TEST_P(ResizeWithoutStall, LosesNothingWhenLeavesAreReadMeanwhile)
{
    EXPECT_EQ(lost_when_read(GetParam()), 0u);
}

struct Step {
    OpKind kind;
    unsigned from; // log2 of leaves
    unsigned to;
};
constexpr Step steps[] = {{OpKind::split, 30, 21},
                          {OpKind::split, 21, 12},
                          {OpKind::split, 16, 12},
                          {OpKind::collapse, 12, 21},
                          {OpKind::collapse, 21, 30}};

// The pass of a sync waits for room in the middle of dirty leaves, which are resized meanwhile: some of their D is
// where the pass has been, and the marker has to wait for it. How many of the leaves are not there before it.
std::size_t missing_at_marker(const Kind &kind, const Step &step, Rule rule = Rule::none)
{
    RigOptions options = kind.options();
    options.space = DR_SPACE_IOVA;
    options.capacity = 16;
    options.memory = GiB;
    Rig rig(options);
    const std::uint64_t leaf = 1ull << step.from;
    const std::uint64_t block = 1ull << std::max(step.from, step.to);
    const std::uint64_t length = std::max(block, 40 * leaf);
    for (std::uint64_t at = block; at < block + length; at += block)
        EXPECT_EQ(rig.map(at, block, 0), 0);
    EXPECT_EQ(rig.enable(), 0);
    EXPECT_EQ(rig.split(block, length, step.from), 0);
    std::set<std::uint64_t> dirty;
    for (std::uint64_t at = block; at < block + 40 * leaf; at += 2 * leaf) {
        for (const std::uint64_t page :
             {at + leaf - P, at}) { // the first finds the last replica, and marks it for both
            rig.write(0, page, 8);
            dirty.insert(page);
        }
    }
    const Breaking breaking(rule);
    const Op &sync = rig.submit(0, OpKind::sync);
    rig.settle();
    EXPECT_FALSE(sync.over());
    const Op &resize = rig.submit_resize(step.kind, block, length, step.to);
    rig.settle();
    EXPECT_TRUE(resize.over());
    for (bool marked = false; !marked; rig.step()) {
        const auto entries = rig.consumer().peek();
        for (const std::uint64_t e : entries) {
            marked |= dr_is_marker(e);
            if (!marked)
                dirty.erase(dirty.lower_bound(dr_run_address(e)),
                            dirty.lower_bound(dr_run_address(e) + dr_run_length(e)));
        }
        static_cast<void>(rig.consumer().release(entries.size()));
    }
    return dirty.size();
}

TEST_P(Resize, MovesNoDirtBehindThePassOfASync)
{
    for (const Step &step : steps)
        EXPECT_EQ(missing_at_marker(GetParam(), step), 0u) << step.from << " to " << step.to;
}

// Devices and the owner in threads of their own.
TEST_P(Resize, IsNotNoticedByDevices)
{
    RigOptions options = GetParam().options();
    options.capacity = 1 << 14;
    Rig rig(options);
    ASSERT_EQ(rig.map(4 * MiB, 16 * MiB, 4 * MiB), 0);
    ASSERT_EQ(rig.enable(), 0);
    std::atomic<bool> stop = false;
    std::uint64_t faults = 0;
    std::thread device([&] {
        std::mt19937_64 random(1);
        while (!stop.load(std::memory_order_relaxed))
            faults += rig.write(0, 4 * MiB + random() % (16 * MiB / P) * P, 8).reason != iommu::FaultReason::none;
    });
    const auto late = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    rig.proceed = [&] {
        rig.step_all();
        return std::chrono::steady_clock::now() < late;
    };
    for (unsigned i = 0; i < (under_tsan ? 3u : 30u); ++i) {
        EXPECT_EQ(rig.split(4 * MiB, 16 * MiB, i % 3 == 0 ? 16 : 12), 0);
        rig.step();
        EXPECT_EQ(rig.collapse(4 * MiB, 16 * MiB, 30), 0);
        rig.drain();
    }
    stop = true;
    device.join();
    EXPECT_EQ(faults, 0u);
    ASSERT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.lost(), 0u);
}

// ---- negative controls ----------------------------------------------------------------------------------------------

std::uint64_t lost_anywhere(const Kind &kind, Rule rule)
{
    std::uint64_t lost = 0;
    for (const Point where : places)
        lost += lost_at(kind, where, rule);
    return lost;
}

TEST(ResizeBroken, LosesPages)
{
    EXPECT_GT(lost_anywhere(kinds[0], Rule::split_drops_dirty), 0u);
    EXPECT_GT(lost_anywhere(kinds[0], Rule::naive_collapse), 0u);
    EXPECT_GT(lost_anywhere(kinds[1], Rule::naive_replicated_split), 0u);
    EXPECT_GT(lost_anywhere(kinds[1], Rule::replica_reported_alone), 0u);
    EXPECT_GT(lost_when_read(kinds[1], Rule::resized_not_summarized), 0u);
    EXPECT_GT(missing_at_marker(kinds[1], steps[2], Rule::resized_behind_pass), 0u);
    EXPECT_GT(missing_at_marker(kinds[0], steps[3], Rule::resized_behind_pass), 0u);
    EXPECT_GT(missing_at_marker(kinds[0], steps[4], Rule::resized_behind_pass), 0u);
}

// Nobody else runs, so the entry stays away for as long as the device has patience.
iommu::FaultReason read_while_broken(Rule rule)
{
    Rig rig(kinds[5].options());
    static_cast<void>(rig.map(4 * MiB, 2 * MiB, 4 * MiB));
    auto reason = iommu::FaultReason::none;
    const Breaking breaking(rule);
    const Hook hook(Point::split_broken, [&] { reason = rig.read(0, 5 * MiB, 8).reason; });
    EXPECT_EQ(rig.split(4 * MiB, 2 * MiB, 12), 0);
    EXPECT_TRUE(hook.fired());
    return reason;
}

TEST(ResizeBroken, FaultsAtALeafThatIsBeingReplaced)
{
    EXPECT_EQ(read_while_broken(Rule::none), iommu::FaultReason::stalled);
    EXPECT_EQ(read_while_broken(Rule::break_taken_for_fault), iommu::FaultReason::not_present);
}

// ---- no memory ------------------------------------------------------------------------------------------------------

TEST_P(Resize, LeavesLeavesAloneWhenThereIsNoMemory)
{
    unsigned failed = 0;
    for (std::uint64_t steps = 0; steps < 1000; ++steps) {
        RigOptions options = GetParam().options();
        options.memory = 256 * MiB;
        Rig rig(options);
        ASSERT_EQ(rig.map(4 * MiB, 252 * MiB, 4 * MiB), 0);
        ASSERT_EQ(rig.enable(), 0);
        rig.write(0, 5 * MiB, 8);
        rig.present_steps = steps;
        const int result = rig.split(4 * MiB, 252 * MiB, 12);
        rig.present_steps = UINT64_MAX;
        for (std::uint64_t iova = 4 * MiB; iova < 256 * MiB; iova += 511 * P)
            ASSERT_EQ(rig.write(0, iova, 8).reason, iommu::FaultReason::none);
        if (result != 0) {
            EXPECT_EQ(result, -ENOMEM);
            ++failed;
            ASSERT_EQ(rig.split(4 * MiB, 252 * MiB, 12), 0);
        }
        EXPECT_EQ(rig.leaf_lg2(255 * MiB), 12u);
        ASSERT_EQ(rig.sync(), 0);
        ASSERT_EQ(rig.lost(), 0u);
        if (result == 0)
            break;
    }
    EXPECT_GT(failed, 0u);
}

// ---- in the background ----------------------------------------------------------------------------------------------

bool settle(Rig &rig)
{
    for (unsigned i = 0; i < 1000; ++i) {
        rig.now += 1'000'000;
        if (!rig.settle())
            return false;
    }
    return true;
}

TEST_P(Resize, SplitsEagerlyAndCollapsesAtTheEnd)
{
    RigOptions options = GetParam().options();
    options.split = DR_SPLIT_EAGER;
    options.collapse = true;
    options.shards = 2;
    Rig rig(options);
    ASSERT_EQ(rig.map(4 * MiB, 16 * MiB, 4 * MiB), 0);
    ASSERT_EQ(rig.enable(), 0);
    ASSERT_TRUE(settle(rig));
    EXPECT_EQ(rig.leaf_lg2(4 * MiB), 12u);
    EXPECT_EQ(rig.leaf_lg2(20 * MiB - P), 12u);
    ASSERT_EQ(rig.map(32 * MiB, 2 * MiB, 32 * MiB), 0);
    EXPECT_EQ(rig.leaf_lg2(32 * MiB), 12u) << "maps that come later";
    rig.write(0, 32 * MiB, 8);
    rig.write(0, 4 * MiB, 8);
    ASSERT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.lost(), 0u);
    EXPECT_EQ(rig.pages_reported, 2u);
    ASSERT_EQ(rig.disable(), 0);
    ASSERT_TRUE(settle(rig));
    EXPECT_GE(rig.leaf_lg2(4 * MiB), 21u);
    EXPECT_GE(rig.leaf_lg2(32 * MiB), 21u);
}

TEST_P(Resize, SplitsWhatWasDirty)
{
    RigOptions options = GetParam().options();
    options.split = DR_SPLIT_LAZY;
    options.memory = 2 * GiB;
    options.capacity = 1 << 13;
    Rig rig(options);
    ASSERT_EQ(rig.map(0, 2 * GiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    rig.write(0, GiB + 7 * P, 8);
    ASSERT_EQ(rig.sync(), 0);
    ASSERT_TRUE(settle(rig));
    EXPECT_EQ(rig.leaf_lg2(GiB), 12u);
    EXPECT_EQ(rig.leaf_lg2(0), 30u);
    const std::uint64_t before = rig.pages_reported;
    rig.write(0, GiB + 7 * P, 8);
    ASSERT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.lost(), 0u);
    EXPECT_EQ(rig.pages_reported - before, 1u);
}

// A new owner goes on with it.
TEST_P(Resize, SplitsEagerlyThroughARestart)
{
    RigOptions options = GetParam().options();
    options.split = DR_SPLIT_EAGER;
    Rig rig(options);
    ASSERT_EQ(rig.map(4 * MiB, 60 * MiB, 4 * MiB), 0);
    ASSERT_EQ(rig.enable(), 0);
    rig.write(0, 4 * MiB, 8);
    rig.step();
    rig.restart();
    ASSERT_TRUE(settle(rig));
    EXPECT_EQ(rig.leaf_lg2(63 * MiB), 12u);
    ASSERT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.lost(), 0u);
}

// Dirt is reported again while the leaves of the time before are being collapsed: what is small stays so. log2 of the
// leaf.
unsigned leaf_when_enabled_again()
{
    Rig rig({.collapse = true, .memory = 256 * MiB});
    static_cast<void>(rig.map(0, 256 * MiB, 0));
    static_cast<void>(rig.enable());
    EXPECT_EQ(rig.split(0, 256 * MiB, 12), 0);
    EXPECT_EQ(rig.disable(), 0);
    EXPECT_EQ(rig.enable(), 0);
    for (unsigned i = 0; i < 2000; ++i)
        rig.step();
    return rig.leaf_lg2(256 * MiB - P);
}

TEST(Collapse, EndsWhenDirtIsReportedAgain)
{
    EXPECT_EQ(leaf_when_enabled_again(), 12u);
    const Breaking breaking(Rule::collapse_goes_on);
    EXPECT_EQ(leaf_when_enabled_again(), 21u);
}

} // namespace
} // namespace dirtyring::test
