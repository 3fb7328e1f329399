// What every page-table format must say of its entries. A format is one file (format_*.hpp) and the only place that
// knows a bit; formats.hpp lists them.
//
//   level    0 holds leaves of the granule's size; an entry at level l spans granule << (l * table_lg2) bytes
//   table    512 entries of 8 bytes in 4 KiB; a line is the 8 entries of a cache line
//   leaf     2^lg2 bytes. Where it is larger than what an entry of its level spans, the same entry stands in 2^(lg2 −
//            span) places,
//            its replicas, next to each other; hardware may set A and D in any of them
//   context  the word of the device's context, in the hardware's layout, that says whether hardware sets A and D at all
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>

namespace dirtyring::iommu {

inline constexpr unsigned granule_lg2 = 12;
inline constexpr unsigned table_lg2 = 9;
inline constexpr unsigned table_entries = 1u << table_lg2;
inline constexpr unsigned line_entries = 8;
inline constexpr unsigned leaf_level_max = 2; // entries of 1 GiB
inline constexpr unsigned largest_leaf_lg2 = granule_lg2 + leaf_level_max * table_lg2;

// log2 of what one entry at `level` spans.
constexpr unsigned entry_lg2(unsigned level)
{
    return granule_lg2 + level * table_lg2;
}

constexpr unsigned entry_index(std::uint64_t iova, unsigned level)
{
    return static_cast<unsigned>(iova >> entry_lg2(level)) & (table_entries - 1);
}

// The level at which a leaf of 2^lg2 bytes stands.
constexpr unsigned leaf_level(unsigned lg2)
{
    return (lg2 - granule_lg2) / table_lg2;
}

// Bits [low, high).
constexpr std::uint64_t bits_between(unsigned low, unsigned high)
{
    return (1ull << high) - (1ull << low);
}

struct Rights {
    bool read = false;
    bool write = false;
    bool operator==(const Rights &) const = default;
};

// What bits of an entry say something: it does where (entry & mask) == value.
struct Pattern {
    std::uint64_t mask;
    std::uint64_t value;
    [[nodiscard]] constexpr bool matches(std::uint64_t entry) const { return (entry & mask) == value; }
};

enum class EntryKind { none, table, leaf };

struct Entry {
    EntryKind kind = EntryKind::none;
    std::uint64_t address = 0; // leaf: its OA, of its first byte; table: its index
    unsigned lg2 = 0;          // leaf: log2 of its size
    Rights rights;             // ANDed over the levels
    bool operator==(const Entry &) const = default;
};

// `tracked`: of an hwpt with dirty tracking. Where D stands in for the right to write, a leaf of any other hwpt has no
// D. Version 14 does not know how to break a concept.
// clang-format off
template <class F>
concept Format = requires(std::uint64_t entry, std::uint64_t &live, unsigned level, unsigned lg2, Rights rights,
                          bool flag) {
    { F::id } -> std::convertible_to<unsigned>;           // enum dr_format of ring/control.h
    { F::name } -> std::convertible_to<const char *>;
    { F::levels_min } -> std::convertible_to<unsigned>;   // of a page table
    { F::levels_max } -> std::convertible_to<unsigned>;
    { F::oa_lg2 } -> std::convertible_to<unsigned>;       // OAs are below 2^oa_lg2
    { F::always_on } -> std::convertible_to<bool>;        // what is tracked can be written only while the context
                                                          // tracks
    { F::coherent_only } -> std::convertible_to<bool>;    // only hardware whose walks are coherent sets D
    { F::sizes(level) } -> std::same_as<std::uint64_t>;   // bit n: a leaf at this level may have 2^n bytes
    { F::leaf(entry, lg2, rights, flag) } -> std::same_as<std::uint64_t>; // of an OA; tracked
    { F::table(entry, level) } -> std::same_as<std::uint64_t>;            // of a table index; level of the table named
    { F::decode(entry, level) } -> std::same_as<Entry>;
    { F::usable_as_is(entry, flag) } -> std::same_as<bool>; // a leaf, by hardware that sets neither A nor D; write
    { F::accessed(entry, flag) } -> std::same_as<std::uint64_t>; // a leaf with A, and if asked and it may be written
                                                                 // with D
    { F::accessed_table(entry) } -> std::same_as<std::uint64_t>; // a table entry with A, where such have it
    { F::dirty(entry) } -> std::same_as<bool>;               // a leaf with D
    { F::leaf_dirty } -> std::convertible_to<Pattern>;       // the same of an entry that is a leaf, for many at once
    { F::leaf_settled } -> std::convertible_to<Pattern>;     // D and A: hardware changes nothing in it any more
    { F::dirty_flip } -> std::convertible_to<std::uint64_t>; // the bits in which a leaf with D differs from itself
                                                             // without
    { F::same_translation(entry, entry) } -> std::same_as<bool>; // but for A and D
    { F::make_clean(live) } -> std::same_as<void>;           // a live leaf with D; one RMW, seq_cst (S4)
    { F::make_dirty(live) } -> std::same_as<void>;           // a live leaf, if it may be written; one RMW, seq_cst
    { F::nt } -> std::convertible_to<std::uint64_t>;         // a leaf that is not cached while it is split; 0: there is
                                                             // no such bit
    { F::context(flag) } -> std::same_as<std::uint64_t>;     // the word that makes hardware set A and D, or leave them
                                                             // alone
    { F::tracks(entry) } -> std::same_as<bool>;              // does this word make it?
};
// clang-format on

// The sizes of leaves that are used, bit n: 2^n bytes. all: also those between what entries of two levels span.
template <Format F> constexpr std::uint64_t leaf_sizes(bool all)
{
    std::uint64_t sizes = 0;
    for (unsigned level = 0; level <= leaf_level_max; ++level)
        sizes |= F::sizes(level) & (all ? ~0ull : 1ull << entry_lg2(level));
    return sizes & bits_between(granule_lg2, largest_leaf_lg2 + 1);
}

} // namespace dirtyring::iommu
