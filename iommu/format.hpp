// What every page-table format must say of its entries. A format is one file (format_*.hpp) and the only place that knows a bit.
//
//   level    0 holds leaves only; a leaf at level l maps granule << (l * table_lg2) bytes
//   table    512 entries of 8 bytes in 4 KiB; a line is the 8 entries of a cache line
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>

namespace dirtyring::iommu {

inline constexpr unsigned granule_lg2 = 12;
inline constexpr unsigned table_lg2 = 9;
inline constexpr unsigned table_entries = 1u << table_lg2;
inline constexpr unsigned line_entries = 8;
inline constexpr unsigned leaf_level_max = 2; // 1 GiB
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

struct Rights {
    bool read = false;
    bool write = false;
    bool operator==(const Rights &) const = default;
};

enum class EntryKind { none, table, leaf };

struct Entry {
    EntryKind kind = EntryKind::none;
    std::uint64_t address = 0; // leaf: OA, bytes; table: its index
    Rights rights;             // tables: ANDed over the levels
};

// Version 14 does not know how to break a concept.
// clang-format off
template <class F>
concept Format = requires(std::uint64_t entry, unsigned level, Rights rights, bool dirty) {
    { F::leaf(entry, level, rights) } -> std::same_as<std::uint64_t>; // of an OA
    { F::table(entry, level) } -> std::same_as<std::uint64_t>;        // of a table index; level of the table named
    { F::decode(entry, level) } -> std::same_as<Entry>;
    { F::accessed(entry, dirty) } -> std::same_as<std::uint64_t>;     // with A, and D if `dirty`
    { F::dirty(entry) } -> std::same_as<bool>;                        // a valid leaf with D
    { F::same_translation(entry, entry) } -> std::same_as<bool>;      // but for A and D
    { F::dirty_bit } -> std::convertible_to<std::uint64_t>;           // what a clean leaf lacks
};
// clang-format on

} // namespace dirtyring::iommu
