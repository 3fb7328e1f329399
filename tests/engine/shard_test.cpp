// A shard, step by step: what its operations do to the tables, the ring and the markers.
#include "tests/engine/each_format.hpp"
#include "tests/engine/rig.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cerrno>
#include <random>
#include <utility>

namespace dirtyring::test {
namespace {

using testing::ElementsAre;

constexpr std::uint64_t P = page_size;

class Sweep : public EachFormat
{
};
EACH_FORMAT(Sweep);
class Sync : public EachFormat
{
};
EACH_FORMAT(Sync);
class Unmap : public EachFormat
{
};
EACH_FORMAT(Unmap);
class Map : public EachFormat
{
};
EACH_FORMAT(Map);
class Hostile : public EachFormat
{
};
EACH_FORMAT(Hostile);
class Cancel : public EachFormat
{
};
EACH_FORMAT(Cancel);
class Sleep : public EachFormat
{
};
EACH_FORMAT(Sleep);

RigOptions small_leaves(dr_space space = DR_SPACE_OA, std::uint64_t capacity = 1024)
{
    return {.leaf_lg2_max = 12, .space = space, .capacity = capacity};
}

std::uint64_t run(std::uint64_t address, std::uint32_t pages)
{
    return dr_run(address >> DR_PAGE_LG2, false, pages);
}

// n runs of one page each, every other page from `from`.
void write_apart(Rig &rig, std::uint64_t from, unsigned n)
{
    for (unsigned i = 0; i < n; ++i)
        ASSERT_EQ(rig.write(0, from + 2 * i * P, P).reason, iommu::FaultReason::none);
}

// ---- sweep ----------------------------------------------------------------------------------------------------------

TEST_P(Sweep, ReportsRunsOfWhatWasWritten)
{
    Rig rig(small_leaves());
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    rig.logging = true;
    rig.write(0, 3 * P, 4 * P);
    rig.write(1, 20 * P + 100, 8);
    rig.settle();
    rig.drain();
    EXPECT_THAT(rig.log, ElementsAre(run(3 * P, 4), run(20 * P, 1)));
    EXPECT_EQ(rig.lost(), 0u);
    EXPECT_EQ(rig.shard().counters().runs, 2u);
    EXPECT_EQ(rig.shard().counters().pages, 5u);
    EXPECT_FALSE(rig.is_dirty(3 * P));
    EXPECT_EQ(rig.drain(), 0u);
}

TEST_P(Sweep, ReadsAreNotReported)
{
    Rig rig(small_leaves());
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    EXPECT_EQ(rig.read(0, 0, 16 * P).reason, iommu::FaultReason::none);
    rig.settle();
    EXPECT_EQ(rig.drain(), 0u);
    EXPECT_EQ(rig.write(0, 5 * P, 8).reason, iommu::FaultReason::none); // by the entry cached clean
    rig.settle();
    EXPECT_EQ(rig.drain(), 1u);
    EXPECT_EQ(rig.lost(), 0u);
}

TEST_P(Sweep, NothingIsReportedUntilEnabledAndAfterDisabled)
{
    Rig rig(small_leaves());
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    rig.write(0, 0, P);
    rig.settle();
    EXPECT_EQ(rig.drain(), 0u);
    EXPECT_EQ(rig.is_dirty(0), always_on());

    for (unsigned i = 0; i < 3; ++i) {
        ASSERT_EQ(rig.enable(), 0);
        rig.write(0, i * P, P);
        rig.settle();
        EXPECT_EQ(rig.drain(), 1u);
        rig.write(0, i * P, P); // left dirty
        ASSERT_EQ(rig.disable(), 0);
        rig.write(0, 100 * P, P);
        rig.settle();
        rig.drain();
    }
    ASSERT_EQ(rig.enable(), 0);
    rig.settle();
    EXPECT_EQ(rig.drain(), 0u) << "enabling begins clean";
}

TEST_P(Sweep, FullRingGoesOnWhereItStopped)
{
    Rig rig(small_leaves(DR_SPACE_OA, 8));
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    write_apart(rig, 0, 20);
    rig.logging = true;
    unsigned rounds = 0;
    for (std::uint64_t n = 1; n > 0; ++rounds) {
        rig.settle();
        n = rig.drain();
        EXPECT_LE(n, 8u - DR_MARKER_SLOTS);
    }
    EXPECT_EQ(rounds, 6u);
    ASSERT_EQ(rig.log.size(), 20u);
    for (unsigned i = 0; i < 20; ++i)
        EXPECT_EQ(rig.log[i], run(2 * i * P, 1));
    EXPECT_EQ(rig.lost(), 0u);
}

TEST_P(Sweep, SaysThatTheRingIsFull)
{
    Rig rig(small_leaves(DR_SPACE_OA, 8));
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    write_apart(rig, 0, 20);
    rig.settle();
    EXPECT_NE(rig.producer_memory()->full_since, 0u);
    EXPECT_GT(rig.producer_memory()->pending, 0u);
    while (rig.drain() > 0)
        rig.settle();
    EXPECT_EQ(rig.producer_memory()->full_since, 0u);
    EXPECT_EQ(rig.producer_memory()->pending, 0u);
}

TEST_P(Sweep, LargeLeavesAreReportedWhole)
{
    Rig rig({.memory = 3 * GiB});
    ASSERT_EQ(rig.map(0, 2 * GiB + 6 * MiB, 0), 0); // 1 GiB twice, then 2 MiB
    ASSERT_EQ(rig.enable(), 0);
    rig.logging = true;
    rig.write(0, GiB + 5, 8);
    rig.write(0, 2 * GiB + 4 * MiB, 8);
    rig.settle();
    for (const std::uint64_t e : rig.consumer().peek())
        rig.log.push_back(e);
    EXPECT_THAT(rig.log, ElementsAre(dr_run(GiB >> 12, true, 512), dr_run((2 * GiB + 4 * MiB) >> 12, true, 1)));
}

TEST_P(Sweep, RunsBreakWhereTheOaDoes)
{
    for (const dr_space space : {DR_SPACE_OA, DR_SPACE_IOVA}) {
        Rig rig(small_leaves(space));
        ASSERT_EQ(rig.map(0, 4 * P, MiB), 0);
        ASSERT_EQ(rig.map(4 * P, 4 * P, 2 * MiB), 0);
        ASSERT_EQ(rig.enable(), 0);
        rig.write(0, 0, 8 * P);
        rig.logging = true;
        rig.settle();
        rig.drain();
        if (space == DR_SPACE_OA)
            EXPECT_THAT(rig.log, ElementsAre(run(MiB, 4), run(2 * MiB, 4)));
        else
            EXPECT_THAT(rig.log, ElementsAre(run(0, 8)));
        EXPECT_EQ(rig.lost(), 0u);
        EXPECT_EQ(rig.stray, 0u);
    }
}

TEST_P(Sweep, RestsUntilTheConsumerHasTakenItsRuns)
{
    Rig rig(small_leaves());
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    rig.write(0, 0, P);
    rig.settle();
    rig.write(0, P, P);
    rig.settle();
    EXPECT_EQ(rig.consumer().peek().size(), 1u);
    static_cast<void>(rig.consumer().release(1));
    rig.settle();
    EXPECT_EQ(rig.drain(), 1u);
}

TEST_P(Sweep, RestsForItsInterval)
{
    RigOptions options = small_leaves();
    options.min_interval_ns = 1'000'000'000;
    Rig rig(options);
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    rig.write(0, 0, P);
    rig.settle();
    EXPECT_EQ(rig.drain(), 1u);
    rig.write(0, 0, P);
    rig.settle();
    EXPECT_EQ(rig.drain(), 0u);
    const service::Rest rest = rig.shard().prepare_sleep(rig.now);
    EXPECT_FALSE(rest.busy);
    EXPECT_GT(rest.until_ns, rig.now);
    EXPECT_LE(rest.until_ns, rig.now + options.min_interval_ns);
    rig.now = rest.until_ns;
    rig.shard().wake();
    rig.settle();
    EXPECT_EQ(rig.drain(), 1u);
    EXPECT_EQ(rig.sync(), 0) << "a sync does not rest";
}

TEST_P(Sweep, DeviceInSectionHoldsThePublish)
{
    Rig rig(small_leaves());
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    rig.device(1).enter();
    rig.write(0, 0, P);
    rig.settle();
    EXPECT_EQ(rig.drain(), 0u);
    const service::Rest rest = rig.shard().prepare_sleep(rig.now);
    EXPECT_FALSE(rest.busy);
    EXPECT_NE(rest.until_ns, UINT64_MAX) << "nobody will wake the walker";
    rig.shard().wake();
    static_cast<void>(rig.device(1).leave());
    rig.device(1).enter(); // another section
    rig.settle();
    EXPECT_EQ(rig.drain(), 1u);
}

TEST_P(Sweep, StuckDeviceStallsItsOwnHwptOnly)
{
    Rig stuck(small_leaves());
    Rig other(small_leaves());
    for (Rig *rig : {&stuck, &other}) {
        ASSERT_EQ(rig->map(0, MiB, 0), 0);
        ASSERT_EQ(rig->enable(), 0);
        rig->write(0, 0, P);
    }
    stuck.device(0).enter();
    for (unsigned i = 0; i < 100; ++i) { // one walker, two guests
        stuck.step();
        other.step();
    }
    EXPECT_EQ(stuck.drain(), 0u);
    EXPECT_EQ(other.drain(), 1u);
    EXPECT_EQ(other.sync(), 0);
}

TEST_P(Sweep, DetachedDeviceIsNotWaitedFor)
{
    Rig rig(small_leaves());
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    rig.write(0, 0, P);
    rig.device(1).enter();
    rig.settle();
    EXPECT_EQ(rig.drain(), 0u);
    rig.bury(1);
    rig.settle();
    EXPECT_EQ(rig.drain(), 1u);
    EXPECT_EQ(rig.sync(), 0);
}

// ---- sync -----------------------------------------------------------------------------------------------------------

TEST_P(Sync, MarkerLiesBehindEverythingWritten)
{
    Rig rig({.aperture_lg2 = 32, .shards = 4, .leaf_lg2_max = 12});
    for (std::uint64_t s = 0; s < 4; ++s)
        ASSERT_EQ(rig.map(s * GiB, MiB, s * MiB), 0);
    ASSERT_EQ(rig.enable(), 0);
    for (std::uint64_t s = 0; s < 4; ++s)
        rig.write(0, s * GiB + s * P, P);
    ASSERT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.lost(), 0u);
    rig.logging = true;
    ASSERT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.log.size(), 4u);
}

TEST_P(Sync, WaitsForRoomAndUsesTheMarkersSlots)
{
    Rig rig(small_leaves(DR_SPACE_OA, 8));
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    write_apart(rig, 0, 6);
    const Op &op = rig.submit(0, OpKind::sync);
    EXPECT_FALSE(rig.run(op, false)) << "four runs fit, two wait";
    rig.drain();
    EXPECT_TRUE(rig.run(op, false));
    rig.drain();
    EXPECT_EQ(rig.lost(), 0u);

    // A ring whose run slots are taken still takes markers.
    write_apart(rig, 0, 4);
    rig.settle();
    std::vector<const Op *> ops;
    for (unsigned i = 0; i < 5; ++i)
        ops.push_back(&rig.submit(0, OpKind::sync));
    for (unsigned i = 0; i < 4; ++i)
        EXPECT_TRUE(rig.run(*ops[i], false)) << i;
    EXPECT_FALSE(rig.run(*ops[4], false));
    rig.drain();
    EXPECT_TRUE(rig.run(*ops[4], false));
}

// Runs that are staged and not published are no reason to wait: the consumer cannot make room of what it does not see.
TEST_P(Sync, GoesOnBehindDeferredRunsThatFillTheRing)
{
    Rig rig(small_leaves(DR_SPACE_OA, 16));
    ASSERT_EQ(rig.map(0, 2 * MiB, 0), 0);
    ASSERT_EQ(rig.map(2 * MiB, 2 * MiB, 2 * MiB), 0);
    ASSERT_EQ(rig.enable(), 0);
    write_apart(rig, 0, 12);
    ASSERT_TRUE(rig.run(rig.submit_unmap(0, 2 * MiB, Harvest::deferred), false));
    rig.write(0, 2 * MiB, 8);
    const Op &sync = rig.submit(0, OpKind::sync);
    for (unsigned i = 0; i < 4 && !rig.run(sync, false); ++i)
        rig.drain();
    EXPECT_TRUE(sync.over());
}

TEST_P(Sync, AlternatesWithOperations)
{
    Rig rig(small_leaves());
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    std::vector<const Op *> ops;
    for (unsigned i = 1; i < 40; ++i) {
        ops.push_back(&rig.submit_map(i * MiB, MiB, 0));
        if (i % 2 == 0)
            ops.push_back(&rig.submit(0, OpKind::sync));
        if (i % 3 == 0)
            ops.push_back(&rig.submit_unmap(i * MiB, MiB));
        rig.write(0, i * P, P);
        rig.step();
    }
    for (const Op *op : ops) {
        ASSERT_TRUE(rig.run(*op));
        EXPECT_EQ(op->result, 0);
    }
    ASSERT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.lost(), 0u);
}

TEST_P(Sync, WaitingForRoomHoldsUpNoMapOrUnmap)
{
    Rig rig(small_leaves(DR_SPACE_OA, 8));
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    write_apart(rig, 0, 8);
    const Op &sync = rig.submit(0, OpKind::sync);
    EXPECT_TRUE(rig.run(rig.submit_map(MiB, MiB, 0), false));
    EXPECT_TRUE(rig.run(rig.submit_unmap(MiB, MiB), false));
    EXPECT_FALSE(sync.over());
}

// ---- map and unmap --------------------------------------------------------------------------------------------------

TEST_P(Unmap, HarvestsWhatWasWritten)
{
    for (const Harvest harvest : {Harvest::now, Harvest::deferred}) {
        Rig rig(small_leaves());
        ASSERT_EQ(rig.map(0, MiB, 0), 0);
        ASSERT_EQ(rig.enable(), 0);
        rig.write(0, 9 * P, 3 * P);
        rig.logging = true;
        const Op &op = rig.submit_unmap(0, MiB, harvest);
        ASSERT_TRUE(rig.run(op, false));
        EXPECT_EQ(op.reached, MiB);
        if (harvest == Harvest::now) {
            EXPECT_EQ(rig.drain(), 1u);
        } else {
            EXPECT_EQ(rig.drain(), 0u);
            rig.settle();
            EXPECT_EQ(rig.drain(), 1u) << "published when there is nothing else to do";
        }
        EXPECT_THAT(rig.log, ElementsAre(run(9 * P, 3)));
        EXPECT_EQ(rig.lost(), 0u);
        EXPECT_EQ(rig.write(0, 9 * P, 8).reason, iommu::FaultReason::not_present);
    }
}

TEST_P(Unmap, DeferredRunsComeBeforeTheNextSync)
{
    Rig rig(small_leaves(DR_SPACE_IOVA));
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    rig.write(0, 0, P);
    ASSERT_TRUE(rig.run(rig.submit_unmap(0, MiB, Harvest::deferred), false));
    rig.logging = true;
    rig.cookie = 77;
    ASSERT_TRUE(rig.run(rig.submit(0, OpKind::sync), false));
    rig.drain();
    EXPECT_THAT(rig.log, ElementsAre(run(0, 1), dr_marker(DR_MARKER_EPOCH, 1), dr_marker(DR_MARKER_SYNC, 77)));
}

TEST_P(Unmap, DiscardReportsNothing)
{
    Rig rig(small_leaves(DR_SPACE_IOVA));
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    rig.write(0, 0, P);
    ASSERT_TRUE(rig.run(rig.submit_unmap(0, MiB, Harvest::discard), false));
    rig.logging = true;
    ASSERT_EQ(rig.sync(), 0);
    EXPECT_THAT(rig.log, ElementsAre(dr_marker(DR_MARKER_EPOCH, 1), dr_marker(DR_MARKER_SYNC, 1)));
}

TEST_P(Unmap, AnswersAgainOnAnEntryBoundary)
{
    for (const dr_space space : {DR_SPACE_OA, DR_SPACE_IOVA}) {
        Rig rig(small_leaves(space, 8));
        ASSERT_EQ(rig.map(0, MiB, 0), 0);
        ASSERT_EQ(rig.enable(), 0);
        write_apart(rig, 0, 10);
        const Op &op = rig.submit_unmap(0, MiB);
        ASSERT_TRUE(rig.run(op, false));
        EXPECT_EQ(op.result, -EAGAIN);
        EXPECT_EQ(op.reached, 8 * P) << "the fifth dirty page has no slot";
        rig.note_unmapped(op);
        EXPECT_EQ(rig.write(1, 8 * P, 8).reason, iommu::FaultReason::none);
        EXPECT_EQ(rig.write(1, 7 * P, 8).reason, iommu::FaultReason::not_present);

        const Op &stuck = rig.submit_unmap(op.reached, MiB - op.reached);
        ASSERT_TRUE(rig.run(stuck, false));
        EXPECT_EQ(stuck.result, -EAGAIN);
        EXPECT_EQ(stuck.reached, op.reached);
        rig.note_unmapped(stuck);

        rig.drain();
        EXPECT_EQ(rig.unmap(op.reached, MiB - op.reached), 0);
        EXPECT_EQ(rig.lost(), 0u);
        EXPECT_EQ(rig.stray, 0u);
    }
}

// A partial unmap that is answered with AGAIN has a marker behind what it unmapped: what is mapped there next is
// another map.
TEST_P(Unmap, PartOfManyVisitsHasItsMarkerToo)
{
    Rig rig({.leaf_lg2_max = 12, .space = DR_SPACE_IOVA, .capacity = 8, .memory = 256 * MiB});
    ASSERT_EQ(rig.map(0, 128 * MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    write_apart(rig, 0, 4);
    rig.settle(); // the run slots are taken
    for (unsigned i = 0; i < 5; ++i)
        rig.submit(0, OpKind::sync); // they take turns with the unmap, and the slots of markers
    const Op &op = rig.submit_unmap(0, 128 * MiB);
    ASSERT_TRUE(rig.run(op, false));
    rig.note_unmapped(op);
    for (unsigned i = 0; i < 10; ++i) {
        rig.settle();
        rig.drain();
    }
    EXPECT_TRUE(rig.state().passed == op.epoch || op.reached == op.start)
        << op.reached << " bytes are gone, and no marker says so";
}

// A sweep that is owed comes between two operations, not between two visits of one.
TEST_P(Unmap, OfManyVisitsLetsNoSweepIn)
{
    Rig rig({.leaf_lg2_max = 12, .space = DR_SPACE_IOVA, .memory = 256 * MiB});
    ASSERT_EQ(rig.map(0, 128 * MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    ASSERT_EQ(rig.map(128 * MiB, MiB, 128 * MiB), 0);
    const Op &op = rig.submit_unmap(0, 128 * MiB);
    rig.step();
    ASSERT_FALSE(op.over()) << "it takes more than a visit";
    rig.write(0, 128 * MiB, 8);
    rig.logging = true;
    while (!op.over()) {
        rig.now += 1'000'000;
        rig.step();
    }
    rig.settle();
    rig.drain();
    EXPECT_THAT(rig.log, ElementsAre(dr_marker(DR_MARKER_EPOCH, 1), run(128 * MiB, 1)));
}

// A DISABLE has come between the first part of the unmap, which was reported, and this one.
TEST_P(Unmap, EpochMarkerComesThoughNobodyTracksAnyMore)
{
    Rig rig(small_leaves(DR_SPACE_IOVA));
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    Op &op = rig.submit_unmap(0, MiB, Harvest::deferred);
    op.note_word = service::UnmapNote::decided | service::UnmapNote::marked;
    ASSERT_TRUE(rig.run(op, false));
    rig.settle();
    rig.drain();
    EXPECT_EQ(rig.state().passed, op.epoch);
    EXPECT_EQ(op.told_epoch(), op.epoch);
    EXPECT_EQ(rig.shard().prepare_sleep(rig.now).until_ns, UINT64_MAX) << "the walker has nothing to look for";
}

TEST_P(Unmap, NobodyTracksNoEpochNoMarker)
{
    Rig rig(small_leaves(DR_SPACE_IOVA));
    rig.logging = true;
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    const Op &op = rig.submit_unmap(0, MiB, Harvest::deferred);
    ASSERT_TRUE(rig.run(op, false));
    rig.settle();
    rig.drain();
    EXPECT_EQ(op.told_epoch(), 0u);
    EXPECT_TRUE(rig.log.empty());
    EXPECT_EQ(rig.shard().prepare_sleep(rig.now).until_ns, UINT64_MAX) << "the walker has nothing to look for";
}

// Markers that nobody publishes fill a ring that looks empty to its consumer.
TEST_P(Unmap, DeferredGoesOnThoughNobodyTracks)
{
    Rig rig(small_leaves(DR_SPACE_IOVA, 8));
    for (unsigned i = 0; i < 20; ++i) {
        ASSERT_EQ(rig.map(0, MiB, 0), 0);
        ASSERT_EQ(rig.unmap(0, MiB, Harvest::deferred), 0) << i;
    }
}

// Runs that are staged and not published take room that no consumer can give back.
TEST_P(Unmap, DeferredRunsDoNotHoldUpASync)
{
    Rig rig(small_leaves(DR_SPACE_OA, 8));
    ASSERT_EQ(rig.map(0, 2 * MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    write_apart(rig, 0, 4);
    ASSERT_EQ(rig.write(0, MiB, P).reason, iommu::FaultReason::none);
    ASSERT_TRUE(rig.run(rig.submit_unmap(0, MiB, Harvest::deferred), false));
    EXPECT_EQ(rig.sync(), 0) << "hangs: " << rig.describe();
    EXPECT_EQ(rig.lost(), 0u);
}

TEST_P(Unmap, WaitsForADeviceInside)
{
    Rig rig(small_leaves());
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    rig.device(0).enter();
    rig.write_inside(0, 0, P);
    const Op &op = rig.submit_unmap(0, MiB, Harvest::discard);
    rig.settle();
    EXPECT_FALSE(op.over());
    static_cast<void>(rig.device(0).leave());
    EXPECT_TRUE(rig.run(op, false));
}

TEST_P(Map, TablesGiveTheirMemoryBackAfterTheGrace)
{
    Rig rig({.aperture_lg2 = 39, .leaf_lg2_max = 12, .memory = GiB});
    ASSERT_EQ(rig.map(0, GiB, 0), 0);
    const std::uint64_t before = rig.tables_bytes();
    for (std::uint64_t i = 0; i < 20; ++i) { // a guest that never uses an IOVA again
        ASSERT_EQ(rig.unmap(i * GiB, GiB), 0) << i;
        ASSERT_EQ(rig.map((i + 1) * GiB, GiB, 0), 0) << i;
    }
    EXPECT_LE(rig.tables_bytes(), before + MiB); // what is left: tables of tables, and the summary
}

TEST_P(Map, TablesGiveBackAgainWhatALargePageHasFilled)
{
    Rig rig({.aperture_lg2 = 39, .leaf_lg2_max = 12, .memory = GiB});
    ASSERT_EQ(rig.map(0, GiB / 2, 0), 0);
    ASSERT_EQ(rig.map(GiB / 2, GiB / 2, GiB / 2), 0);
    ASSERT_EQ(rig.large_tables().size(), 1u);
    ASSERT_EQ(rig.unmap(GiB / 2, GiB / 2), 0);
    const std::uint64_t before = rig.tables_bytes();
    ASSERT_EQ(rig.make_tables_present(rig.large_tables().front(), 2 * MiB), 0); // as the kernel does while it makes one
    ASSERT_GE(rig.tables_bytes(), before + MiB);
    rig.shard().made_large(rig.large_tables().front());
    EXPECT_EQ(rig.tables_bytes(), before);
    EXPECT_EQ(rig.write(0, GiB / 4, 8).reason, iommu::FaultReason::none) << "what is in use stays";
}

TEST_P(Map, TablesEmptiedPieceByPieceAreReused)
{
    Rig rig({.aperture_lg2 = 30, .leaf_lg2_max = 12, .memory = GiB});
    for (unsigned i = 0; i < 3; ++i) {
        ASSERT_EQ(rig.map(0, GiB, 0), 0) << i;
        for (std::uint64_t at = 0; at < GiB; at += MiB)
            ASSERT_EQ(rig.unmap(at, MiB), 0);
    }
}

TEST_P(Map, LargeLeafOverEmptiedTables)
{
    Rig rig({.memory = 2 * GiB});
    ASSERT_EQ(rig.map(0, GiB, P), 0); // shifted: small leaves
    ASSERT_EQ(rig.enable(), 0);
    for (std::uint64_t at = 0; at < GiB; at += MiB)
        ASSERT_EQ(rig.unmap(at, MiB), 0);
    ASSERT_EQ(rig.map(0, GiB, GiB), 0);
    EXPECT_EQ(rig.decode(*rig.entry(0, 2), 2).kind, iommu::EntryKind::leaf);
    rig.write(0, 512 * MiB, P);
    ASSERT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.lost(), 0u);
}

// ---- hostile devices ------------------------------------------------------------------------------------------------

struct Span {
    std::uint64_t oa;
    std::uint64_t length;
};

// Runs name only what is, or was, mapped.
void expect_within(Rig &rig, std::initializer_list<Span> mapped)
{
    for (const std::uint64_t e : rig.log) {
        if (dr_is_marker(e))
            continue;
        bool within = false;
        for (const Span &m : mapped)
            within |= dr_run_address(e) >= m.oa && dr_run_address(e) + dr_run_length(e) <= m.oa + m.length;
        ASSERT_TRUE(within) << std::hex << dr_run_address(e) << " + " << dr_run_length(e);
    }
    rig.log.clear();
}

// A dirty leaf in a table of this level, or a table.
std::uint64_t likely_entry(std::uint64_t address, unsigned level)
{
    return iommu::with_format(default_format, [&](auto f) {
        return level > iommu::leaf_level_max || address % 3 == 0
                   ? f.table(address >> iommu::granule_lg2, level % 3)
                   : f.accessed(f.leaf(address, iommu::entry_lg2(level), read_write), true);
    });
}

// A device writes what it likes where it can, while the VMM goes on.
TEST_P(Hostile, GarbageInTablesAndSummary)
{
    std::mt19937_64 random(11);
    for (unsigned round = 0; round < 60; ++round) {
        Rig rig({.aperture_lg2 = 32, .shards = 2, .leaf_lg2_max = round % 2 == 0 ? 12u : 30u, .capacity = 16});
        ASSERT_EQ(rig.map(0, 8 * MiB, 0), 0);
        ASSERT_EQ(rig.map(2 * GiB + 3 * P, 5 * P, 9 * MiB), 0);
        ASSERT_EQ(rig.enable(), 0);
        rig.logging = true;
        const std::uint64_t tables = 3;
        const auto word = [&](std::uint64_t offset) -> std::uint64_t & {
            return *reinterpret_cast<std::uint64_t *>(rig.tables_memory() + offset);
        };
        const auto random_table = [&] {
            const unsigned shard = static_cast<unsigned>(random() % 3);
            return shard == 2 ? random() % rig.geometry.top_tables
                              : iommu::first_table(rig.geometry, shard) +
                                    iommu::first_number(rig.geometry.slice_lg2, static_cast<unsigned>(random() % 3)) +
                                    random() % tables;
        };
        for (unsigned i = 0; i < 400; ++i) {
            const std::uint64_t t = random_table();
            std::uint64_t value = random();
            switch (random() % 5) {
            case 0:
                word(rig.geometry.table_bits + t / 64 * 8) = random() % 2 == 0 ? ~0ull : value;
                break;
            case 1:
                word(rig.geometry.line_words + t * 8) = random() % 2 == 0 ? ~0ull : value;
                break;
            default:
                if (random() % 2 == 0) // a dirty leaf, or a table, somewhere
                    value = likely_entry(value & 0x000f'ffff'ffff'f000ull, static_cast<unsigned>(random() % 4));
                word(rig.geometry.table_pages + (t << 12) + random() % 512 * 8) = value;
            }
            switch (random() % 12) {
            case 0:
                rig.write(0, random() % (16 * MiB), 8); // may fault in any way
                break;
            case 1:
                if (!rig.ioas.first_in(16 * MiB, 20 * MiB)) {
                    EXPECT_EQ(rig.map(16 * MiB, 4 * MiB, 16 * MiB), 0);
                }
                rig.drain();
                break;
            case 2:
                rig.unmap(16 * MiB, 4 * MiB);
                rig.drain();
                expect_within(rig, {{0, 8 * MiB}, {9 * MiB, 5 * P}, {16 * MiB, 4 * MiB}});
                break;
            default:
                rig.step_all();
            }
            if (random() % 8 == 0) {
                rig.drain();
                if (testing::Test::HasFatalFailure())
                    return;
            }
        }
        EXPECT_EQ(rig.sync(), 0);
        EXPECT_EQ(rig.stray, 0u);
    }
}

// A line that was put back for want of room, whose table is gone when the sweep comes back to it.
TEST_P(Hostile, PendingLineOfATableThatIsGone)
{
    Rig rig({.leaf_lg2_max = 21, .capacity = 8, .memory = 2 * GiB});
    ASSERT_EQ(rig.map(0, GiB, 0), 0); // by a table of 2 MiB leaves, the slice's first
    ASSERT_EQ(rig.map(4 * GiB, P, GiB), 0);
    ASSERT_EQ(rig.map(4 * GiB + 2 * MiB, P, GiB), 0);
    ASSERT_EQ(rig.map(4 * GiB + 4 * MiB, P, GiB), 0);
    ASSERT_EQ(rig.enable(), 0);
    for (std::uint64_t i = 0; i < 8; ++i)
        rig.write(0, 2 * i * 2 * MiB, 8);
    rig.settle(); // line 1 has no room
    const std::uint64_t gone = iommu::first_table(rig.geometry, 0) + iommu::first_number(rig.geometry.slice_lg2, 1);
    ASSERT_TRUE(rig.run(rig.submit_unmap(0, GiB, Harvest::discard), false));
    ASSERT_TRUE(rig.run(rig.submit_unmap(4 * GiB, 6 * MiB, Harvest::discard), false));
    // Another table takes over its private part, and a page is mapped where the line was.
    ASSERT_TRUE(rig.run(rig.submit_map(8 * GiB, GiB, GiB), false));
    ASSERT_TRUE(rig.run(rig.submit_map(16 * MiB, P, 0), false));
    for (unsigned i = 0; i < 512; ++i)
        rig.view.tables().entries(gone)[i] = likely_entry(1ull << 30, 1);
    rig.drain();
    rig.logging = true;
    rig.settle();
    rig.drain();
    expect_within(rig, {{0, P}, {GiB, GiB}});
}

TEST_P(Hostile, TailOutsideTheRing)
{
    Rig rig(small_leaves(DR_SPACE_OA, 8));
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    for (const std::uint64_t tail : {~0ull, 1ull << 63, 5ull, 1ull << 32}) {
        rig.consumer_memory()->tail = tail;
        rig.consumer_memory()->armed = tail;
        write_apart(rig, 0, 20);
        EXPECT_TRUE(rig.settle());
        EXPECT_LE(rig.producer_memory()->staged, 8u - DR_MARKER_SLOTS);
    }
}

// ---- life -----------------------------------------------------------------------------------------------------------

TEST_P(Cancel, CompletesEverythingAndEndsTheRing)
{
    Rig rig(small_leaves());
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    const Op *ops[] = {&rig.submit_map(MiB, MiB, 0), &rig.submit(0, OpKind::sync), &rig.submit_unmap(0, MiB)};
    rig.shard().cancel();
    for (const Op *op : ops) {
        EXPECT_TRUE(op->over());
        EXPECT_EQ(op->result, -ECANCELED);
    }
    rig.drain();
    EXPECT_TRUE(rig.state().ended);
    EXPECT_FALSE(rig.step());
    EXPECT_FALSE(rig.shard().prepare_sleep(rig.now).busy);
}

TEST_P(Cancel, DuringAGracePeriodToo)
{
    Rig rig(small_leaves());
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    rig.device(0).enter();
    rig.write_inside(0, 0, P);
    const Op &op = rig.submit_unmap(0, MiB);
    rig.settle();
    rig.shard().cancel();
    EXPECT_TRUE(op.over());
    EXPECT_EQ(op.result, -ECANCELED);
    rig.drain();
    EXPECT_TRUE(rig.state().ended) << "the consumer never learns that nothing follows";
}

TEST_P(Cancel, WhatIsSubmittedLaterIsCancelledToo)
{
    Rig rig(small_leaves());
    rig.shard().cancel();
    const Op &op = rig.submit(0, OpKind::sync);
    EXPECT_TRUE(rig.run(op));
}

TEST_P(Sleep, FlagsAreRaisedAndLowered)
{
    Rig rig(small_leaves(DR_SPACE_OA, 8));
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    EXPECT_FALSE(rig.shard().prepare_sleep(rig.now).busy);
    EXPECT_FALSE(rig.view.asleep(0)) << "nobody tracks, so no device rings";
    rig.shard().wake();

    ASSERT_EQ(rig.enable(), 0);
    rig.settle();
    EXPECT_FALSE(rig.shard().prepare_sleep(rig.now).busy);
    EXPECT_TRUE(rig.view.asleep(0));
    rig.write(0, 0, P);
    EXPECT_EQ(rig.rung, 1u);
    rig.shard().wake();
    EXPECT_FALSE(rig.view.asleep(0));
    rig.rung = 0;
    rig.write(0, 2 * P, P);
    EXPECT_EQ(rig.rung, 0u);

    write_apart(rig, 0, 10);
    rig.settle();
    EXPECT_FALSE(rig.shard().prepare_sleep(rig.now).busy);
    EXPECT_EQ(rig.producer_memory()->want_kick, 1u);
    rig.drain();
    EXPECT_EQ(rig.kicked, 1u);
    rig.shard().wake();
    EXPECT_EQ(rig.producer_memory()->want_kick, 0u);
}

TEST_P(Sleep, OperationsKeepTheWalkerAwake)
{
    Rig rig(small_leaves());
    rig.submit_map(0, MiB, 0);
    EXPECT_TRUE(rig.shard().prepare_sleep(rig.now).busy);
    rig.settle();
    EXPECT_FALSE(rig.shard().prepare_sleep(rig.now).busy);
    rig.submit(0, OpKind::sync);
    rig.shard().wake();
    EXPECT_TRUE(rig.shard().prepare_sleep(rig.now).busy);
}

// A device is stopped when it has turned a table bit and not rung: the next one finds the bit set. What both wrote
// comes with a sync.
TEST_P(Sleep, ADeviceThatIsStoppedBeforeItRingsDelaysOthersUntilASync)
{
    Rig rig(small_leaves(DR_SPACE_OA));
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    SleepyWalker walker(rig);
    ASSERT_TRUE(walker.run_until_idle());
    rig.write(0, 0, 8);
    EXPECT_EQ(std::exchange(rig.rung, 0), 1u) << "which never comes";
    rig.write(1, P, 8);
    EXPECT_EQ(rig.rung, 0u);
    ASSERT_TRUE(walker.run_until_idle());
    rig.drain();
    EXPECT_EQ(rig.lost(), 2u);
    ASSERT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.lost(), 0u);
}

} // namespace
} // namespace dirtyring::test
