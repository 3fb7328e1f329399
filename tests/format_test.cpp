// AMD v1, bit by bit.
#include "iommu/format_amdv1.hpp"

#include <gtest/gtest.h>

namespace dirtyring::iommu {
namespace {

constexpr std::uint64_t bit(unsigned n)
{
    return 1ull << n;
}

TEST(AmdV1, LeafBits)
{
    EXPECT_EQ(AmdV1::leaf(0x12345000, 0, {true, true}), 0x12345000 | bit(0) | bit(61) | bit(62));
    EXPECT_EQ(AmdV1::leaf(0x12345000, 0, {true, false}), 0x12345000 | bit(0) | bit(61));
    EXPECT_EQ(AmdV1::leaf(0x12345000, 0, {false, true}), 0x12345000 | bit(0) | bit(62));
    EXPECT_EQ(AmdV1::leaf(bit(51) | bit(12), 2, {}), bit(0) | bit(51) | bit(12));
}

TEST(AmdV1, TableBits)
{
    EXPECT_EQ(AmdV1::table(0x77, 0), 0x77000 | bit(0) | 1ull << 9 | bit(61) | bit(62)) << "the spec's level 1";
    EXPECT_EQ(AmdV1::table(0x77, 2), 0x77000 | bit(0) | 3ull << 9 | bit(61) | bit(62));
}

TEST(AmdV1, DecodesWhatItEncodes)
{
    for (unsigned level = 0; level <= 3; ++level) {
        for (const Rights rights : {Rights{true, true}, Rights{true, false}, Rights{false, true}, Rights{}}) {
            const Entry leaf = AmdV1::decode(AmdV1::leaf(0xabc'd000'0000, level, rights), level);
            EXPECT_EQ(leaf.kind, EntryKind::leaf);
            EXPECT_EQ(leaf.address, 0xabc'd000'0000u);
            EXPECT_EQ(leaf.rights, rights);
        }
    }
    for (unsigned level = 1; level <= 4; ++level) {
        const Entry table = AmdV1::decode(AmdV1::table(0x1'2345'6789, level - 1), level);
        EXPECT_EQ(table.kind, EntryKind::table);
        EXPECT_EQ(table.address, 0x1'2345'6789u);
        EXPECT_EQ(table.rights, (Rights{true, true}));
    }
}

TEST(AmdV1, WhatIsNotPresentOrSkipsLevelsIsNothing)
{
    EXPECT_EQ(AmdV1::decode(0, 0).kind, EntryKind::none);
    EXPECT_EQ(AmdV1::decode(~bit(0), 0).kind, EntryKind::none);
    EXPECT_EQ(AmdV1::decode(AmdV1::table(1, 0), 2).kind, EntryKind::none);
    EXPECT_EQ(AmdV1::decode(AmdV1::table(1, 2), 2).kind, EntryKind::none);
    EXPECT_EQ(AmdV1::decode(bit(0) | 7ull << 9, 1).kind, EntryKind::none) << "a replicated size";
    EXPECT_EQ(AmdV1::decode(AmdV1::table(1, 0), 0).kind, EntryKind::none);
}

TEST(AmdV1, AccessedAndDirty)
{
    const std::uint64_t leaf = AmdV1::leaf(0x5000, 0, {true, true});
    EXPECT_EQ(AmdV1::accessed(leaf, false), leaf | bit(5));
    EXPECT_EQ(AmdV1::accessed(leaf, true), leaf | bit(5) | bit(6));
    EXPECT_EQ(AmdV1::accessed(leaf | bit(6), false), leaf | bit(5) | bit(6)) << "D stays";
    EXPECT_EQ(AmdV1::dirty_bit, bit(6));
    EXPECT_FALSE(AmdV1::dirty(leaf));
    EXPECT_FALSE(AmdV1::dirty(leaf | bit(5)));
    EXPECT_TRUE(AmdV1::dirty(leaf | bit(6)));
    EXPECT_FALSE(AmdV1::dirty(bit(6))) << "not present";
    EXPECT_FALSE(AmdV1::dirty(AmdV1::table(3, 0) | bit(6))) << "a table has no D";
}

// Every bit but A and D makes another translation of an entry.
TEST(AmdV1, SameTranslationIgnoresAccessedAndDirtyOnly)
{
    const std::uint64_t leaf = AmdV1::leaf(0x5000, 0, {true, true});
    for (unsigned n = 0; n < 64; ++n)
        EXPECT_EQ(AmdV1::same_translation(leaf, leaf ^ bit(n)), n == 5 || n == 6) << n;
}

} // namespace
} // namespace dirtyring::iommu
