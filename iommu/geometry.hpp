// Where everything of an hwpt lies in its two regions, computed once and published in dr_translation_header.
#pragma once

#include "iommu/format.hpp"
#include "iommu/layout.h"

#include <bit>
#include <cstdint>

namespace dirtyring::iommu {

inline constexpr unsigned table_size_lg2 = 12;
inline constexpr std::uint64_t large_page_tables = 512; // whose pages make a page of 2 MiB
inline constexpr std::uint64_t large_page = large_page_tables << table_size_lg2;
inline constexpr unsigned aperture_lg2_min = entry_lg2(1); // one table
inline constexpr unsigned aperture_lg2_max = 48;           // every device maps the memory of all tables
inline constexpr unsigned levels_max = 6;
inline constexpr unsigned shards_max = 64; // a bit for each in a word
static_assert(DR_REGION_LG2 >= entry_lg2(1) && DR_REGION_LG2 <= largest_leaf_lg2);

// Tables from this level up belong to no shard and stay.
inline constexpr unsigned top_level = leaf_level_max;
inline constexpr unsigned top_span_lg2 = entry_lg2(top_level + 1); // of a table at top_level: 512 GiB

constexpr std::uint64_t round_up(std::uint64_t n, std::uint64_t to)
{
    return (n + to - 1) / to * to;
}

// How many items of 2^lg2 bytes cover 2^span_lg2 bytes; at least one.
constexpr std::uint64_t covering(unsigned span_lg2, unsigned lg2)
{
    return span_lg2 > lg2 ? 1ull << (span_lg2 - lg2) : 1;
}

// A shard's tables at `level`; at the top, the summary words that it needs for the tables it shares with others.
constexpr std::uint64_t tables_at(unsigned slice_lg2, unsigned level)
{
    return covering(slice_lg2, entry_lg2(level + 1));
}

// Every table that a shard could ever have has a number of its own in the shard's index range, level by level from the
// top, in the order of IOVAs: tables that translate neighbours are neighbours, and the eight below a line share a byte
// of table bits. The lowest ones, for 1 GiB each time, share a large page.
constexpr std::uint64_t first_number(unsigned slice_lg2, unsigned level)
{
    if (level == top_level)
        return 0;
    return round_up(first_number(slice_lg2, level + 1) + tables_at(slice_lg2, level + 1),
                    level == 0 ? large_page_tables : 64);
}

// Table indices of one shard, in whole cache lines of table bits and large pages.
constexpr std::uint64_t shard_tables(unsigned slice_lg2)
{
    return round_up(first_number(slice_lg2, 0) + tables_at(slice_lg2, 0), 512);
}

// As few levels of tables as span the aperture.
constexpr unsigned levels_needed(unsigned aperture_lg2)
{
    unsigned levels = 1;
    while (entry_lg2(levels) < aperture_lg2)
        ++levels;
    return levels;
}

// Each slice holds the largest table-sized leaf, or it is the only one.
constexpr unsigned shards_most(unsigned aperture_lg2)
{
    const std::uint64_t slices = covering(aperture_lg2, largest_leaf_lg2);
    return slices < shards_max ? static_cast<unsigned>(slices) : shards_max;
}

// Index of the first table at `level` among the top tables. With more levels than the aperture needs, the highest have
// one each.
constexpr std::uint64_t first_top_table(const dr_translation_header &h, unsigned level)
{
    std::uint64_t index = 0;
    for (unsigned l = h.root_level; l > level; --l)
        index += covering(h.aperture_lg2, entry_lg2(l + 1));
    return index;
}

constexpr std::uint64_t first_table(const dr_translation_header &h, unsigned shard)
{
    return round_up(h.top_tables, 512) + shard * shard_tables(h.slice_lg2);
}

// aperture_lg2 within aperture_lg2_min..max; shards a power of two, up to shards_most; levels from levels_needed to
// levels_max, 0: as few as needed.
//
// With one or two levels the root is a table of the only shard's: there is a top table above it, as ever, but nobody
// walks it.
constexpr dr_translation_header make_geometry(unsigned format, unsigned aperture_lg2, unsigned shards,
                                              unsigned levels = 0)
{
    constexpr std::uint64_t page = 1u << table_size_lg2;
    dr_translation_header h{};
    h.magic = DR_TRANSLATION_MAGIC;
    h.version = DR_TRANSLATION_VERSION;
    h.format = format;
    h.aperture_lg2 = aperture_lg2;
    h.slice_lg2 = aperture_lg2 - static_cast<unsigned>(std::countr_zero(shards));
    h.shards = shards;
    h.region_lg2 = DR_REGION_LG2;
    h.root_level = (levels != 0 ? levels : levels_needed(aperture_lg2)) - 1;
    h.top_tables = first_top_table(h, top_level) + covering(aperture_lg2, top_span_lg2);
    h.root = static_cast<std::uint32_t>(
        h.root_level < top_level ? first_table(h, 0) + first_number(h.slice_lg2, h.root_level) : 0);
    h.tables = first_table(h, shards);
    h.table_bits = 0;
    h.line_words = round_up(h.tables / 8, page);
    h.table_pages = round_up(h.line_words + h.tables * 8, large_page);
    h.tables_size = h.table_pages + (h.tables << table_size_lg2);
    h.shard_controls = page;
    h.generations = round_up(h.shard_controls + shards * sizeof(dr_shard_control), page);
    h.translation_size = round_up(h.generations + 8 * covering(aperture_lg2, DR_REGION_LG2), page);
    return h;
}

// The lowest tables of each GiB are aligned in the file.
static_assert(make_geometry(1, 48, 64).table_pages % large_page == 0);
static_assert(first_table(make_geometry(1, 48, 64), 63) % large_page_tables == 0);
static_assert(first_number(48, 0) % large_page_tables == 0 && first_number(30, 0) % large_page_tables == 0);

static_assert(make_geometry(1, 39, 1).root_level == 2);
static_assert(make_geometry(1, 40, 1).root_level == 3);
static_assert(make_geometry(1, 48, 1).top_tables == 513);
static_assert(make_geometry(1, 39, 1, 6).top_tables == 4 && make_geometry(1, 39, 1, 6).root == 0);
static_assert(make_geometry(1, 21, 1).root_level == 0 && make_geometry(1, 21, 1).root > 0);

// The tables region as its users see it.
class Tables
{
  public:
    Tables() = default;
    Tables(std::byte *base, const dr_translation_header &h)
        : bits_(reinterpret_cast<std::uint64_t *>(base + h.table_bits)),
          words_(reinterpret_cast<std::uint64_t *>(base + h.line_words)), pages_(base + h.table_pages)
    {
    }

    // 64 table bits, of tables [64 i, 64 i + 64).
    [[nodiscard]] std::uint64_t &table_bits(std::uint64_t i) const { return bits_[i]; }
    [[nodiscard]] std::uint64_t &line_word(std::uint64_t t) const { return words_[t]; }
    [[nodiscard]] std::uint64_t *entries(std::uint64_t t) const
    {
        return reinterpret_cast<std::uint64_t *>(pages_ + (t << table_size_lg2));
    }

  private:
    std::uint64_t *bits_ = nullptr;
    std::uint64_t *words_ = nullptr;
    std::byte *pages_ = nullptr;
};

} // namespace dirtyring::iommu
