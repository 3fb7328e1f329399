// AMD I/O Virtualization Technology (IOMMU) Specification, rev 3.08, section 2.2.3: v1 page tables ("host page tables").
//
//    63 62 61 60 59           52 51                             12 11     9 8   7  6 5  4    1 0
//   ┌──┬──┬──┬──┬───────────────┬─────────────────────────────────┬────────┬─────┬──┬──┬──────┬──┐
//   │  │IW│IR│  │               │ OA, or the next table           │  next  │     │ D│ A│      │PR│
//   └──┴──┴──┴──┴───────────────┴─────────────────────────────────┴────────┴─────┴──┴──┴──────┴──┘
//   next: 0 a leaf of this level's size; 1..6 a table of that level, the spec's level 1 being ours 0
//
// Enabled by the device table entry's HAD field, bits 8:7 = 3; here by dr_shard_control.tracking.
#pragma once

#include "iommu/format.hpp"

namespace dirtyring::iommu {

struct AmdV1 {
    static constexpr std::uint64_t present = 1ull << 0;
    static constexpr std::uint64_t accessed_bit = 1ull << 5;
    static constexpr std::uint64_t dirty_bit = 1ull << 6;
    static constexpr unsigned next_shift = 9;
    static constexpr std::uint64_t next_mask = 7;
    static constexpr std::uint64_t address_mask = 0x000f'ffff'ffff'f000ull;
    static constexpr std::uint64_t read_bit = 1ull << 61;
    static constexpr std::uint64_t write_bit = 1ull << 62;

    static constexpr std::uint64_t leaf(std::uint64_t oa, unsigned /*level*/, Rights rights)
    {
        return present | (oa & address_mask) | (rights.read ? read_bit : 0) | (rights.write ? write_bit : 0);
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
        if (next == 0)
            return {EntryKind::leaf, entry & address_mask, rights};
        if (next == level)
            return {EntryKind::table, (entry & address_mask) >> granule_lg2, rights};
        return {}; // level skipping and replicated sizes are not written here
    }

    static constexpr std::uint64_t accessed(std::uint64_t entry, bool dirty)
    {
        return entry | accessed_bit | (dirty ? dirty_bit : 0);
    }

    static constexpr bool dirty(std::uint64_t entry)
    {
        constexpr std::uint64_t leaf_and_dirty = present | dirty_bit;
        return (entry & (leaf_and_dirty | next_mask << next_shift)) == leaf_and_dirty;
    }

    static constexpr bool same_translation(std::uint64_t a, std::uint64_t b)
    {
        return ((a ^ b) & ~(accessed_bit | dirty_bit)) == 0;
    }
};

static_assert(Format<AmdV1>);
static_assert(AmdV1::decode(AmdV1::leaf(0x1000, 0, {true, false}), 0).address == 0x1000);
static_assert(AmdV1::decode(AmdV1::table(7, 1), 2).address == 7);

} // namespace dirtyring::iommu
