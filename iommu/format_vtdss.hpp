// Intel Virtualization Technology for Directed I/O, Architecture Specification, rev 4.1, section 9.8: second-stage
// paging entries.
//
//    63 62               52 51                             12 11 10  9  8  7 6      3  2  1  0
//   ┌──┬───────────────────┬─────────────────────────────────┬─────┬──┬──┬──┬────────┬──┬──┬──┐
//   │  │                   │ OA, or the next table           │     │ D│ A│PS│        │ X│ W│ R│
//   └──┴───────────────────┴─────────────────────────────────┴─────┴──┴──┴──┴────────┴──┴──┴──┘
//   valid: R or W.   PS 1: a leaf of 2 MiB or 1 GiB, whose OA is aligned; in the lowest tables every entry is a leaf of
//   4 KiB.
//   A stands in entries that name a table, too (section 3.7.2); X, EMT, IPAT, SNP and TM stay 0.
//
// A and D are set by hardware when bit 9 of the scalable-mode PASID table entry is 1: Second Stage Access/Dirty Enable
// (section 9.6).
#pragma once

#include "iommu/format.hpp"

#include <atomic>

namespace dirtyring::iommu {

struct VtdSs {
    static constexpr unsigned id = 2;
    static constexpr const char *name = "vtdss";
    static constexpr unsigned levels_min = 3; // AW 1, 39 bits, of specifications before 3.0; then 4 and 5
    static constexpr unsigned levels_max = 5;
    static constexpr unsigned oa_lg2 = 52;
    static constexpr bool always_on = false;
    static constexpr bool coherent_only = true;

    static constexpr std::uint64_t read_bit = 1ull << 0;
    static constexpr std::uint64_t write_bit = 1ull << 1;
    static constexpr std::uint64_t page_size = 1ull << 7;
    static constexpr std::uint64_t accessed_bit = 1ull << 8;
    static constexpr std::uint64_t dirty_bit = 1ull << 9;
    static constexpr std::uint64_t address_mask = bits_between(granule_lg2, oa_lg2);
    static constexpr Pattern leaf_dirty{write_bit | dirty_bit, write_bit | dirty_bit};
    static constexpr Pattern leaf_settled{write_bit | accessed_bit | dirty_bit, write_bit | accessed_bit | dirty_bit};
    static constexpr std::uint64_t dirty_flip = dirty_bit;
    static constexpr std::uint64_t nt = 0;
    static constexpr std::uint64_t ssade = 1ull << 9;

    static constexpr std::uint64_t sizes(unsigned level)
    {
        return level <= leaf_level_max ? 1ull << entry_lg2(level) : 0;
    }

    static constexpr std::uint64_t leaf(std::uint64_t oa, unsigned lg2, Rights rights, bool /*tracked*/ = true)
    {
        return (oa & address_mask) | (lg2 > granule_lg2 ? page_size : 0) | (rights.read ? read_bit : 0) |
               (rights.write ? write_bit : 0);
    }

    static constexpr std::uint64_t table(std::uint64_t index, unsigned /*level*/)
    {
        return index << granule_lg2 | read_bit | write_bit;
    }

    static constexpr Entry decode(std::uint64_t entry, unsigned level)
    {
        const Rights rights{(entry & read_bit) != 0, (entry & write_bit) != 0};
        const std::uint64_t address = entry & address_mask;
        if (rights == Rights{})
            return {};
        if (level > 0 && (entry & page_size) == 0)
            return {EntryKind::table, address >> granule_lg2, 0, rights};
        const unsigned lg2 = entry_lg2(level);
        if (sizes(level) == 0 || (address & bits_between(0, lg2)) != 0) // reserved
            return {};
        return {EntryKind::leaf, address, lg2, rights};
    }

    static constexpr bool usable_as_is(std::uint64_t /*leaf*/, bool /*write*/) { return true; }

    static constexpr std::uint64_t accessed(std::uint64_t leaf, bool dirty)
    {
        return leaf | accessed_bit | (dirty && (leaf & write_bit) != 0 ? dirty_bit : 0);
    }

    static constexpr std::uint64_t accessed_table(std::uint64_t entry) { return entry | accessed_bit; }

    static constexpr bool dirty(std::uint64_t leaf)
    {
        return leaf_dirty.matches(leaf); // hardware sets D of what it may write
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

    static constexpr std::uint64_t context(bool track) { return track ? ssade : 0; }
    static constexpr bool tracks(std::uint64_t context) { return (context & ssade) != 0; }
};

static_assert(Format<VtdSs>);
static_assert(VtdSs::leaf(0x1000, 12, {true, true}) == 0x1003);
static_assert(VtdSs::leaf(0x200000, 21, {true, false}) == 0x200081);
static_assert(VtdSs::decode(VtdSs::table(7, 1), 2).address == 7);

} // namespace dirtyring::iommu
