// The owner's side of the tables, as a device's walk sees it.
#include "tests/rig.hpp"

#include <gtest/gtest.h>

#include <cerrno>

namespace dirtyring::test {
namespace {

constexpr std::uint64_t P = page_size;

// The level of the leaf at iova.
unsigned leaf_level(const Rig &rig, std::uint64_t iova)
{
    for (unsigned level = iommu::leaf_level_max + 1; level-- > 0;) {
        const std::uint64_t *e = rig.entry(iova, level);
        if (e == nullptr)
            break;
        if (iommu::AmdV1::decode(*e, level).kind == iommu::EntryKind::leaf)
            return level;
    }
    ADD_FAILURE() << "not mapped: " << std::hex << iova;
    return 99;
}

bool reachable(Rig &rig, std::uint64_t iova)
{
    return rig.read(0, iova, 8).reason == iommu::FaultReason::none;
}

TEST(Leaves, AreTheLargestThatFit)
{
    Rig rig({.memory = 4 * GiB});
    ASSERT_EQ(rig.map(GiB - 2 * MiB - P, GiB + 4 * MiB + 2 * P, GiB - 2 * MiB - P), 0);
    EXPECT_EQ(leaf_level(rig, GiB - 2 * MiB - P), 0u);
    EXPECT_EQ(leaf_level(rig, GiB - 2 * MiB), 1u);
    EXPECT_EQ(leaf_level(rig, GiB), 2u);
    EXPECT_EQ(leaf_level(rig, 2 * GiB), 1u);
    EXPECT_EQ(leaf_level(rig, 2 * GiB + 2 * MiB), 0u);
    EXPECT_FALSE(reachable(rig, GiB - 2 * MiB - 2 * P));
    EXPECT_FALSE(reachable(rig, 2 * GiB + 2 * MiB + P));
}

TEST(Leaves, NeedAnAlignedOa)
{
    Rig rig({.memory = 4 * GiB});
    ASSERT_EQ(rig.map(0, GiB, 2 * MiB), 0);
    EXPECT_EQ(leaf_level(rig, 0), 1u);
    ASSERT_EQ(rig.map(GiB, 4 * MiB, P), 0);
    EXPECT_EQ(leaf_level(rig, GiB), 0u);
    EXPECT_EQ(leaf_level(rig, GiB + 2 * MiB), 0u);
}

TEST(Leaves, AreLimited)
{
    for (const unsigned limit : {12u, 21u, 30u}) {
        Rig rig({.leaf_lg2_max = limit, .memory = GiB});
        ASSERT_EQ(rig.map(0, GiB, 0), 0);
        EXPECT_EQ(leaf_level(rig, 0), (limit - 12) / 9);
        EXPECT_EQ(leaf_level(rig, GiB - P), (limit - 12) / 9);
    }
}

TEST(Leaves, CarryTheirRights)
{
    Rig rig;
    ASSERT_EQ(rig.map(0, P, 0, {true, false}), 0);
    ASSERT_EQ(rig.map(P, P, P, {false, true}), 0);
    EXPECT_EQ(rig.write(0, 0, 8).reason, iommu::FaultReason::write_denied);
    EXPECT_EQ(rig.read(0, 0, 8).reason, iommu::FaultReason::none);
    EXPECT_EQ(rig.write(0, 0, 8).reason, iommu::FaultReason::write_denied) << "by the IOTLB";
    EXPECT_EQ(rig.read(0, P, 8).reason, iommu::FaultReason::read_denied);
    EXPECT_EQ(rig.write(0, P, 8).reason, iommu::FaultReason::none);
}

TEST(Faults, SayWhereAndHowFar)
{
    Rig rig({.aperture_lg2 = 30});
    ASSERT_EQ(rig.map(0, 2 * P, 0), 0);
    const iommu::DmaFault f = rig.write(0, P + 16, 3 * P);
    EXPECT_EQ(f.reason, iommu::FaultReason::not_present);
    EXPECT_EQ(f.iova, 2 * P);
    EXPECT_EQ(f.done, P - 16);
    EXPECT_TRUE(f.write);
    EXPECT_EQ(rig.read(0, GiB, 8).reason, iommu::FaultReason::aperture);
    EXPECT_EQ(rig.read(0, UINT64_MAX - 3, 8).reason, iommu::FaultReason::aperture);
    ASSERT_EQ(rig.map(4 * P, P, 100 * MiB), 0); // beyond the guest's memory; the control plane would refuse it
    EXPECT_EQ(rig.read(0, 4 * P, 8).reason, iommu::FaultReason::memory);
}

class Aperture : public testing::TestWithParam<unsigned>
{
};

TEST_P(Aperture, FirstAndLastPage)
{
    const std::uint64_t end = 1ull << GetParam();
    for (const unsigned shards : {1u, 64u}) {
        if (end / shards < GiB)
            continue;
        Rig rig({.aperture_lg2 = GetParam(), .shards = shards});
        ASSERT_EQ(rig.map(0, P, 0), 0);
        ASSERT_EQ(rig.map(end - P, P, P), 0);
        ASSERT_EQ(rig.map(end - 4 * MiB, 2 * MiB, 2 * MiB), 0);
        ASSERT_EQ(rig.enable(), 0);
        for (const std::uint64_t iova : {std::uint64_t{0}, end - P, end - 4 * MiB})
            EXPECT_EQ(rig.write(0, iova, 8).reason, iommu::FaultReason::none);
        EXPECT_EQ(rig.write(0, end, 8).reason, iommu::FaultReason::aperture);
        EXPECT_EQ(rig.write(0, end - 2 * P, 8).reason, iommu::FaultReason::not_present);
        ASSERT_EQ(rig.sync(), 0);
        EXPECT_EQ(rig.lost(), 0u);
        ASSERT_EQ(rig.unmap(end - 4 * MiB, 4 * MiB), 0);
        EXPECT_FALSE(reachable(rig, end - P));
        EXPECT_TRUE(reachable(rig, 0));
    }
}

// 1 GiB leaves live in tables that shards share.
TEST_P(Aperture, GigabyteLeafAtItsEnd)
{
    if (GetParam() == 30)
        GTEST_SKIP() << "one leaf";
    const std::uint64_t end = 1ull << GetParam();
    for (const unsigned shards : {1u, 2u}) {
        Rig rig({.aperture_lg2 = GetParam(), .shards = shards, .memory = 2 * GiB});
        ASSERT_EQ(rig.map(0, GiB, 0), 0);
        ASSERT_EQ(rig.map(end - GiB, GiB, GiB), 0);
        ASSERT_EQ(rig.enable(), 0);
        rig.write(0, end - P, P);
        rig.settle();
        for (unsigned i = 0; i < shards; ++i) {
            const auto entries = rig.consumer(i).peek();
            ASSERT_EQ(entries.size(), i == shards - 1 ? 1u : 0u);
            if (!entries.empty()) {
                EXPECT_EQ(entries[0], dr_run(GiB >> 12, true, 512));
            }
        }
    }
}

INSTANTIATE_TEST_SUITE_P(Lg2, Aperture, testing::Values(30u, 39u, 40u, 48u),
                         [](const auto &info) { return std::to_string(info.param); });

// However early memory for tables runs out: the map fails whole, and works once there is memory.
TEST(Reserve, FailsWithNothingHalfDone)
{
    for (std::uint64_t steps = 0;; ++steps) {
        Rig rig({.aperture_lg2 = 32, .leaf_lg2_max = 12, .memory = 4 * GiB});
        rig.present_steps = steps;
        const std::uint64_t start = 100 * MiB + 3 * P;
        const std::uint64_t length = 3 * GiB; // several chunks of tables
        const int result = rig.map(start, length, 0);
        if (result == 0)
            break;
        ASSERT_EQ(result, -ENOMEM);
        for (std::uint64_t at = start; at < start + length; at += 64 * MiB - P)
            ASSERT_FALSE(reachable(rig, at));
        rig.present_steps = UINT64_MAX;
        ASSERT_EQ(rig.map(start, P, 0), 0);
        EXPECT_TRUE(reachable(rig, start));
        ASSERT_LT(steps, 100u);
    }
}

TEST(Unmap, MixedLeavesAndHoles)
{
    Rig rig({.memory = 4 * GiB});
    ASSERT_EQ(rig.map(GiB - 2 * MiB - P, GiB + 4 * MiB + 2 * P, GiB - 2 * MiB - P), 0);
    ASSERT_EQ(rig.map(3 * GiB, P, 0), 0);
    ASSERT_EQ(rig.unmap(0, 8 * GiB), 0);
    for (const std::uint64_t iova : {GiB - 2 * MiB - P, GiB - 2 * MiB, GiB, 2 * GiB, 2 * GiB + 2 * MiB, 3 * GiB})
        EXPECT_FALSE(reachable(rig, iova)) << std::hex << iova;
    ASSERT_EQ(rig.map(0, 2 * GiB, 0), 0);
    EXPECT_TRUE(reachable(rig, 2 * GiB - P));
}

// The device may be in the middle of a walk through a table that is taken out.
TEST(Tables, AreNotReusedWhileADeviceIsInside)
{
    Rig rig({.aperture_lg2 = 30, .leaf_lg2_max = 12, .memory = GiB});
    ASSERT_EQ(rig.map(0, GiB, 0), 0);
    rig.device(0).enter();
    const std::uint64_t generation = rig.generation(0);
    const Op &op = rig.submit_unmap(0, GiB);
    EXPECT_FALSE(rig.run(op, false));
    EXPECT_GT(rig.generation(0), generation);
    static_cast<void>(rig.device(0).leave());
    EXPECT_TRUE(rig.run(op, false));
}

} // namespace
} // namespace dirtyring::test
