// The owner's side of the tables, as a device's walk sees it.
#include "tests/engine/each_format.hpp"
#include "tests/engine/rig.hpp"

#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>
#include <vector>

namespace dirtyring::test {
namespace {

constexpr std::uint64_t P = page_size;

class Leaves : public EachFormat
{
};
EACH_FORMAT(Leaves);
class Faults : public EachFormat
{
};
EACH_FORMAT(Faults);
class Reserve : public EachFormat
{
};
EACH_FORMAT(Reserve);
class Unmap : public EachFormat
{
};
EACH_FORMAT(Unmap);
class Tables : public EachFormat
{
};
EACH_FORMAT(Tables);

// The level of the leaf at iova.
unsigned leaf_level(const Rig &rig, std::uint64_t iova)
{
    for (unsigned level = iommu::leaf_level_max + 1; level-- > 0;) {
        const std::uint64_t *e = rig.entry(iova, level);
        if (e == nullptr)
            break;
        if (rig.decode(*e, level).kind == iommu::EntryKind::leaf)
            return level;
    }
    ADD_FAILURE() << "not mapped: " << std::hex << iova;
    return 99;
}

bool reachable(Rig &rig, std::uint64_t iova)
{
    return rig.read(0, iova, 8).reason == iommu::FaultReason::none;
}

TEST_P(Leaves, AreTheLargestThatFit)
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

TEST_P(Leaves, NeedAnAlignedOa)
{
    Rig rig({.memory = 4 * GiB});
    ASSERT_EQ(rig.map(0, GiB, 2 * MiB), 0);
    EXPECT_EQ(leaf_level(rig, 0), 1u);
    ASSERT_EQ(rig.map(GiB, 4 * MiB, P), 0);
    EXPECT_EQ(leaf_level(rig, GiB), 0u);
    EXPECT_EQ(leaf_level(rig, GiB + 2 * MiB), 0u);
}

TEST_P(Leaves, AreLimited)
{
    for (const unsigned limit : {12u, 21u, 30u}) {
        Rig rig({.leaf_lg2_max = limit, .memory = GiB});
        ASSERT_EQ(rig.map(0, GiB, 0), 0);
        EXPECT_EQ(leaf_level(rig, 0), (limit - 12) / 9);
        EXPECT_EQ(leaf_level(rig, GiB - P), (limit - 12) / 9);
    }
}

TEST_P(Leaves, CarryTheirRights)
{
    Rig rig;
    ASSERT_EQ(rig.map(0, P, 0, {true, false}), 0);
    ASSERT_EQ(rig.map(P, P, P, {false, true}), 0);
    EXPECT_EQ(rig.write(0, 0, 8).reason, iommu::FaultReason::write_denied);
    EXPECT_EQ(rig.read(0, 0, 8).reason, iommu::FaultReason::none);
    EXPECT_EQ(rig.write(0, 0, 8).reason, iommu::FaultReason::write_denied) << "by the IOTLB";
    EXPECT_EQ(rig.read(0, P, 8).reason,
              default_format == iommu::SmmuV3S1::id ? iommu::FaultReason::none : iommu::FaultReason::read_denied);
    EXPECT_EQ(rig.write(0, P, 8).reason, iommu::FaultReason::none);
}

// Entries are as they were mapped: hardware sets neither A nor D, and a map for writing needs neither.
TEST_P(Leaves, AreLeftAloneWhileTheContextIsOff)
{
    for (const bool tracked : {false, true}) {
        if (tracked && always_on())
            continue;
        Rig rig({.tracked = tracked, .leaf_lg2_max = 12});
        ASSERT_EQ(rig.map(0, 2 * P, 0), 0);
        std::vector<std::uint64_t> before;
        for (unsigned level = 0; level <= rig.geometry.root_level; ++level)
            before.push_back(*rig.entry(0, level));
        EXPECT_EQ(rig.read(0, 0, 8).reason, iommu::FaultReason::none);
        EXPECT_EQ(rig.write(0, 0, 8).reason, iommu::FaultReason::none);
        for (unsigned level = 0; level <= rig.geometry.root_level; ++level)
            EXPECT_EQ(*rig.entry(0, level), before[level]) << level;
    }
}

// As nobody maps it: leaves to be tracked, and hardware that does not.
TEST_P(Leaves, NeedTheHardwareTheyAreMadeFor)
{
    Rig rig({.tracked = false, .leaf_lg2_max = 12});
    ASSERT_EQ(rig.map(0, P, 0), 0);
    *rig.entry(0, 0) =
        iommu::with_format(default_format, [](auto f) { return f.accessed(f.leaf(0, 12, read_write), false); });
    EXPECT_EQ(rig.read(0, 0, 8).reason, iommu::FaultReason::none);
    EXPECT_EQ(rig.write(0, 0, 8).reason, always_on() ? iommu::FaultReason::write_denied : iommu::FaultReason::none);
}

// Each replica is the leaf; D is set in the one that the walk found.
TEST(Replicas, AreMarkedOneByOne)
{
    using F = iommu::AmdV1;
    struct Size {
        unsigned lg2;
        std::uint64_t iova; // of the leaf
    };
    for (const Size size : {Size{13, 8 * P}, Size{16, 64 * KiB}, Size{20, 3 * MiB}, Size{22, 4 * MiB},
                            Size{25, 32 * MiB}, Size{29, GiB}, Size{31, 4 * GiB}}) {
        const unsigned level = iommu::leaf_level(size.lg2);
        const unsigned replicas = 1u << (size.lg2 - iommu::entry_lg2(level));
        const std::uint64_t length = 1ull << size.lg2;
        Rig rig({.leaf_lg2_max = iommu::entry_lg2(level), .memory = 2 * length});
        ASSERT_EQ(rig.map(size.iova, length, length), 0);
        ASSERT_EQ(rig.enable(), 0);
        for (unsigned i = 0; i < replicas; ++i)
            *rig.entry(size.iova + (std::uint64_t{i} << iommu::entry_lg2(level)), level) =
                F::leaf(length, size.lg2, read_write);
        for (const std::uint64_t offset : {length - P, std::uint64_t{0}}) {
            const std::uint64_t word = offset + 1;
            rig.device().enter();
            EXPECT_EQ(rig.device().write(size.iova + offset, &word, sizeof word).reason, iommu::FaultReason::none);
            static_cast<void>(rig.device().leave());
            EXPECT_EQ(peek_word(rig.source.data() + length + offset), word) << size.lg2;
            for (unsigned i = 0; i < replicas; ++i) {
                const std::uint64_t start = std::uint64_t{i} << iommu::entry_lg2(level);
                const bool last = start + (1ull << iommu::entry_lg2(level)) == length;
                const bool first = offset == 0 && i == 0 && size.lg2 != 16; // of 64 KiB, cached as one piece
                const bool written = last || first;
                EXPECT_EQ(rig.is_dirty(size.iova + start), written) << size.lg2 << ' ' << i;
            }
        }
        // All of it in one go, by what is cached and what is not.
        std::vector<std::byte> data(std::min(length, 4 * MiB), std::byte{1});
        rig.device().enter();
        EXPECT_EQ(rig.device().write(size.iova, data.data(), data.size()).reason, iommu::FaultReason::none);
        static_cast<void>(rig.device().leave());
        EXPECT_EQ(std::memcmp(rig.source.data() + length, data.data(), data.size()), 0) << size.lg2;
    }
}

TEST_P(Faults, SayWhereAndHowFar)
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

class Aperture : public EachFormat
{
};
EACH_FORMAT(Aperture);

TEST_P(Aperture, FirstAndLastPage)
{
    for (const unsigned lg2 : {21u, 22u, 30u, 39u, 40u, 48u}) {
        for (const unsigned shards : {1u, 64u}) {
            const std::uint64_t end = 1ull << lg2;
            if (shards > iommu::shards_most(lg2))
                continue;
            Rig rig({.aperture_lg2 = lg2, .shards = shards});
            ASSERT_EQ(rig.map(0, P, 0), 0);
            ASSERT_EQ(rig.map(end - P, P, P), 0);
            const std::uint64_t third = lg2 < 30 ? end - 4 * P : end - 4 * MiB;
            ASSERT_EQ(rig.map(third, lg2 < 30 ? P : 2 * MiB, 2 * MiB), 0);
            ASSERT_EQ(rig.enable(), 0);
            for (const std::uint64_t iova : {std::uint64_t{0}, end - P, third})
                EXPECT_EQ(rig.write(0, iova, 8).reason, iommu::FaultReason::none) << lg2;
            EXPECT_EQ(rig.write(0, end, 8).reason, iommu::FaultReason::aperture) << lg2;
            EXPECT_EQ(rig.write(0, end - 2 * P, 8).reason, iommu::FaultReason::not_present) << lg2;
            ASSERT_EQ(rig.sync(), 0);
            EXPECT_EQ(rig.lost(), 0u) << lg2;
            ASSERT_EQ(rig.unmap(third, end - third), 0);
            EXPECT_FALSE(reachable(rig, end - P)) << lg2;
            EXPECT_TRUE(reachable(rig, 0)) << lg2;
        }
    }
}

// 1 GiB leaves live in tables that shards share.
TEST_P(Aperture, GigabyteLeafAtItsEnd)
{
    for (const unsigned lg2 : {39u, 40u, 48u}) {
        for (const unsigned shards : {1u, 2u}) {
            const std::uint64_t end = 1ull << lg2;
            Rig rig({.aperture_lg2 = lg2, .shards = shards, .memory = 2 * GiB});
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
}

// Every number of levels that the format has: the root may be any table, also one of the slice's own.
TEST_P(Aperture, OfAnyNumberOfLevels)
{
    const auto [fewest, most] = iommu::with_format(default_format, [](auto f) {
        return std::pair{unsigned{f.levels_min}, unsigned{f.levels_max}};
    });
    for (unsigned levels = fewest; levels <= most; ++levels) {
        for (const unsigned lg2 : {21u, 30u, 39u, 48u}) {
            if (levels < iommu::levels_needed(lg2))
                continue;
            Rig rig({.levels = levels, .aperture_lg2 = lg2, .leaf_lg2_max = 21, .memory = 2 * GiB});
            EXPECT_EQ(rig.geometry.root_level, levels - 1);
            const std::uint64_t length = std::min(GiB, std::uint64_t{1} << lg2);
            const std::uint64_t last = (1ull << lg2) - length;
            for (unsigned i = 0; i < 3; ++i) { // unmapping it whole leaves the root
                ASSERT_EQ(rig.map(last, length, GiB), 0);
                ASSERT_EQ(rig.enable(), 0);
                EXPECT_EQ(rig.write(0, (1ull << lg2) - P, 8).reason, iommu::FaultReason::none) << levels << ' ' << lg2;
                if (i == 1)
                    rig.restart();
                ASSERT_EQ(rig.sync(), 0);
                EXPECT_EQ(rig.lost(), 0u) << levels << ' ' << lg2;
                ASSERT_EQ(rig.disable(), 0);
                ASSERT_EQ(rig.unmap(last, length), 0);
                EXPECT_FALSE(reachable(rig, last));
            }
        }
    }
}

// However early memory for tables runs out: the map fails whole, and works once there is memory.
TEST_P(Reserve, FailsWithNothingHalfDone)
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

// Whatever makes no tables works without any memory left.
TEST_P(Reserve, IsForMapsOnly)
{
    Rig rig({.leaf_lg2_max = 12});
    ASSERT_EQ(rig.map(0, 16 * MiB, 0), 0);
    rig.present_steps = 0;
    EXPECT_EQ(rig.map(GiB, 16 * MiB, 16 * MiB), -ENOMEM);
    EXPECT_EQ(rig.enable(), 0);
    rig.write(0, 0, 8 * P);
    EXPECT_EQ(rig.sync(), 0);
    EXPECT_EQ(rig.lost(), 0u);
    EXPECT_EQ(rig.unmap(0, 16 * MiB), 0);
    EXPECT_EQ(rig.disable(), 0);
}

TEST_P(Unmap, MixedLeavesAndHoles)
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
TEST_P(Tables, AreNotReusedWhileADeviceIsInside)
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
