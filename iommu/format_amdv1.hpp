// AMD I/O Virtualization Technology (IOMMU) Specification, rev 3.08, section 2.2.3: v1 page tables ("host page
// tables").
//
//    63 62 61 60 59           52 51                             12 11     9 8   7  6 5  4    1 0
//   ┌──┬──┬──┬──┬───────────────┬─────────────────────────────────┬────────┬─────┬──┬──┬──────┬──┐
//   │  │IW│IR│  │               │ OA, or the next table           │  next  │     │ D│ A│      │PR│
//   └──┴──┴──┴──┴───────────────┴─────────────────────────────────┴────────┴─────┴──┴──┴──────┴──┘
//   next: 0 a leaf of what an entry of this level spans; 1..6 a table of that level, the spec's level 1 being ours 0;
//         7 a larger leaf, smaller than what an entry of the level above spans, in replicas. Its size stands in the
//         bits of the OA that it
//         leaves free: the lowest 0 from bit 12 up is bit lg2 − 1, and below it are ones:
//
//           OA 51..lg2 │ 0 │ 1 … 1 │ 11..0        8 KiB: bit 12 is 0; 64 KiB: bits 15..12 are 0111
//
// A and D are set by hardware as the device table entry's field HAD says (section 2.2.2.1, bits 8:7 of its first word):
// 3 both.
#pragma once

#include "iommu/format.hpp"

#include <atomic>

namespace dirtyring::iommu {

struct AmdV1 {
    static constexpr unsigned id = 1;
    static constexpr const char *name = "amdv1";
    static constexpr unsigned levels_min = 1;
    static constexpr unsigned levels_max = 6;
    static constexpr unsigned oa_lg2 = 52;
    static constexpr bool always_on = false;
    static constexpr bool coherent_only = false;

    static constexpr std::uint64_t present = 1ull << 0;
    static constexpr std::uint64_t accessed_bit = 1ull << 5;
    static constexpr std::uint64_t dirty_bit = 1ull << 6;
    static constexpr unsigned next_shift = 9;
    static constexpr std::uint64_t next_mask = 7;
    static constexpr std::uint64_t next_sized = 7;
    static constexpr std::uint64_t address_mask = bits_between(granule_lg2, oa_lg2);
    static constexpr std::uint64_t read_bit = 1ull << 61;
    static constexpr std::uint64_t write_bit = 1ull << 62;
    static constexpr Pattern leaf_dirty{present | dirty_bit, present | dirty_bit};
    static constexpr Pattern leaf_settled{present | accessed_bit | dirty_bit, present | accessed_bit | dirty_bit};
    static constexpr std::uint64_t dirty_flip = dirty_bit;
    static constexpr std::uint64_t nt = 0;
    static constexpr std::uint64_t had = 3ull << 7;

    static constexpr std::uint64_t sizes(unsigned level)
    {
        return level <= leaf_level_max ? bits_between(entry_lg2(level), entry_lg2(level + 1)) : 0;
    }

    static constexpr std::uint64_t leaf(std::uint64_t oa, unsigned lg2, Rights rights, bool /*tracked*/ = true)
    {
        const bool sized = lg2 != entry_lg2(leaf_level(lg2));
        const std::uint64_t size = sized ? next_sized << next_shift | bits_between(granule_lg2, lg2 - 1) : 0;
        return present | (oa & address_mask) | size | (rights.read ? read_bit : 0) | (rights.write ? write_bit : 0);
    }

    static constexpr std::uint64_t table(std::uint64_t index, unsigned level)
    {
        return present | (index << granule_lg2) | std::uint64_t{level + 1} << next_shift | read_bit | write_bit;
    }

    static constexpr Entry decode(std::uint64_t entry, unsigned level)
    {
        if ((entry & present) == 0)
            return {};
        const Rights rights{(entry & read_bit) != 0, (entry & write_bit) != 0};
        const std::uint64_t next = entry >> next_shift & next_mask;
        const std::uint64_t address = entry & address_mask;
        if (next == level && level > 0)
            return {EntryKind::table, address >> granule_lg2, 0, rights};
        if (next != 0 && next != next_sized)
            return {}; // what skips levels is not written here
        const unsigned lg2 = next == 0 ? entry_lg2(level)
                                       : granule_lg2 + 1 + static_cast<unsigned>(std::countr_one(entry >> granule_lg2));
        if (lg2 > oa_lg2 || (next == next_sized && lg2 == entry_lg2(level)) || (sizes(level) >> lg2 & 1) == 0)
            return {};
        const std::uint64_t oa = next == 0 ? address : address & ~bits_between(granule_lg2, lg2 - 1);
        return (oa & bits_between(0, lg2)) == 0 ? Entry{EntryKind::leaf, oa, lg2, rights} : Entry{};
    }

    static constexpr bool usable_as_is(std::uint64_t /*leaf*/, bool /*write*/) { return true; }

    static constexpr std::uint64_t accessed(std::uint64_t leaf, bool dirty)
    {
        return leaf | accessed_bit | (dirty && (leaf & write_bit) != 0 ? dirty_bit : 0);
    }

    static constexpr std::uint64_t accessed_table(std::uint64_t entry) { return entry | accessed_bit; }

    static constexpr bool dirty(std::uint64_t entry)
    {
        const std::uint64_t next = entry >> next_shift & next_mask;
        return (entry & (present | dirty_bit)) == (present | dirty_bit) && (next == 0 || next == next_sized);
    }

    static constexpr bool same_translation(std::uint64_t a, std::uint64_t b)
    {
        return ((a ^ b) & ~(accessed_bit | dirty_bit)) == 0;
    }

    static void make_clean(std::uint64_t &live)
    {
        std::atomic_ref(live).fetch_and(~dirty_bit, std::memory_order_seq_cst); // S4
    }

    static void make_dirty(std::uint64_t &live)
    {
        std::atomic_ref entry(live);
        if ((entry.load(std::memory_order_relaxed) & write_bit) != 0) // which only the owner changes
            entry.fetch_or(dirty_bit, std::memory_order_seq_cst);
    }

    static constexpr std::uint64_t context(bool track) { return track ? had : 0; }
    static constexpr bool tracks(std::uint64_t context) { return (context & had) == had; }
};

static_assert(Format<AmdV1>);
static_assert(AmdV1::decode(AmdV1::leaf(0x1000, 12, {true, false}), 0) ==
              Entry{EntryKind::leaf, 0x1000, 12, {true, false}});
static_assert(AmdV1::decode(AmdV1::leaf(0x10000, 16, {true, true}), 0) ==
              Entry{EntryKind::leaf, 0x10000, 16, {true, true}});
static_assert((AmdV1::leaf(0x10000, 16, {}) & AmdV1::address_mask) == 0x17000);
static_assert(AmdV1::decode(AmdV1::table(7, 1), 2).address == 7);

} // namespace dirtyring::iommu
