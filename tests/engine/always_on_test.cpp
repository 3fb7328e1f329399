// Hwpts whose devices set D from the start: what enable and disable are then, and what death and restart find.
#include "tests/engine/each_format.hpp"
#include "tests/engine/rig.hpp"

#include <gtest/gtest.h>

#include <string>

namespace dirtyring::test {
namespace {

constexpr std::uint64_t P = page_size;

// Formats that are so by themselves, and those that are asked to be.
class AlwaysOn : public testing::TestWithParam<unsigned>
{
  protected:
    [[nodiscard]] static RigOptions options(std::uint64_t memory = 64 * MiB)
    {
        const bool by_itself = iommu::with_format(GetParam(), [](auto f) { return bool{f.always_on}; });
        return {.format = GetParam(), .always_on = !by_itself, .leaf_lg2_max = 12, .memory = memory};
    }

    [[nodiscard]] static bool armed(const Rig &rig)
    {
        return iommu::with_format(GetParam(), [&](auto f) { return f.tracks(rig.view.context(0)); });
    }

    static std::uint64_t reported(Rig &rig)
    {
        rig.settle();
        const std::uint64_t before = rig.runs;
        rig.drain();
        return rig.runs - before;
    }
};

EACH_FORMAT(AlwaysOn);

TEST_P(AlwaysOn, DevicesMarkFromTheStart)
{
    Rig rig(options());
    EXPECT_TRUE(armed(rig));
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.write(0, 3 * P, 8).reason, iommu::FaultReason::none);
    EXPECT_TRUE(rig.is_dirty(3 * P));
    EXPECT_EQ(reported(rig), 0u);
}

TEST_P(AlwaysOn, EnableCleansWithoutReporting)
{
    Rig rig(options());
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    rig.write(0, 3 * P, 8);
    const std::uint64_t generation = rig.generation(0);
    ASSERT_EQ(rig.enable(), 0);
    EXPECT_FALSE(rig.is_dirty(3 * P));
    EXPECT_GT(rig.generation(0), generation) << "or what is cached dirty would be written unseen";
    EXPECT_EQ(reported(rig), 0u);
    rig.write(0, 3 * P, 8);
    EXPECT_EQ(reported(rig), 1u);
    EXPECT_EQ(rig.lost(), 0u);
}

// It writes between any two visits of the cleaning, by what it has cached and by what it has not.
TEST_P(AlwaysOn, NothingWrittenAfterTheReplyIsLost)
{
    Rig rig(options(256 * MiB));
    ASSERT_EQ(rig.map(0, 128 * MiB, 0), 0);
    const auto write = [&] {
        for (std::uint64_t at = 0; at < 128 * MiB; at += MiB)
            ASSERT_EQ(rig.write(0, at, 8).reason, iommu::FaultReason::none);
    };
    write();
    const Op &op = rig.submit(0, OpKind::enable);
    unsigned visits = 0;
    for (; !op.over(); ++visits) {
        rig.step();
        write();
    }
    EXPECT_GT(visits, 2u) << "a pass of several visits";
    rig.copy_all();
    write();
    ASSERT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.lost(), 0u);
}

TEST_P(AlwaysOn, EnableWaitsForADeviceInside)
{
    Rig rig(options());
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    rig.device(0).enter();
    rig.write_inside(0, 0, 8);
    const Op &op = rig.submit(0, OpKind::enable);
    rig.settle();
    EXPECT_FALSE(op.over()) << "it may write by what it has cached dirty";
    rig.write_inside(0, 0, 8);
    static_cast<void>(rig.device(0).leave());
    ASSERT_TRUE(rig.run(op, false));
    rig.copy_all();
    rig.write(0, 0, 8);
    ASSERT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.lost(), 0u);
}

TEST_P(AlwaysOn, DisableEndsTheReportingOnly)
{
    Rig rig(options());
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    for (unsigned i = 0; i < 3; ++i) {
        ASSERT_EQ(rig.enable(), 0);
        rig.write(0, 0, 8);
        EXPECT_EQ(reported(rig), 1u);
        rig.write(0, P, 8); // left dirty
        ASSERT_EQ(rig.disable(), 0);
        EXPECT_TRUE(armed(rig));
        rig.write(0, 2 * P, 8);
        EXPECT_TRUE(rig.is_dirty(2 * P));
        rig.write(0, 0, 8);
        EXPECT_EQ(reported(rig), 0u);
    }
    ASSERT_EQ(rig.unmap(0, MiB), 0);
    EXPECT_EQ(reported(rig), 0u) << "an unmap while nobody asks";
    EXPECT_EQ(rig.sync(), 0);
}

TEST_P(AlwaysOn, AWalkerThatNobodyAsksIsNotRung)
{
    Rig rig(options());
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    SleepyWalker walker(rig);
    ASSERT_TRUE(walker.run());
    rig.write(0, 0, 8);
    EXPECT_EQ(rig.rung, 0u);
    EXPECT_TRUE(walker.run_until_idle());
    ASSERT_EQ(rig.enable(), 0);
    ASSERT_TRUE(walker.run());
    rig.write(0, 0, 8);
    EXPECT_EQ(rig.rung, 1u);
}

TEST_P(AlwaysOn, DeathWhileNobodyAsksOwesNothing)
{
    Rig rig(options());
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    rig.write(0, 0, 8);
    const Pin pin = rig.pin(0, P, P);
    ASSERT_EQ(pin.error, 0);
    rig.land(pin);
    rig.device(0).enter();
    rig.write_inside(0, 2 * P, 8);
    rig.bury(0);
    EXPECT_TRUE(rig.state().dying.empty());
    ASSERT_EQ(rig.enable(), 0);
    EXPECT_EQ(reported(rig), 0u);
    rig.write(1, 0, 8);
    ASSERT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.lost(), 0u);
}

TEST_P(AlwaysOn, DeathWhileEnabledReportsWhatWasPinned)
{
    Rig rig(options());
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    const Pin pin = rig.pin(0, P, P);
    ASSERT_EQ(pin.error, 0);
    rig.land(pin);
    rig.bury(0);
    ASSERT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.lost(), 0u);
}

// The pages of a map that only allows reading are not reported, nor made writable by their death.
TEST_P(AlwaysOn, DeathWithAPinOfWhatCannotBeWritten)
{
    Rig rig(options());
    ASSERT_EQ(rig.map(0, MiB, 0, {true, false}), 0);
    ASSERT_EQ(rig.enable(), 0);
    const iommu::DmaThreads threads = rig.threads(0);
    threads.pins[0] = {1, 0, MiB - 1, 1}; // as no engine would
    threads.cells[0].pinned = 1;
    rig.bury(0);
    EXPECT_EQ(reported(rig), 0u);
    EXPECT_EQ(rig.write(1, 0, 8).reason, iommu::FaultReason::write_denied);
}

TEST_P(AlwaysOn, ARestartReportsOnAndAsksForNothingMore)
{
    Rig rig(options());
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    rig.write(0, 0, 8);
    rig.restart();
    EXPECT_TRUE(armed(rig));
    EXPECT_EQ(reported(rig), 0u) << "nobody had asked";
    ASSERT_EQ(rig.enable(), 0);
    rig.write(0, 0, 8);
    rig.restart();
    EXPECT_TRUE(armed(rig));
    EXPECT_EQ(reported(rig), 1u);
    EXPECT_EQ(rig.lost(), 0u);
    ASSERT_EQ(rig.disable(), 0);
    rig.write(0, 0, 8);
    rig.restart();
    EXPECT_TRUE(armed(rig));
    EXPECT_EQ(reported(rig), 0u);
}

// However far enable, or disable, has come.
TEST_P(AlwaysOn, ARestartDoesAgainWhatWasBegun)
{
    for (unsigned steps = 0; steps < 8; ++steps) {
        Rig rig(options(32 * MiB));
        ASSERT_EQ(rig.map(0, 32 * MiB, 0), 0);
        const auto write = [&] {
            for (std::uint64_t at = 0; at < 32 * MiB; at += MiB)
                rig.write(0, at, 8);
        };
        const auto change = [&](OpKind kind) {
            const Op &op = rig.submit(0, kind);
            for (unsigned i = 0; i < steps; ++i) {
                rig.step();
                write();
            }
            rig.restart();
            write();
            ASSERT_TRUE(rig.run(op, false)) << steps;
        };
        write();
        change(OpKind::enable);
        rig.copy_all();
        write();
        ASSERT_EQ(rig.sync(), 0);
        EXPECT_EQ(rig.lost(), 0u) << steps;
        change(OpKind::disable);
        rig.drain();
        EXPECT_TRUE(armed(rig));
        write();
        EXPECT_EQ(reported(rig), 0u) << steps;
    }
}

} // namespace
} // namespace dirtyring::test
