// Formats, bit by bit, and what every one of them must keep to.
#include "iommu/formats.hpp"
#include "iommu/geometry.hpp"
#include "iommu/line_scan.hpp"

#include <gtest/gtest.h>

#include <array>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace dirtyring::iommu {
namespace {

constexpr std::uint64_t bit(unsigned n)
{
    return 1ull << n;
}

constexpr Rights all_rights[] = {{false, false}, {true, false}, {false, true}, {true, true}};
constexpr Rights read_write{true, true};
constexpr Rights read_only{true, false};

// ---- each format by itself ------------------------------------------------------------------------------------------

TEST(AmdV1, Bits)
{
    EXPECT_EQ(AmdV1::leaf(0x12345000, 12, {true, true}), 0x12345000 | bit(0) | bit(61) | bit(62));
    EXPECT_EQ(AmdV1::leaf(0x12345000, 12, {true, false}), 0x12345000 | bit(0) | bit(61));
    EXPECT_EQ(AmdV1::leaf(0x12345000, 12, {false, true}), 0x12345000 | bit(0) | bit(62));
    EXPECT_EQ(AmdV1::leaf(bit(51) | bit(30), 30, {}), bit(0) | bit(51) | bit(30));
    EXPECT_EQ(AmdV1::table(0x77, 0), 0x77000 | bit(0) | 1ull << 9 | bit(61) | bit(62)) << "the spec's level 1";
    EXPECT_EQ(AmdV1::table(0x77, 2), 0x77000 | bit(0) | 3ull << 9 | bit(61) | bit(62));
    const std::uint64_t leaf = AmdV1::leaf(0x5000, 12, read_write);
    EXPECT_EQ(AmdV1::accessed(leaf, false), leaf | bit(5));
    EXPECT_EQ(AmdV1::accessed(leaf, true), leaf | bit(5) | bit(6));
    EXPECT_EQ(AmdV1::accessed_table(AmdV1::table(1, 0)), AmdV1::table(1, 0) | bit(5));
    EXPECT_EQ(AmdV1::context(true), bit(7) | bit(8)) << "HAD";
    EXPECT_FALSE(AmdV1::tracks(bit(7))) << "A alone";
}

// The examples of the specification, table 14: the size is in the run of ones.
TEST(AmdV1, SizesBetweenTheLevels)
{
    constexpr std::uint64_t seven = 7ull << 9;
    EXPECT_EQ(AmdV1::leaf(0x2000, 13, {}), 0x2000 | seven | bit(0));
    EXPECT_EQ(AmdV1::leaf(0x4000, 14, {}), 0x5000 | seven | bit(0));
    EXPECT_EQ(AmdV1::leaf(0x10000, 16, {}), 0x17000 | seven | bit(0));
    EXPECT_EQ(AmdV1::leaf(bit(20), 20, {}), bit(20) | 0x7f000 | seven | bit(0));
    EXPECT_EQ(AmdV1::leaf(bit(22), 22, {}), bit(22) | 0x1ff000 | seven | bit(0));
}

TEST(AmdV1, WrongEncodings)
{
    const auto kind = [](std::uint64_t entry, unsigned level) { return AmdV1::decode(entry, level).kind; };
    EXPECT_EQ(kind(~bit(0), 0), EntryKind::none) << "not present";
    EXPECT_EQ(kind(AmdV1::table(1, 0), 2), EntryKind::none) << "a level skipped";
    EXPECT_EQ(kind(AmdV1::table(1, 2), 2), EntryKind::none) << "a level up";
    EXPECT_EQ(kind(AmdV1::leaf(bit(21), 21, {}), 0), EntryKind::leaf)
        << "next 0 is of this level's size, whatever was meant";
    EXPECT_EQ(kind(AmdV1::leaf(bit(22), 22, {}), 0), EntryKind::none) << "larger than a table of leaves";
    EXPECT_EQ(kind(AmdV1::leaf(bit(13), 13, {}), 1), EntryKind::none) << "smaller than this level's";
    EXPECT_EQ(kind(bit(0) | 7ull << 9 | 0xff000, 1), EntryKind::none) << "2 MiB need no 7 here";
    EXPECT_EQ(kind(bit(0) | AmdV1::address_mask | 7ull << 9, 2), EntryKind::none) << "ones without end";
    EXPECT_EQ(kind(bit(0) | bit(12), 1), EntryKind::none) << "an OA that is not aligned";
    EXPECT_EQ(kind(AmdV1::leaf(0, 12, {}), 3), EntryKind::none) << "leaves above 1 GiB entries";
    EXPECT_FALSE(AmdV1::dirty(bit(6))) << "not present";
    EXPECT_FALSE(AmdV1::dirty(AmdV1::table(3, 0) | bit(6))) << "a table has no D";
}

TEST(VtdSs, Bits)
{
    EXPECT_EQ(VtdSs::leaf(0x12345000, 12, {true, false}), 0x12345000 | bit(0));
    EXPECT_EQ(VtdSs::leaf(0x12345000, 12, {false, true}), 0x12345000 | bit(1));
    EXPECT_EQ(VtdSs::leaf(bit(51) | bit(21), 21, read_write), bit(51) | bit(21) | bit(0) | bit(1) | bit(7));
    EXPECT_EQ(VtdSs::leaf(bit(30), 30, read_write), bit(30) | bit(0) | bit(1) | bit(7));
    EXPECT_EQ(VtdSs::table(0x77, 2), 0x77000 | bit(0) | bit(1));
    const std::uint64_t leaf = VtdSs::leaf(0x5000, 12, read_write);
    EXPECT_EQ(VtdSs::accessed(leaf, false), leaf | bit(8));
    EXPECT_EQ(VtdSs::accessed(leaf, true), leaf | bit(8) | bit(9));
    EXPECT_EQ(VtdSs::accessed_table(VtdSs::table(1, 0)), VtdSs::table(1, 0) | bit(8));
    EXPECT_EQ(VtdSs::context(true), bit(9)) << "SSADE";
    EXPECT_EQ(VtdSs::decode(bit(0) | bit(7) | bit(12), 1).kind, EntryKind::none) << "reserved bits of a large leaf";
    EXPECT_EQ(VtdSs::decode(bit(0) | bit(7), 3).kind, EntryKind::none) << "PS where there are tables only";
    EXPECT_EQ(VtdSs::decode(bit(12) | bit(9) | bit(8), 0).kind, EntryKind::none) << "neither R nor W";
    EXPECT_EQ(VtdSs::decode(0x5003 | bit(7), 0).kind, EntryKind::leaf) << "PS is ignored in the lowest tables";
}

TEST(SmmuV3, Stage2Bits)
{
    using F = SmmuV3S2;
    EXPECT_EQ(F::leaf(0x5000, 12, read_write), 0x5000 | 3 | bit(6) | bit(51)) << "writable and clean";
    EXPECT_EQ(F::leaf(0x5000, 12, read_only), 0x5000 | 3 | bit(6));
    EXPECT_EQ(F::leaf(0x5000, 12, {false, true}), 0x5000 | 3 | bit(51));
    EXPECT_EQ(F::leaf(bit(21), 21, read_only), bit(21) | 1 | bit(6)) << "a block";
    EXPECT_EQ(F::leaf(0x5000, 12, read_write, false), 0x5000 | 3 | bit(6) | bit(7) | bit(10)) << "nobody tracks";
    EXPECT_EQ(F::accessed(F::leaf(0x5000, 12, read_write), true), 0x5000 | 3 | bit(6) | bit(7) | bit(10) | bit(51));
    EXPECT_EQ(F::accessed_table(F::table(1, 0)), F::table(1, 0)) << "no A in tables";
    EXPECT_EQ(F::context(true), bit(55) | bit(56)) << "S2HD, S2HA";
    EXPECT_FALSE(F::tracks(bit(56))) << "A alone";
}

TEST(SmmuV3, Stage1Bits)
{
    using F = SmmuV3S1;
    EXPECT_EQ(F::leaf(0x5000, 12, read_write), 0x5000 | 3 | bit(6) | bit(7) | bit(51)) << "writable and clean";
    EXPECT_EQ(F::leaf(0x5000, 12, read_only), 0x5000 | 3 | bit(6) | bit(7));
    EXPECT_EQ(F::leaf(0x5000, 12, {}), 0x5000 | 3 | bit(7));
    EXPECT_EQ(F::leaf(bit(30), 30, read_only), bit(30) | 1 | bit(6) | bit(7)) << "a block";
    EXPECT_EQ(F::leaf(0x5000, 12, read_write, false), 0x5000 | 3 | bit(6) | bit(10)) << "nobody tracks";
    EXPECT_EQ(F::accessed(F::leaf(0x5000, 12, read_write), true), 0x5000 | 3 | bit(6) | bit(10) | bit(51))
        << "dirty is bit 7 clear";
    EXPECT_EQ(F::context(true), bit(42) | bit(43)) << "HD, HA";
}

template <class F> void expect_smmu_kinds()
{
    const auto kind = [](std::uint64_t entry, unsigned level) { return F::decode(entry, level).kind; };
    EXPECT_EQ(kind(0x5002, 0), EntryKind::none) << "bit 0 is valid";
    EXPECT_EQ(kind(0x5001, 0), EntryKind::none) << "no blocks in the lowest tables";
    EXPECT_EQ(kind(bit(12) | 1, 1), EntryKind::none) << "a block that is not aligned";
    EXPECT_EQ(kind(bit(39) | 1, 3), EntryKind::none) << "no blocks of 512 GiB";
    EXPECT_EQ(kind(bit(21) | F::nt | 1, 1), EntryKind::leaf);
    EXPECT_EQ(F::decode(bit(21) | F::nt | 1, 1).address, bit(21));
    EXPECT_EQ(F::decode(bit(16) | 3, 0).address, bit(16)) << "nT is for blocks";
}

TEST(SmmuV3, Kinds)
{
    expect_smmu_kinds<SmmuV3S2>();
    expect_smmu_kinds<SmmuV3S1>();
}

// ---- all of them ----------------------------------------------------------------------------------------------------

template <class F> class Conformance : public testing::Test
{
  protected:
    // Calls check(level, lg2) for each size of each level.
    template <class Check> static void for_sizes(Check check)
    {
        for (unsigned level = 0; level < F::levels_max; ++level) {
            for (std::uint64_t sizes = F::sizes(level); sizes != 0; sizes &= sizes - 1)
                check(level, static_cast<unsigned>(std::countr_zero(sizes)));
        }
    }

    // Stage 1 of Arm has no write-only; an entry of VT-d without rights is none.
    static bool expressible(Rights rights)
    {
        return F::decode(F::leaf(0, 12, rights), 0) == Entry{EntryKind::leaf, 0, 12, rights};
    }

    std::uint64_t random_oa(unsigned lg2) { return random_() & bits_between(lg2, F::oa_lg2); }

    std::mt19937_64 random_{7};
};

struct FormatNames {
    template <class F> static std::string GetName(int /*index*/) { return F::name; }
};
TYPED_TEST_SUITE(Conformance, Formats::Of<testing::Types>, FormatNames);

TYPED_TEST(Conformance, IsFoundByItsNumber)
{
    EXPECT_TRUE(knows_format(TypeParam::id));
    EXPECT_STREQ(with_format(TypeParam::id, [](auto f) { return f.name; }), TypeParam::name);
    EXPECT_FALSE(knows_format(0));
    EXPECT_FALSE(knows_format(5));
}

TYPED_TEST(Conformance, HasASizeForEachLevelOfLeaves)
{
    for (unsigned level = 0; level <= leaf_level_max; ++level)
        EXPECT_NE(TypeParam::sizes(level) & bit(entry_lg2(level)), 0u);
    this->for_sizes([](unsigned level, unsigned lg2) { EXPECT_EQ(leaf_level(lg2), level); });
    EXPECT_EQ(TypeParam::sizes(leaf_level_max + 1), 0u);
}

TYPED_TEST(Conformance, LeavesComeBackAsTheyWere)
{
    using F = TypeParam;
    this->for_sizes([&](unsigned level, unsigned lg2) {
        for (const Rights rights : all_rights) {
            for (const bool tracked : {false, true}) {
                if (!this->expressible(rights))
                    continue;
                for (unsigned i = 0; i < 100; ++i) {
                    const std::uint64_t oa = this->random_oa(lg2);
                    const Entry leaf = F::decode(F::leaf(oa, lg2, rights, tracked), level);
                    ASSERT_EQ(leaf, (Entry{EntryKind::leaf, oa, lg2, rights}))
                        << std::hex << oa << std::dec << " " << lg2;
                }
            }
        }
    });
}

// Replicas are equal, so each is the leaf.
TYPED_TEST(Conformance, LeavesOfEachSizeAreTold)
{
    using F = TypeParam;
    this->for_sizes([&](unsigned level, unsigned lg2) {
        std::set<std::uint64_t> entries;
        this->for_sizes([&](unsigned other, unsigned other_lg2) {
            if (other == level)
                entries.insert(F::leaf(0, other_lg2, read_write));
        });
        EXPECT_EQ(entries.size(), static_cast<unsigned>(std::popcount(F::sizes(level)))) << lg2;
    });
}

TYPED_TEST(Conformance, TablesComeBackAsTheyWere)
{
    using F = TypeParam;
    for (unsigned level = 1; level < F::levels_max; ++level) {
        for (unsigned i = 0; i < 1000; ++i) {
            const std::uint64_t index = this->random_() >> (64 - (F::oa_lg2 - granule_lg2));
            const std::uint64_t entry = F::table(index, level - 1);
            ASSERT_EQ(F::decode(entry, level), (Entry{EntryKind::table, index, 0, {true, true}})) << level;
            ASSERT_TRUE(F::same_translation(entry, F::accessed_table(entry)));
            ASSERT_EQ(F::decode(F::accessed_table(entry), level), F::decode(entry, level));
            ASSERT_FALSE(F::dirty(F::accessed_table(entry)));
        }
        EXPECT_NE(F::decode(F::table(1, level - 1), 0).kind, EntryKind::table) << "below there is nothing";
    }
}

TYPED_TEST(Conformance, NothingIsNothing)
{
    for (unsigned level = 0; level < TypeParam::levels_max; ++level)
        EXPECT_EQ(TypeParam::decode(0, level), Entry{});
    EXPECT_FALSE(TypeParam::dirty(0));
}

// Whatever a device has scribbled: what decodes is within bounds.
TYPED_TEST(Conformance, GarbageStaysWithinBounds)
{
    using F = TypeParam;
    for (unsigned i = 0; i < 200'000; ++i) {
        const std::uint64_t garbage =
            (this->random_() & this->random_()) | (this->random_() & 0x8000'0000'0000'0fffull);
        for (unsigned level = 0; level < F::levels_max; ++level) {
            const Entry e = F::decode(garbage, level);
            if (e.kind == EntryKind::leaf) {
                ASSERT_NE(F::sizes(level) & bit(e.lg2), 0u) << std::hex << garbage;
                ASSERT_EQ(e.address & bits_between(0, e.lg2), 0u) << std::hex << garbage;
            }
            ASSERT_LT(e.address, bit(F::oa_lg2)) << std::hex << garbage;
            ASSERT_FALSE(e.kind == EntryKind::table && level == 0);
        }
    }
}

TYPED_TEST(Conformance, AccessedAndDirty)
{
    using F = TypeParam;
    this->for_sizes([&](unsigned level, unsigned lg2) {
        const std::uint64_t oa = this->random_oa(lg2);
        const std::uint64_t leaf = F::leaf(oa, lg2, read_write);
        const std::uint64_t read = F::accessed(leaf, false);
        const std::uint64_t written = F::accessed(leaf, true);
        EXPECT_FALSE(F::dirty(leaf));
        EXPECT_NE(read, leaf);
        EXPECT_FALSE(F::dirty(read)) << "A alone";
        EXPECT_TRUE(F::dirty(written));
        EXPECT_EQ(F::accessed(read, true), written);
        EXPECT_EQ(F::accessed(written, false), written) << "D stays";
        EXPECT_EQ(F::accessed(written, true), written);
        for (const std::uint64_t e : {read, written}) {
            EXPECT_TRUE(F::same_translation(leaf, e));
            EXPECT_EQ(F::decode(e, level), F::decode(leaf, level));
        }
    });
}

TYPED_TEST(Conformance, DirtyIsMadeAndUnmade)
{
    using F = TypeParam;
    this->for_sizes([&](unsigned, unsigned lg2) {
        const std::uint64_t leaf = F::leaf(this->random_oa(lg2), lg2, read_write);
        for (const std::uint64_t clean : {leaf, F::accessed(leaf, false)}) {
            std::uint64_t live = clean;
            F::make_dirty(live);
            EXPECT_TRUE(F::dirty(live));
            EXPECT_TRUE(F::same_translation(live, leaf));
            F::make_dirty(live);
            EXPECT_TRUE(F::dirty(live));
            F::make_clean(live);
            EXPECT_EQ(live, clean) << "A stays as it was";
        }
    });
}

// What scans go by says the same of leaves.
TYPED_TEST(Conformance, PatternsAreThoseOfAAndD)
{
    using F = TypeParam;
    this->for_sizes([&](unsigned, unsigned lg2) {
        for (const Rights rights : all_rights) {
            const std::uint64_t leaf = F::leaf(this->random_oa(lg2), lg2, rights);
            for (const std::uint64_t e : {leaf, F::accessed(leaf, false), F::accessed(leaf, true)}) {
                EXPECT_EQ(F::leaf_dirty.matches(e), F::dirty(e));
                EXPECT_EQ(F::leaf_settled.matches(e), F::dirty(e)) << "hardware sets A with D";
            }
            std::uint64_t live = leaf;
            F::make_dirty(live);
            EXPECT_EQ(F::leaf_dirty.matches(live), F::dirty(live));
            EXPECT_FALSE(F::leaf_settled.matches(live)) << "D alone is the owner's";
            if (F::dirty(live)) {
                EXPECT_EQ(live ^ F::dirty_flip, leaf);
            }
        }
    });
    EXPECT_FALSE(F::leaf_dirty.matches(0));
}

// Whatever instructions it uses, a scan finds what one entry after the other does, in the lines asked for.
TYPED_TEST(Conformance, ScansFindAndCleanWhatIsDirty)
{
    using F = TypeParam;
    std::vector<std::pair<const char *, decltype(&scan::find)>> scans{{"scalar", scan::find}};
#if DIRTYRING_VECTORS
    if (scan::has_avx2)
        scans.emplace_back("avx2", scan::find_avx2);
    if (scan::has_avx512)
        scans.emplace_back("avx512", scan::find_avx512);
#endif
    scans.emplace_back("as chosen here", find_lines);
    alignas(64) std::array<std::uint64_t, table_entries> table;
    for (const unsigned one_in : {1u, 2u, 10u, 100u, 2000u}) {
        for (unsigned round = 0; round < 50; ++round) {
            std::vector<bool> dirty(table_entries);
            for (unsigned i = 0; i < table_entries; ++i) {
                const std::uint64_t leaf = F::leaf(this->random_oa(12), 12, read_write);
                const std::uint64_t kinds[] = {0, leaf, F::accessed(leaf, false)};
                table[i] = kinds[this->random_() % 3];
                if (this->random_() % one_in == 0) {
                    table[i] = F::accessed(leaf, true);
                    if (this->random_() % 8 == 0)
                        F::make_dirty(table[i] = leaf); // in the owner's name, without A
                }
                dirty[i] = F::dirty(table[i]);
            }
            const std::uint64_t lines = round % 4 == 0 ? ~0ull : this->random_();
            const auto wanted = [&](unsigned i) { return dirty[i] && (lines >> (i / line_entries) & 1) != 0; };
            const OpenTable open{table.data(), 0x4000'0000, 0};
            std::array<LineEntries, table_lines> found;
            for (const auto &[name, find] : scans) {
                const std::size_t n = find(open, lines, F::leaf_dirty, 7, found.data());
                std::size_t next = 0;
                for (unsigned line = 0; line < table_lines; ++line) {
                    unsigned mask = 0;
                    for (unsigned i = 0; i < line_entries; ++i)
                        mask |= wanted(line * line_entries + i) ? 1u << i : 0;
                    if (mask == 0)
                        continue;
                    ASSERT_LT(next, n) << name << ' ' << line;
                    EXPECT_EQ(found[next].line, line) << name;
                    EXPECT_EQ(found[next].mask, mask) << name;
                    EXPECT_EQ(found[next].entries, table.data() + line * line_entries) << name;
                    EXPECT_EQ(found[next].iova, 0x4000'0000 + line * line_entries * 4096) << name;
                    EXPECT_EQ(found[next++].table, 7) << name;
                }
                EXPECT_EQ(next, n) << name;
            }
            const auto before = table;
            make_clean<F>(std::span(found).first(find_lines(open, lines, F::leaf_dirty, 0, found.data())));
            for (unsigned i = 0; i < table_entries; ++i)
                ASSERT_EQ(table[i], wanted(i) ? before[i] ^ F::dirty_flip : before[i]) << i;
        }
    }
}

// What cannot be written is never dirty, and does not come to be writable by it.
TYPED_TEST(Conformance, ReadOnlyIsNeverDirty)
{
    using F = TypeParam;
    this->for_sizes([&](unsigned level, unsigned lg2) {
        std::uint64_t live = F::leaf(this->random_oa(lg2), lg2, read_only);
        const std::uint64_t accessed = F::accessed(live, true);
        EXPECT_FALSE(F::dirty(live));
        EXPECT_FALSE(F::dirty(accessed));
        EXPECT_EQ(F::decode(accessed, level).rights, read_only);
        const std::uint64_t before = live;
        F::make_dirty(live);
        EXPECT_EQ(live, before);
    });
}

// Of the 64 bits, those of A and D alone leave the translation as it is.
TYPED_TEST(Conformance, AnyOtherBitIsAnotherTranslation)
{
    using F = TypeParam;
    const std::uint64_t leaf = F::leaf(0x5000, 12, read_write);
    const std::uint64_t either = leaf ^ F::accessed(leaf, true);
    EXPECT_EQ(std::popcount(either), 2);
    for (unsigned n = 0; n < 64; ++n)
        EXPECT_EQ(F::same_translation(leaf, leaf ^ bit(n)), (either & bit(n)) != 0) << n;
    const std::uint64_t fixed = F::leaf(0x5000, 12, read_only);
    EXPECT_FALSE(F::same_translation(leaf, fixed));
    EXPECT_EQ(F::same_translation(fixed, F::accessed(fixed, false)), true);
}

TYPED_TEST(Conformance, ContextSaysWhetherHardwareTracks)
{
    using F = TypeParam;
    EXPECT_TRUE(F::tracks(F::context(true)));
    EXPECT_FALSE(F::tracks(F::context(false)));
    EXPECT_EQ(F::context(false), 0u);
}

// Where a clean leaf cannot be written without the hardware's help, its hwpt is always on; others' leaves need none.
TYPED_TEST(Conformance, UntrackedLeavesNeedNoHardware)
{
    using F = TypeParam;
    const std::uint64_t tracked = F::leaf(0x5000, 12, read_write, true);
    EXPECT_EQ(F::usable_as_is(tracked, true), !F::always_on);
    EXPECT_EQ(F::usable_as_is(tracked, false), !F::always_on) << "A";
    EXPECT_TRUE(F::usable_as_is(F::accessed(tracked, true), true));
    const std::uint64_t untracked = F::leaf(0x5000, 12, read_write, false);
    EXPECT_TRUE(F::usable_as_is(untracked, true));
    EXPECT_TRUE(F::usable_as_is(untracked, false));
}

// ---- geometry -------------------------------------------------------------------------------------------------------

TEST(Geometry, AsFewLevelsAsNeeded)
{
    for (const auto &[aperture, levels] :
         {std::pair{21u, 1u}, {22u, 2u}, {30u, 2u}, {31u, 3u}, {39u, 3u}, {40u, 4u}, {48u, 4u}})
        EXPECT_EQ(make_geometry(1, aperture, 1).root_level + 1, levels) << aperture;
}

// The way from the root to the first slice's lowest table, through tables that are all there.
TEST(Geometry, RootLeadsDownFromAnyLevel)
{
    for (unsigned levels = 1; levels <= levels_max; ++levels) {
        const unsigned aperture = std::min(aperture_lg2_max, entry_lg2(levels));
        const dr_translation_header h = make_geometry(1, aperture, 1, levels);
        EXPECT_EQ(h.root_level + 1, levels);
        EXPECT_LT(h.root, h.tables);
        EXPECT_EQ(h.root >= h.top_tables, levels <= 2) << "in the shard's range";
        for (unsigned level = top_level; level <= h.root_level; ++level)
            EXPECT_LT(first_top_table(h, level), h.top_tables);
        EXPECT_EQ(h.top_tables, make_geometry(1, aperture, 1).top_tables +
                                    (levels > 3 ? levels - std::max(3u, levels_needed(aperture)) : 0));
    }
}

} // namespace
} // namespace dirtyring::iommu
