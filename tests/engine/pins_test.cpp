// Pins: who waits for them and who does not, what may be pinned, what a dead or hostile device leaves behind.
#include "tests/engine/rig.hpp"

#include <gtest/gtest.h>

#include <set>

namespace dirtyring::test {
namespace {

constexpr std::uint64_t mapped = 64 * MiB;

class Pinning : public testing::Test
{
  protected:
    explicit Pinning(const RigOptions &options = {.leaf_lg2_max = 12}) : rig(options) {}

    void SetUp() override
    {
        for (std::uint64_t at = 0; at < mapped; at += page_size) // maps of their own, for no unmap cuts one
            ASSERT_EQ(rig.map(at, page_size, at), 0);
        ASSERT_EQ(rig.enable(), 0);
    }

    // What a sync has reported and copied is all that was written.
    void expect_nothing_lost()
    {
        ASSERT_EQ(rig.sync(), 0) << rig.describe();
        EXPECT_EQ(rig.lost(), 0u);
    }

    void finish(unsigned device, const Pin &pin)
    {
        rig.land(pin);
        EXPECT_EQ(rig.unpin(device, pin).reason, iommu::FaultReason::none);
    }

    dr_pin &slot(unsigned device, unsigned index) { return rig.threads(device).pins[index]; }

    Rig rig;
};

// ---- the device's side

TEST_F(Pinning, GivesThePiecesInOrder)
{
    ASSERT_EQ(rig.unmap(0, mapped), 0);
    ASSERT_EQ(rig.map(0, 2 * page_size, 8 * page_size), 0);
    ASSERT_EQ(rig.map(2 * page_size, page_size, 0), 0);
    const Pin pin = rig.pin(0, 100, 2 * page_size + 200);
    ASSERT_EQ(pin.error, 0);
    ASSERT_EQ(pin.pieces.size(), 3u);
    EXPECT_EQ(pin.pieces[0].data(), rig.source.data() + 8 * page_size + 100);
    EXPECT_EQ(pin.pieces[0].size(), page_size - 100);
    EXPECT_EQ(pin.pieces[1].data(), rig.source.data() + 9 * page_size);
    EXPECT_EQ(pin.pieces[1].size(), page_size);
    EXPECT_EQ(pin.pieces[2].data(), rig.source.data());
    EXPECT_EQ(pin.pieces[2].size(), 300u);
    finish(0, pin);
    expect_nothing_lost();
}

TEST_F(Pinning, SetsDirtyWhenTheDataHasLandedNotBefore)
{
    const Pin pin = rig.pin(0, 0, 3 * page_size);
    EXPECT_FALSE(rig.is_dirty(0));
    finish(0, pin);
    for (std::uint64_t page = 0; page < 3; ++page)
        EXPECT_TRUE(rig.is_dirty(page * page_size));
    EXPECT_FALSE(rig.is_dirty(3 * page_size));
}

TEST_F(Pinning, ForReadingSetsNoDirty)
{
    const Pin pin = rig.pin(0, 0, page_size, false);
    EXPECT_EQ(rig.unpin(0, pin).reason, iommu::FaultReason::none);
    EXPECT_FALSE(rig.is_dirty(0));
}

TEST_F(Pinning, WhatCannotBePinnedTakesNoSlot)
{
    ASSERT_EQ(rig.map(GiB, page_size, 0, {true, false}), 0);
    struct Case {
        std::uint64_t iova;
        std::uint64_t length;
        iommu::FaultReason reason;
    };
    for (const Case &c : {Case{mapped - page_size, 2 * page_size, iommu::FaultReason::not_present},
                          Case{GiB, page_size, iommu::FaultReason::write_denied},
                          Case{1ull << 39, page_size, iommu::FaultReason::aperture},
                          Case{(1ull << 39) - page_size, 2 * page_size, iommu::FaultReason::aperture},
                          Case{UINT64_MAX, 2, iommu::FaultReason::aperture}}) {
        const Pin pin = rig.pin(0, c.iova, c.length);
        EXPECT_EQ(pin.error, -EFAULT);
        EXPECT_EQ(pin.fault.reason, c.reason) << std::hex << c.iova;
    }
    EXPECT_EQ(rig.device(0).pins(), 0u);
    EXPECT_EQ(rig.cell(0)->pinned, 0u);
}

TEST_F(Pinning, EndsWhenAllSlotsAreHeld)
{
    std::vector<Pin> pins;
    std::set<unsigned> slots;
    for (unsigned i = 0; i < 16; ++i) {
        pins.push_back(rig.pin(0, i * page_size, page_size));
        ASSERT_EQ(pins.back().error, 0);
        slots.insert(pins.back().slot);
    }
    EXPECT_EQ(slots.size(), 16u);
    EXPECT_EQ(rig.pin(0, 0, page_size).error, -EAGAIN);
    finish(0, pins[5]);
    const Pin again = rig.pin(0, 0, page_size);
    EXPECT_EQ(again.error, 0);
    EXPECT_EQ(again.slot, pins[5].slot);
    EXPECT_EQ(rig.cell(0)->pinned, 16u);
}

// ---- who waits

TEST_F(Pinning, AnUnmapWaitsForItAndNothingElseDoes)
{
    const Pin pin = rig.pin(0, 0, page_size);
    const Op &unmap = rig.submit_unmap(0, 2 * page_size);
    rig.settle();
    EXPECT_FALSE(unmap.over());

    EXPECT_EQ(rig.unmap(page_size * 16, page_size), 0);
    EXPECT_EQ(rig.map(GiB, page_size, 0), 0);
    rig.write(1, 8 * page_size, page_size);
    rig.settle();
    EXPECT_GT(rig.drain(), 0u);
    EXPECT_EQ(rig.disable(), 0);
    EXPECT_EQ(rig.enable(), 0);
    EXPECT_FALSE(unmap.over());

    finish(0, pin);
    EXPECT_TRUE(rig.run(unmap));
    EXPECT_EQ(unmap.result, 0);
    rig.note_unmapped(unmap);
    expect_nothing_lost();
}

TEST_F(Pinning, AnUnmapWaitsForOneThatReads)
{
    const Pin pin = rig.pin(0, 0, page_size, false);
    const Op &unmap = rig.submit_unmap(0, page_size, Harvest::discard);
    rig.settle();
    EXPECT_FALSE(unmap.over());
    rig.unpin(0, pin);
    EXPECT_TRUE(rig.run(unmap));
}

TEST_F(Pinning, ASyncWaitsForThoseThatWrite)
{
    const Pin reads = rig.pin(0, 0, page_size, false);
    EXPECT_EQ(rig.sync(), 0);
    const Pin writes = rig.pin(0, 0, page_size);
    const Op &sync = rig.submit(0, OpKind::sync);
    rig.settle();
    EXPECT_FALSE(sync.over());
    finish(0, writes);
    EXPECT_TRUE(rig.run(sync));
    EXPECT_EQ(rig.lost(), 0u);
    rig.unpin(0, reads);
}

// Else a device that always has something in flight would let no sync end.
TEST_F(Pinning, ASyncWaitsForNoneTakenAfterIt)
{
    const Pin before = rig.pin(0, 0, page_size);
    const Op &sync = rig.submit(0, OpKind::sync);
    rig.settle();
    const Pin after = rig.pin(1, 0, page_size);
    finish(0, before);
    EXPECT_TRUE(rig.run(sync));
    finish(1, after);
    expect_nothing_lost();
}

TEST_F(Pinning, SlicesOfOtherRangesAreNotWaitedFor)
{
    const Pin pin = rig.pin(0, 0, page_size);
    EXPECT_EQ(rig.unmap(page_size, mapped - page_size), 0);
    finish(0, pin);
    expect_nothing_lost();
}

// Six can wait aside, the others in front of what comes behind them.
TEST_F(Pinning, MoreUnmapsThanCanBeClosedAtOnce)
{
    constexpr unsigned many = DR_CLOSED_MAX + 3;
    std::vector<Pin> pins;
    std::vector<const Op *> unmaps;
    for (unsigned i = 0; i < many; ++i) {
        pins.push_back(rig.pin(0, 2 * i * page_size, page_size));
        unmaps.push_back(&rig.submit_unmap(2 * i * page_size, page_size));
    }
    rig.settle();
    rig.write(1, mapped - page_size, page_size);
    rig.settle();
    EXPECT_GT(rig.drain(), 0u) << "a sweep waits for them";
    for (unsigned i = many; i-- > 0;) {
        finish(0, pins[i]);
        rig.settle();
    }
    for (const Op *unmap : unmaps) {
        EXPECT_TRUE(rig.run(*unmap));
        rig.note_unmapped(*unmap);
    }
    expect_nothing_lost();
    EXPECT_EQ(rig.pin(0, 32 * page_size, page_size).error, 0) << "a range is still closed";
}

TEST_F(Pinning, ASyncCoversTheUnmapsBeforeIt)
{
    const Pin pin = rig.pin(0, 0, page_size, false);
    rig.write(1, 0, page_size);
    const Op &unmap = rig.submit_unmap(0, page_size, Harvest::deferred);
    const Op &sync = rig.submit(0, OpKind::sync);
    EXPECT_EQ(rig.unmap(16 * page_size, page_size), 0); // one behind it does not count
    rig.settle();
    EXPECT_FALSE(sync.over());
    rig.unpin(0, pin);
    EXPECT_TRUE(rig.run(sync));
    EXPECT_TRUE(unmap.over());
    EXPECT_EQ(rig.lost(), 0u);
}

// ---- the closed range

TEST_F(Pinning, WhatIsBeingUnmappedIsNotPinned)
{
    const Pin held = rig.pin(0, 0, page_size);
    const Op &unmap = rig.submit_unmap(0, 4 * page_size);
    rig.settle();
    for (const std::uint64_t page : {0, 3}) {
        const Pin pin = rig.pin(1, page * page_size, page_size);
        EXPECT_EQ(pin.error, -EFAULT);
        EXPECT_EQ(pin.fault.reason, iommu::FaultReason::closed);
    }
    const Pin beside = rig.pin(1, 4 * page_size, page_size);
    EXPECT_EQ(beside.error, 0);
    EXPECT_EQ(rig.write(1, 0, page_size).reason, iommu::FaultReason::none) << "a section may still write there";
    finish(0, held);
    EXPECT_TRUE(rig.run(unmap));
    rig.note_unmapped(unmap);
    EXPECT_EQ(rig.pin(1, 0, page_size).fault.reason, iommu::FaultReason::not_present);
    EXPECT_EQ(rig.map(0, page_size, 0), 0);
    EXPECT_EQ(rig.pin(1, 0, page_size).error, 0);
    finish(1, beside);
}

// A device that attaches while an unmap is half done could pin what it has not come to yet.
TEST_F(Pinning, ADeviceThatComesDuringAnUnmapFindsItClosed)
{
    rig.detach(0);
    rig.detach(1);
    const Op &unmap = rig.submit_unmap(0, mapped);
    rig.step();
    ASSERT_FALSE(unmap.over());
    rig.attach(1);
    const Pin pin = rig.pin(1, mapped - page_size, page_size);
    EXPECT_EQ(pin.fault.reason, iommu::FaultReason::closed);
    EXPECT_TRUE(rig.run(unmap));
    rig.note_unmapped(unmap);
    EXPECT_EQ(rig.map(0, page_size, 0), 0);
    EXPECT_EQ(rig.pin(1, 0, page_size).error, 0);
}

// As many unmaps wait as can, another has begun while no device could pin: there must be a range left to close for it.
TEST_F(Pinning, ADeviceThatComesFindsARangeToClose)
{
    std::vector<Pin> pins;
    std::vector<const Op *> unmaps;
    for (unsigned i = 0; i < DR_CLOSED_MAX; ++i) {
        pins.push_back(rig.pin(0, 2 * i * page_size, page_size));
        unmaps.push_back(&rig.submit_unmap(2 * i * page_size, page_size));
    }
    rig.settle();
    const auto *control =
        reinterpret_cast<const dr_shard_control *>(rig.translation_memory() + rig.geometry.shard_controls);
    EXPECT_LT(control->closed[control->closing & 1].count, std::uint64_t{DR_CLOSED_MAX});
    for (unsigned i = 0; i < DR_CLOSED_MAX; ++i) {
        finish(0, pins[i]);
        EXPECT_TRUE(rig.run(*unmaps[i]));
        rig.note_unmapped(*unmaps[i]);
    }
    expect_nothing_lost();
}

// ---- devices that die, leave, or lie

TEST_F(Pinning, ADeadDevicesWritesAreReported)
{
    const Pin pin = rig.pin(0, 0, 5 * page_size);
    const Pin reads = rig.pin(0, 32 * page_size, page_size, false);
    rig.land(pin);
    const Op &unmap = rig.submit_unmap(0, 2 * page_size);
    const Op &sync = rig.submit(0, OpKind::sync);
    rig.settle();
    EXPECT_FALSE(unmap.over());
    rig.bury(0);
    EXPECT_TRUE(rig.run(unmap));
    EXPECT_TRUE(rig.run(sync));
    rig.note_unmapped(unmap);
    EXPECT_EQ(rig.lost(), 0u);
    EXPECT_EQ(rig.pages_reported, 5u) << "what it had pinned for reading is not dirty";
}

TEST_F(Pinning, AnotherDevicesDeathDisturbsNoWait)
{
    const Pin pin = rig.pin(1, 0, page_size);
    const Op &unmap = rig.submit_unmap(0, page_size);
    const Op &sync = rig.submit(0, OpKind::sync);
    rig.settle();
    rig.bury(0);
    rig.settle();
    EXPECT_FALSE(unmap.over());
    EXPECT_FALSE(sync.over());
    finish(1, pin);
    EXPECT_TRUE(rig.run(unmap));
    EXPECT_TRUE(rig.run(sync));
    rig.note_unmapped(unmap);
    expect_nothing_lost();
}

// A walker does not sleep before a full ring as long as there are leaves to mark: the device's cells and slots are held
// until then, and its consumer may never release.
TEST(PinsOfADeadDevice, AreMarkedBeforeAFullRing)
{
    Rig rig({.leaf_lg2_max = 12, .capacity = 8});
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    const Pin pin = rig.pin(0, 0, 5 * page_size);
    ASSERT_EQ(pin.error, 0);
    for (unsigned i = 0; i < 32; ++i)
        rig.write(1, (16 + 2 * i) * page_size, page_size);
    rig.settle();
    ASSERT_FALSE(rig.shard().prepare_sleep(rig.now).busy) << "the ring is full";
    rig.shard().wake();
    rig.bury(0);
    EXPECT_TRUE(rig.shard().prepare_sleep(rig.now).busy);
    rig.shard().wake();
}

// Slots are hostile memory: whatever stands there, the device's own guest waits or has more reported, and that is all.
TEST_F(Pinning, NonsenseInSlots)
{
    struct Nonsense {
        std::uint64_t start;
        std::uint64_t last;
    };
    unsigned i = 0;
    for (const Nonsense &n : {Nonsense{0, UINT64_MAX}, Nonsense{UINT64_MAX, 0}, Nonsense{UINT64_MAX, UINT64_MAX},
                              Nonsense{1ull << 39, 1ull << 40}, Nonsense{123, 124}, Nonsense{mapped - 1, mapped + 1}}) {
        slot(0, i) = {1, n.start, n.last, 0x5555};
        ++i;
    }
    rig.cell(0)->pinned = UINT64_MAX;
    const Op &unmap = rig.submit_unmap(0, page_size);
    rig.settle();
    EXPECT_FALSE(unmap.over());
    rig.bury(0);
    EXPECT_TRUE(rig.run(unmap));
    rig.note_unmapped(unmap);
    expect_nothing_lost();
    EXPECT_EQ(rig.stray, 0u);
    EXPECT_GE(rig.pages_reported, mapped / page_size - 1) << "the slot that claimed everything";
}

TEST_F(Pinning, CancelCompletesWhatWaits)
{
    const Pin pin = rig.pin(0, 0, page_size);
    const Op &unmap = rig.submit_unmap(0, page_size);
    const Op &sync = rig.submit(0, OpKind::sync);
    rig.settle();
    rig.shard().cancel();
    EXPECT_EQ(unmap.result, -ECANCELED);
    EXPECT_EQ(sync.result, -ECANCELED);
    rig.unpin(0, pin);
}

// ---- sleep

TEST_F(Pinning, AWalkerThatWaitsForPinsSleeps)
{
    const Pin pin = rig.pin(0, 0, page_size);
    const Op &unmap = rig.submit_unmap(0, page_size);
    const Op &sync = rig.submit(0, OpKind::sync);
    SleepyWalker walker(rig);
    ASSERT_TRUE(walker.run());
    EXPECT_EQ(walker.wake_at(), UINT64_MAX) << "it looks again on a timer";
    rig.land(pin);
    rig.unpin(0, pin);
    EXPECT_TRUE(walker.run_until_idle());
    EXPECT_TRUE(unmap.over());
    EXPECT_TRUE(sync.over());
}

TEST_F(Pinning, NobodyIsRungForAPinThatNobodyWaitsFor)
{
    SleepyWalker walker(rig);
    ASSERT_TRUE(walker.run());
    const Pin pin = rig.pin(0, 0, page_size, false);
    rig.rung = 0;
    rig.unpin(0, pin);
    EXPECT_EQ(rig.rung, 0u);
}

// ---- many of them

struct Many : Pinning {
    static constexpr unsigned pins = 1024;
    Many() : Pinning({.leaf_lg2_max = 12, .capacity = 64, .pins = pins}) {}

    // Steps from a page's D to its run in the ring.
    unsigned steps_to_publish(std::uint64_t iova)
    {
        rig.write(1, iova, page_size);
        unsigned steps = 0;
        while (rig.consumer().arm() && steps < 1000) {
            rig.step();
            ++steps;
        }
        rig.consumer().disarm();
        rig.drain();
        rig.settle();
        return steps;
    }
};

// A device has 1,024 reads from its disk in flight; its ring has 64 entries, and who reads it takes one at a time.
TEST_F(Many, PublishAsIfThereWereNone)
{
    const unsigned before = steps_to_publish(mapped - page_size);
    std::vector<Pin> held;
    for (unsigned i = 0; i < pins; ++i) {
        held.push_back(rig.pin(0, 4 * i * page_size, 2 * page_size));
        ASSERT_EQ(held.back().error, 0);
    }
    EXPECT_EQ(steps_to_publish(mapped - page_size), before) << "pins delay publishing";

    const Op &unmap = rig.submit_unmap(4 * 100 * page_size, page_size);
    EXPECT_EQ(rig.unmap(mapped - 8 * page_size, page_size), 0);
    EXPECT_EQ(steps_to_publish(mapped - page_size), before) << "an unmap that waits delays publishing";
    EXPECT_FALSE(unmap.over());

    for (const Pin &pin : held) {
        finish(0, pin);
        rig.step();
        rig.drain(0, 1);
    }
    EXPECT_TRUE(rig.run(unmap));
    rig.note_unmapped(unmap);
    expect_nothing_lost();
}

} // namespace
} // namespace dirtyring::test
