// What the successor of a shard's owner must know beyond leaves: which tables have memory, what was half linked, which
// marker is due, what went on in the background.
#include "tests/engine/death_at.hpp"
#include "tests/engine/each_format.hpp"
#include "tests/engine/hook.hpp"
#include "tests/engine/rig.hpp"

#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace dirtyring::test {
namespace {

constexpr std::uint64_t P = page_size;

class Successor : public testing::TestWithParam<unsigned>
{
};
EACH_FORMAT(Successor);

// The lowest tables of a GiB, but for the last, are linked by one owner, the last by another, which asks for a large
// page. Pages lost, and faults, when what may be given back was.
std::uint64_t lost_when_made_large(unsigned format)
{
    Rig rig({.format = format, .leaf_lg2_max = 12, .memory = GiB});
    EXPECT_EQ(rig.map(0, GiB - 2 * MiB, 0), 0);
    EXPECT_EQ(rig.enable(), 0);
    rig.restart();
    rig.settle();
    rig.drain();
    EXPECT_EQ(rig.map(GiB - 2 * MiB, 2 * MiB, GiB - 2 * MiB), 0);
    EXPECT_EQ(rig.large_tables().size(), 1u);
    EXPECT_EQ(rig.write(0, 3 * P, 8).reason, iommu::FaultReason::none);
    rig.shard().made_large(rig.large_tables().front());
    const bool faults = rig.write(1, 4 * P, 8).reason != iommu::FaultReason::none;
    EXPECT_EQ(rig.sync(), 0);
    return rig.lost() + (faults ? 1 : 0);
}

TEST_P(Successor, KnowsWhichTablesHaveMemory)
{
    EXPECT_EQ(lost_when_made_large(GetParam()), 0u);
    const Breaking breaking(Rule::present_forgotten);
    EXPECT_GT(lost_when_made_large(GetParam()), 0u);
}

// What a table keeps once it has been unmapped goes: the successor holds on to what is linked only.
TEST_P(Successor, GivesBackWhatIsUnmapped)
{
    Rig rig({.format = GetParam(), .leaf_lg2_max = 12, .memory = GiB});
    ASSERT_EQ(rig.map(0, 512 * MiB, 0), 0);
    ASSERT_EQ(rig.map(512 * MiB, 256 * MiB, 512 * MiB), 0);
    const std::uint64_t before = rig.tables_bytes();
    rig.restart();
    rig.settle();
    ASSERT_EQ(rig.unmap(512 * MiB, 256 * MiB), 0);
    EXPECT_LE(rig.tables_bytes() + 128 * 4 * KiB, before);
}

// ---- break-before-make ----------------------------------------------------------------------------------------------

struct Broken {
    OpKind kind;
    Point dies_at;
    iommu::Break how;
};

// The owner dies while a leaf of 2 MiB and a table take each other's place; a device is in a section in which it may
// have found the leaf. True: the successor lets the table be found while it is.
bool table_appears_too_early(const Broken &broken)
{
    Rig rig({.format = iommu::SmmuV3S2::id, .how = broken.how, .memory = 8 * MiB});
    EXPECT_EQ(rig.map(0, 4 * MiB, 0), 0);
    EXPECT_EQ(rig.enable(), 0);
    if (broken.kind == OpKind::collapse) {
        EXPECT_EQ(rig.split(0, 4 * MiB, 12), 0);
    }
    static_cast<void>(rig.submit_resize(broken.kind, 0, 4 * MiB, broken.kind == OpKind::collapse ? 21 : 12));
    DeathAt death(broken.dies_at, 1);
    for (unsigned i = 0; i < 1000 && !death.came(); ++i) {
        try {
            rig.step();
        } catch (const Death &) {
            break;
        }
    }
    at_point = nullptr;
    rig.device(1).enter();
    rig.restart();
    for (unsigned i = 0; i < 10; ++i)
        rig.step();
    const iommu::Entry found = rig.decode(*rig.entry(0, 1), 1);
    static_cast<void>(rig.device(1).leave());
    EXPECT_TRUE(rig.settle());
    EXPECT_NE(rig.translates_to(5 * P), UINT64_MAX);
    EXPECT_EQ(rig.read(0, 5 * P, 8).reason, iommu::FaultReason::none);
    rig.write(0, 5 * P, 8);
    EXPECT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.lost(), 0u);
    return found.kind == iommu::EntryKind::table;
}

TEST(SuccessorOfABreak, LinksNoTableWhereALeafMayBeCached)
{
    for (const iommu::Break how : {iommu::Break::stall, iommu::Break::not_cached}) {
        for (const Broken &broken :
             {Broken{OpKind::split, Point::map_table_noted, how}, Broken{OpKind::split, Point::split_broken, how},
              Broken{OpKind::collapse, Point::collapse_swapped, how},
              Broken{OpKind::collapse, Point::collapse_read, how}}) {
            EXPECT_FALSE(table_appears_too_early(broken)) << static_cast<int>(broken.dies_at);
            const Breaking breaking(Rule::relinked_at_once);
            EXPECT_TRUE(table_appears_too_early(broken)) << static_cast<int>(broken.dies_at);
        }
    }
}

// ---- unmaps that are done again -------------------------------------------------------------------------------------

// An unmap has taken leaves out and its owner dies. Its command has a part in another slice, which comes first, so the
// syncs that were under way find room for their markers before it goes on. Is its marker there when it is over?
bool marker_is_there()
{
    Rig rig({.leaf_lg2_max = 12, .space = DR_SPACE_IOVA, .capacity = 8});
    EXPECT_EQ(rig.map(0, MiB / 2, 0), 0);
    EXPECT_EQ(rig.map(MiB / 2, MiB / 2, MiB / 2), 0);
    EXPECT_EQ(rig.enable(), 0);
    for (std::uint64_t i = 0; i < 4; ++i) // runs take all slots that are theirs
        rig.write(0, 2 * i * P, 8);
    EXPECT_TRUE(rig.settle());
    Op &unmap = rig.submit_unmap(MiB / 2, MiB / 2);
    rig.deliver = [&](Op &op) {
        if (&op != &unmap)
            rig.shard().submit(op);
    };
    DeathAt death(Point::unmap_taken_out, 1);
    while (!death.came())
        death.step(rig);
    std::vector<const Op *> syncs;
    for (unsigned i = 0; i < 4; ++i)
        syncs.push_back(&rig.submit(0, OpKind::sync));
    rig.settle();
    rig.shard().submit(unmap);
    EXPECT_TRUE(rig.run(unmap, false));
    EXPECT_EQ(unmap.result, 0);
    EXPECT_EQ(unmap.reached, unmap.end);
    EXPECT_TRUE(rig.run(*syncs.back()));
    rig.drain();
    return rig.state().passed == unmap.told_epoch();
}

TEST(SuccessorOfAnUnmap, HasASlotForItsMarker)
{
    EXPECT_TRUE(marker_is_there());
    const Breaking breaking(Rule::sync_takes_last_slot);
    EXPECT_FALSE(marker_is_there());
}

// The owner dies with some replicas of a leaf taken out; when the unmap is done again the leaf is dirty, and there is
// no room. True: the VMM is told that it is mapped, and it is.
bool leaf_is_whole_again()
{
    Rig rig({.all_sizes = true, .capacity = 8});
    EXPECT_EQ(rig.map(64 * KiB, 64 * KiB, 64 * KiB), 0);
    for (std::uint64_t i = 0; i < 4; ++i)
        EXPECT_EQ(rig.map(4 * MiB + 2 * i * P, P, MiB + 2 * i * P), 0);
    EXPECT_EQ(rig.enable(), 0);
    const Op &unmap = rig.submit_unmap(64 * KiB, 64 * KiB);
    DeathAt death(Point::unmap_replica_taken, 2);
    while (!death.came()) {
        death.step(rig);
        EXPECT_FALSE(unmap.over());
    }
    for (std::uint64_t i = 0; i < 4; ++i)
        rig.write(0, 4 * MiB + 2 * i * P, 8);
    rig.deliver = [](Op &) {};
    rig.restart(); // and sweeps before it hears of the unmap
    rig.settle();
    EXPECT_EQ(rig.write(0, 64 * KiB + 8 * P, 8).reason, iommu::FaultReason::none);
    rig.shard().submit(const_cast<Op &>(unmap));
    EXPECT_TRUE(rig.run(unmap, false));
    EXPECT_EQ(unmap.result, -EAGAIN);
    EXPECT_EQ(unmap.reached, unmap.start);
    return rig.read(1, 64 * KiB, 8).reason == iommu::FaultReason::none;
}

TEST(SuccessorOfAnUnmap, PutsBackReplicasOfALeafThatStays)
{
    EXPECT_TRUE(leaf_is_whole_again());
    const Breaking breaking(Rule::leaf_left_in_part);
    EXPECT_FALSE(leaf_is_whole_again());
}

// The owner dies when an unmap of two maps has forgotten the first; done again it finds no room for the second, which
// is dirty. How far it says that it came.
std::uint64_t reached_without_room()
{
    Rig rig({.leaf_lg2_max = 12, .visit = {.leaves = 64}, .capacity = 8});
    EXPECT_EQ(rig.map(0, 64 * P, 0), 0);
    EXPECT_EQ(rig.map(64 * P, P, 64 * P), 0);
    EXPECT_EQ(rig.map(4 * MiB, MiB, MiB), 0);
    EXPECT_EQ(rig.enable(), 0);
    Op &unmap = rig.submit_unmap(0, 65 * P);
    rig.deliver = [](Op &) {};
    DeathAt death(Point::unmap_forgotten, 1);
    while (!death.came())
        death.step(rig);
    for (std::uint64_t i = 0; i < 4; ++i)
        rig.write(0, 4 * MiB + 2 * i * P, 8);
    rig.settle();
    rig.write(0, 64 * P, 8);
    rig.shard().submit(unmap);
    EXPECT_TRUE(rig.run(unmap, false));
    EXPECT_EQ(unmap.result, -EAGAIN);
    EXPECT_EQ(rig.read(0, 0, 8).reason, iommu::FaultReason::not_present);
    return unmap.reached;
}

TEST(SuccessorOfAnUnmap, CountsWhatItsPredecessorHasForgotten)
{
    EXPECT_EQ(reached_without_room(), 64 * P);
    const Breaking breaking(Rule::hole_not_counted);
    EXPECT_EQ(reached_without_room(), 0u);
}

// Two unmaps; the owner dies in the first, and the second is there before the first is done again. Does the first say
// the truth?
bool first_unmap_is_right()
{
    Rig rig({.leaf_lg2_max = 12, .space = DR_SPACE_IOVA, .capacity = 8});
    EXPECT_EQ(rig.map(0, MiB / 2, 0), 0);
    EXPECT_EQ(rig.map(MiB / 2, MiB / 2, MiB / 2), 0);
    EXPECT_EQ(rig.enable(), 0);
    for (std::uint64_t i = 0; i < 4; ++i)
        rig.write(0, 2 * i * P, 8);
    EXPECT_TRUE(rig.settle());
    EXPECT_TRUE(rig.run(rig.submit(0, OpKind::sync), false));
    Op &first = rig.submit_unmap(MiB / 2, MiB / 2);
    const Op &second = rig.submit_unmap(0, MiB / 2);
    rig.deliver = [&](Op &op) {
        if (&op != &first)
            rig.shard().submit(op);
    };
    DeathAt death(Point::unmap_taken_out, 1);
    while (!death.came())
        death.step(rig);
    EXPECT_TRUE(rig.run(second, false));
    rig.shard().submit(first);
    EXPECT_TRUE(rig.run(first, false));
    rig.drain();
    return first.result == 0 && rig.state().passed == first.told_epoch();
}

TEST(SuccessorOfAnUnmap, LetsNoOtherTakeItsSlot)
{
    EXPECT_TRUE(first_unmap_is_right());
    const Breaking breaking(Rule::due_marker_forgotten);
    EXPECT_FALSE(first_unmap_is_right());
}

// It began while nothing was tracked and has taken leaves out when the owner dies; an ENABLE goes first. Is what it
// calls mapped mapped?
bool what_stays_is_mapped()
{
    Rig rig({.leaf_lg2_max = 12, .space = DR_SPACE_IOVA});
    EXPECT_EQ(rig.map(0, MiB, 0), 0);
    Op &unmap = rig.submit_unmap(0, MiB);
    const Op &enable = rig.submit(0, OpKind::enable);
    rig.deliver = [&](Op &op) {
        if (&op != &unmap)
            rig.shard().submit(op);
    };
    DeathAt death(Point::unmap_staged, 3); // 128 leaves are out
    while (!death.came())
        death.step(rig);
    EXPECT_TRUE(rig.run(enable));
    rig.shard().submit(unmap);
    EXPECT_TRUE(rig.run(unmap));
    EXPECT_EQ(unmap.result, -EAGAIN);
    EXPECT_EQ(unmap.told_epoch(), 0u);
    return rig.read(1, unmap.reached, 8).reason == iommu::FaultReason::none;
}

TEST(SuccessorOfAnUnmap, EndsBeforeReportingBehindWhatIsOut)
{
    EXPECT_TRUE(what_stays_is_mapped());
    const Breaking breaking(Rule::taken_out_stays_mapped);
    EXPECT_FALSE(what_stays_is_mapped());
}

// The owner dies in the middle of a map, and the next one when it was to be rolled back, as Commands does. Another map
// comes in its place. What is wrong then: translations of what failed, and pages lost.
std::uint64_t left_of_a_map_that_fails()
{
    Rig rig({.leaf_lg2_max = 12});
    EXPECT_EQ(rig.enable(), 0);
    static_cast<void>(rig.submit_map(0, MiB, 0));
    const auto deliver = rig.deliver;
    rig.deliver = [](Op &) {};
    DeathAt death(Point::map_leaf_stored, 100);
    while (!death.came())
        death.step(rig);
    Op &back = rig.submit_unmap(0, MiB);
    back.again = true;
    rig.shard().submit(back);
    EXPECT_TRUE(rig.run(back));
    EXPECT_EQ(back.result, 0);
    const bool translates = rig.read(0, 0, 8).reason == iommu::FaultReason::none;
    rig.deliver = deliver;
    if (translates)
        return 1;
    EXPECT_EQ(rig.map(0, MiB, 2 * MiB), 0);
    rig.restart();
    EXPECT_TRUE(rig.settle());
    rig.write(0, 3 * P, 8);
    EXPECT_EQ(rig.sync(), 0);
    return rig.lost();
}

TEST(SuccessorOfAMap, RollsItBack)
{
    EXPECT_EQ(left_of_a_map_that_fails(), 0u);
    const Breaking breaking(Rule::begun_stays);
    EXPECT_GT(left_of_a_map_that_fails(), 0u);
}

// The owner dies in the middle of a map, and there is no memory when it is done again.
class MapThatFails
{
  public:
    MapThatFails()
    {
        EXPECT_EQ(rig.enable(), 0);
        static_cast<void>(rig.submit_map(0, MiB, 0));
        const auto deliver = std::exchange(rig.deliver, [](Op &) {});
        DeathAt death(Point::map_leaf_stored, 100);
        while (!death.came())
            death.step(rig);
        EXPECT_EQ(rig.write(0, 3 * P, 8).reason, iommu::FaultReason::none);
        rig.present_steps = 0;
        EXPECT_EQ(again(), -ENOMEM);
        rig.deliver = deliver;
    }
    // While nothing is delivered.
    int again()
    {
        Op &map = rig.submit_map(0, MiB, 0);
        map.again = true;
        rig.shard().submit(map);
        EXPECT_TRUE(rig.run(map));
        return map.result;
    }

    Rig rig{{.leaf_lg2_max = 12}};
};

// A SYNC comes before the roll-back.
bool is_reported()
{
    MapThatFails map;
    EXPECT_EQ(map.rig.sync(), 0);
    return std::memcmp(map.rig.source.data() + 3 * P, map.rig.destination.data() + 3 * P, P) == 0;
}

// Another death comes before the roll-back is recorded, and then there is memory. Is the map whole?
bool becomes_whole()
{
    MapThatFails map;
    map.rig.deliver = [](Op &) {};
    map.rig.restart();
    map.rig.present_steps = UINT64_MAX;
    EXPECT_EQ(map.again(), 0);
    return map.rig.read(0, MiB - P, 8).reason == iommu::FaultReason::none;
}

TEST(SuccessorOfAMap, ThatFailsReportsIt)
{
    EXPECT_TRUE(is_reported());
    const Breaking breaking(Rule::failed_map_not_scanned);
    EXPECT_FALSE(is_reported());
}

TEST(SuccessorOfAMap, ThatFailsLeavesItToTheNext)
{
    EXPECT_TRUE(becomes_whole());
    const Breaking breaking(Rule::failed_map_is_whole);
    EXPECT_FALSE(becomes_whole());
}

// All leaves are to be small, and those of a table that is being made for an earlier command are not: the owner dies
// before the record says so. Pages that are lost.
std::uint64_t lost_in_larger_leaves()
{
    Rig rig({.all_sizes = true, .split = DR_SPLIT_EAGER, .visit = {.lines = 64}});
    EXPECT_EQ(rig.map(0, 4 * MiB, 0), 0);
    EXPECT_EQ(rig.enable(), 0);
    while (rig.leaf_lg2(0) == 22) // now two of 2 MiB, which the record wants small
        rig.step();
    const Op &split = rig.submit_resize(OpKind::split, 0, 4 * MiB, 16);
    DeathAt death(Point::map_table_noted, 1);
    while (!death.came() && !split.over())
        death.step(rig);
    EXPECT_TRUE(rig.run(split));
    EXPECT_TRUE(rig.settle());
    rig.copy_all();
    for (std::uint64_t i = 0; i < 32; ++i)
        rig.write(0, i * P, 8);
    EXPECT_EQ(rig.sync(), 0);
    return rig.lost();
}

TEST(SuccessorOfASplit, KnowsTheSizesOfLeaves)
{
    EXPECT_EQ(lost_in_larger_leaves(), 0u);
    const Breaking breaking(Rule::split_raises_limit);
    EXPECT_GT(lost_in_larger_leaves(), 0u);
}

// ---- the background -------------------------------------------------------------------------------------------------

unsigned leaf_after_disable()
{
    Rig rig({.collapse = true, .memory = 256 * MiB});
    EXPECT_EQ(rig.map(0, 256 * MiB, 0), 0);
    EXPECT_EQ(rig.enable(), 0);
    EXPECT_EQ(rig.split(0, 256 * MiB, 12), 0);
    EXPECT_EQ(rig.disable(), 0);
    rig.restart();
    for (unsigned i = 0; i < 2000; ++i)
        rig.step();
    return rig.leaf_lg2(256 * MiB - P);
}

TEST(SuccessorOfACollapse, GoesOnWithIt)
{
    EXPECT_EQ(leaf_after_disable(), 21u);
    const Breaking breaking(Rule::collapse_forgotten);
    EXPECT_EQ(leaf_after_disable(), 12u);
}

} // namespace
} // namespace dirtyring::test
