// Arm Architecture Reference Manual (DDI 0487), section D8.3: VMSAv8-64 descriptors of the 4 KiB granule, as an SMMUv3
// walks them (Arm System Memory Management Unit Architecture Specification, IHI 0070, sections 3.13 and 5). The spec's
// level 3 is ours 0.
//
//    63       52 51  50     48 47                       12 11 10  9 8  7  6 5        2 1   0
//   ┌───────────┬───┬─────────┬───────────────────────────┬──┬──┬────┬─────┬──────────┬──────┐
//   │           │DBM│         │ OA, or the next table     │nG│AF│ SH │ AP  │          │ type │
//   └───────────┴───┴─────────┴───────────────────────────┴──┴──┴────┴─────┴──────────┴──────┘
//   type: 11 a table, in the lowest tables a leaf of 4 KiB; 01 a leaf of 2 MiB or 1 GiB, whose bit 16 is nT; else
//   nothing
//
//   stage 2   S2AP: bit 6 may be read, bit 7 may be written
//   stage 1   AP:   bit 6 AP[1] unprivileged accesses, as devices' are; bit 7 AP[2] read-only. There is no write-only:
//             what is mapped for writing can be read as well
//
// Dirty (section D8.5.2): a leaf with DBM may be written. It is dirty where the bits say so without DBM (stage 2: bit 7
// is 1; stage 1: bit 7 is 0), else clean, and hardware that sets D lets the first write through and turns bit 7; any
// other raises a permission fault, as it does on an access while AF is 0. So devices set A and D for as long as there
// are leaves with DBM, and leaves of an hwpt without dirty tracking have AF and the plain rights. Table entries have no
// A. nG, SH, MemAttr and AttrIndx stay 0: emulated devices share the memory of one machine.
//
// Enabled by the word that holds HA and HD: stage 2, of the stream table entry bits 191:128 (S2HD 183, S2HA 184); stage
// 1, of the context descriptor bits 63:0 (HD 42, HA 43).
#pragma once

#include "iommu/format.hpp"

#include <atomic>

namespace dirtyring::iommu {

template <unsigned Stage> struct SmmuV3 {
    static_assert(Stage == 1 || Stage == 2);
    static constexpr bool stage_2 = Stage == 2;

    static constexpr unsigned id = stage_2 ? 3 : 4;
    static constexpr const char *name = stage_2 ? "smmuv3s2" : "smmuv3s1";
    static constexpr unsigned levels_min = 2; // without small translation tables (SMMU_IDR3.STT)
    static constexpr unsigned levels_max = 4;
    static constexpr unsigned oa_lg2 = 48;
    static constexpr bool always_on = true;
    static constexpr bool coherent_only = false;

    static constexpr std::uint64_t type_mask = 3;
    static constexpr std::uint64_t type_block = 1;
    static constexpr std::uint64_t type_table = 3; // or page
    static constexpr std::uint64_t read_bit = 1ull << 6;
    static constexpr std::uint64_t write_bit = 1ull << 7; // stage 1: its opposite
    static constexpr std::uint64_t accessed_bit = 1ull << 10;
    static constexpr std::uint64_t nt = 1ull << 16; // of blocks only
    static constexpr std::uint64_t dbm = 1ull << 51;
    static constexpr std::uint64_t valid = 1; // of both types
    static constexpr Pattern leaf_dirty{valid | dbm | write_bit, valid | dbm | (stage_2 ? write_bit : 0)};
    static constexpr Pattern leaf_settled{leaf_dirty.mask | accessed_bit, leaf_dirty.value | accessed_bit};
    static constexpr std::uint64_t dirty_flip = write_bit;
    static constexpr std::uint64_t address_mask = bits_between(granule_lg2, oa_lg2);
    static constexpr std::uint64_t hd = 1ull << (stage_2 ? 183 - 128 : 42);
    static constexpr std::uint64_t ha = 1ull << (stage_2 ? 184 - 128 : 43);

    static constexpr std::uint64_t sizes(unsigned level)
    {
        return level <= leaf_level_max ? 1ull << entry_lg2(level) : 0;
    }

    static constexpr std::uint64_t leaf(std::uint64_t oa, unsigned lg2, Rights rights, bool tracked = true)
    {
        const std::uint64_t entry = (lg2 == granule_lg2 ? type_table : type_block) | (oa & address_mask) |
                                    (rights.read || (rights.write && !stage_2) ? read_bit : 0) |
                                    (tracked ? 0 : accessed_bit);
        if (!rights.write)
            return with_write(entry, false);
        return tracked ? with_write(entry, false) | dbm : with_write(entry, true);
    }

    static constexpr std::uint64_t table(std::uint64_t index, unsigned /*level*/)
    {
        return index << granule_lg2 | type_table;
    }

    static constexpr Entry decode(std::uint64_t entry, unsigned level)
    {
        const std::uint64_t type = entry & type_mask;
        std::uint64_t address = entry & address_mask;
        if (level > 0 && type == type_table)
            return {EntryKind::table, address >> granule_lg2, 0, {true, true}};
        const unsigned lg2 = entry_lg2(level);
        if (type != (level == 0 ? type_table : type_block) || sizes(level) == 0)
            return {};
        if (level > 0)
            address &= ~nt;
        if ((address & bits_between(0, lg2)) != 0) // RES0
            return {};
        return {EntryKind::leaf, address, lg2, rights_of(entry, (entry & dbm) != 0 || writes(entry))};
    }

    static constexpr bool usable_as_is(std::uint64_t leaf, bool write)
    {
        return (leaf & accessed_bit) != 0 && (!write || writes(leaf));
    }

    static constexpr std::uint64_t accessed(std::uint64_t leaf, bool dirty)
    {
        return with_write(leaf, writes(leaf) || (dirty && (leaf & dbm) != 0)) | accessed_bit;
    }

    static constexpr std::uint64_t accessed_table(std::uint64_t entry) { return entry; }

    static constexpr bool dirty(std::uint64_t leaf) { return leaf_dirty.matches(leaf); }

    static constexpr bool same_translation(std::uint64_t a, std::uint64_t b)
    {
        const std::uint64_t either = accessed_bit | ((a & b & dbm) != 0 ? write_bit : 0);
        return ((a ^ b) & ~either) == 0;
    }

    static void make_clean(std::uint64_t &live) { turn(live, !stage_2); }

    static void make_dirty(std::uint64_t &live)
    {
        if ((std::atomic_ref(live).load(std::memory_order_relaxed) & dbm) != 0) // which only the owner changes
            turn(live, stage_2);
    }

    static constexpr std::uint64_t context(bool track) { return track ? ha | hd : 0; }
    static constexpr bool tracks(std::uint64_t context) { return (context & (ha | hd)) == (ha | hd); }

  private:
    // What bit 7 says without DBM.
    static constexpr bool writes(std::uint64_t leaf) { return ((leaf & write_bit) != 0) == stage_2; }
    static constexpr std::uint64_t with_write(std::uint64_t leaf, bool may)
    {
        return may == stage_2 ? leaf | write_bit : leaf & ~write_bit;
    }
    static constexpr Rights rights_of(std::uint64_t leaf, bool write)
    {
        const bool first = (leaf & read_bit) != 0; // stage 1: any access of a device's
        return stage_2 ? Rights{first, write} : Rights{first, first && write};
    }

    static void turn(std::uint64_t &live, bool set)
    {
        if (set)
            std::atomic_ref(live).fetch_or(write_bit, std::memory_order_seq_cst); // S4
        else
            std::atomic_ref(live).fetch_and(~write_bit, std::memory_order_seq_cst); // S4
    }
};

using SmmuV3S2 = SmmuV3<2>;
using SmmuV3S1 = SmmuV3<1>;

static_assert(Format<SmmuV3S2> && Format<SmmuV3S1>);
static_assert(SmmuV3S2::leaf(0x1000, 12, {true, true}) == (0x1043 | SmmuV3S2::dbm));
static_assert(SmmuV3S1::leaf(0x1000, 12, {true, true}) == (0x10c3 | SmmuV3S1::dbm));
static_assert(SmmuV3S2::leaf(0x200000, 21, {true, false}) == 0x200041);
static_assert(SmmuV3S1::leaf(0x200000, 21, {true, false}) == 0x2000c1);
static_assert(SmmuV3S2::leaf(0x1000, 12, {true, true}, false) == 0x14c3);

} // namespace dirtyring::iommu
