// The owner's side of the page tables: the slice of an hwpt that one walker owns.
//
// Goes by its own record: which tables are linked, what is mapped. Of the shared tables it reads leaf entries and summary words,
// never a pointer. One thread.
//
//   number       of a table: its place in the shard's index range (table index − first_table). It follows from what the table
//                translates, so there is nothing to allocate, and a restart finds every table where it was
//   top number   numbers below tables_at(top_level): this slice's part of a top table; has a summary word, no page of its own
#pragma once

#include "iommu/backing.hpp"
#include "iommu/extent_map.hpp"
#include "iommu/fault.hpp"
#include "iommu/format.hpp"
#include "iommu/geometry.hpp"
#include "iommu/slice_record.hpp"
#include "iommu/summary.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cassert>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace dirtyring::iommu {

// 8 entries that share a cache line and a summary bit.
struct Line {
    std::uint64_t *entries;
    std::uint64_t iova;  // of entries[0]
    unsigned leaf_lg2;   // what each leaf in it maps
    std::uint8_t leaves; // which entries can be leaves
    std::uint32_t table; // its number,
    unsigned number;     // and that of the line in it
};

// One leaf, found by the owner's record.
struct Leaf {
    std::uint64_t *entry;
    std::uint64_t iova;
    std::uint64_t length;
};

template <Format F> class Slice
{
  public:
    // `record`: empty, or what the owner before has left. Then the slice is as it was, but for maps that had begun: record() takes
    // up each of them.
    // `tracked`: its hwpt has dirty tracking.
    Slice(const dr_translation_header &h, unsigned shard, Tables tables, unsigned leaf_lg2_max, bool tracked,
          Backing backing, SliceRecord record)
        : h_(h), tables_(tables), first_table_(first_table(h, shard)), start_(std::uint64_t{shard} << h.slice_lg2),
          end_(start_ + (1ull << h.slice_lg2)), leaf_lg2_max_(std::min(leaf_lg2_max, entry_lg2(h.root_level))),
          tracked_(tracked), backing_(std::move(backing)), record_(std::move(record))
    {
        for (unsigned level = 0; level <= top_level; ++level)
            first_[level] = first_number(h.slice_lg2, level);
        present_.resize(shard_tables(h.slice_lg2) / granule_tables / 64 + 1);
        record_.restore();
        record_.for_each([&](const SliceRecord::Found &found) {
            Extent e = found.extent;
            e.tag = found.slot;
            found.whole ? extents_.insert(e) : begun_.push_back(e);
        });
        const std::uint64_t end = bit_words() * 64;
        for (std::uint64_t t = next_linked(first_[top_level - 1], end); t < end; t = next_linked(t + 1, end))
            link_parent(t); // the owner before may have died between noting the link and making it
        // A root of this slice's own is always there, and so are those above it, which nobody walks. Their memory is there already.
        for (unsigned level = top_level; level > h.root_level; --level) {
            if (const std::uint64_t table = number(start_, level - 1); !record_.linked(table))
                link(table);
        }
    }

    [[nodiscard]] std::uint64_t start() const { return start_; }
    [[nodiscard]] std::uint64_t end() const { return end_; }
    [[nodiscard]] const ExtentMap &extents() const { return extents_; }
    // Is what is dirty reported? Outlives the owner.
    [[nodiscard]] bool reported() const { return record_.reported(); }
    void set_reported(bool on) { record_.set_reported(on); }

    // Calls visit(Extent) for all that devices may have translations of.
    template <class Visit> void for_each_known(Visit visit) const
    {
        extents_.for_each(visit);
        std::for_each(begun_.begin(), begun_.end(), visit);
    }

    // ---- map and unmap -------------------------------------------------------------------------------------------

    // Makes a step towards having the memory that mapping [start, end) to oa may need. 0: it is there; -EAGAIN: more steps to go;
    // -ENOMEM: it cannot be had, and nothing has changed.
    int reserve(std::uint64_t start, std::uint64_t end, std::uint64_t oa)
    {
        if (begun(start) == begun_.end() && record_.reserve() != 0)
            return -ENOMEM;
        for (unsigned level = top_level + 1; level-- > 0;) {
            const unsigned span_lg2 = entry_lg2(level + 1);
            const bool leaves_above = span_lg2 <= leaf_lg2_max_ && ((oa - start) & ((1ull << span_lg2) - 1)) == 0;
            const std::uint64_t low = number(start, level);
            const std::uint64_t high = number(end - 1, level);
            if (const int result = leaves_above ? make_present(low, low) : make_present(low, high); result != 0)
                return result;
            if (const int result = make_present(high, high); result != 0)
                return result;
        }
        return 0;
    }

    // A map begins; reserved before. `continues`: it goes on from the slice before.
    void record(Extent e, bool continues)
    {
        if (const auto before = begun(e.start); before == begun_.end()) {
            e.tag = record_.add(e, continues);
        } else {
            e.tag = before->tag;
            begun_.erase(before);
        }
        extents_.insert(e);
        point(Point::map_recorded);
    }

    // The map that begins at `start` has all its leaves.
    void recorded(std::uint64_t start)
    {
        record_.set_whole(extents_.first_in(start, start + 1)->tag);
        point(Point::map_whole);
    }

    // Maps one leaf, the largest that fits in [iova, end) and at oa; returns its length. Recorded before. A leaf that a map before a
    // restart has put there keeps its D.
    std::uint64_t map_leaf(std::uint64_t iova, std::uint64_t end, std::uint64_t oa, Rights rights)
    {
        unsigned level = 0;
        while (level < leaf_level_max && entry_lg2(level + 1) <= leaf_lg2_max_ &&
               ((iova | oa) & ((1ull << entry_lg2(level + 1)) - 1)) == 0 && end - iova >= 1ull << entry_lg2(level + 1))
            ++level;
        for (unsigned l = top_level; l > level; --l) {
            if (const std::uint64_t table = number(iova, l - 1); !record_.linked(table))
                link(table);
        }
        if (level > 0) {
            if (const std::uint64_t below = number(iova, level - 1); record_.linked(below))
                retire(below);
        }
        std::atomic_ref entry(entries(number(iova, level))[entry_index(iova, level)]);
        const std::uint64_t leaf = F::leaf(oa, entry_lg2(level), rights, tracked_);
        if (!F::same_translation(entry.load(std::memory_order_relaxed), leaf)) // what it was is no concern of any order
            entry.store(leaf, std::memory_order_seq_cst);
        point(Point::map_leaf_stored);
        return 1ull << entry_lg2(level);
    }

    // An unmap comes to the slice, at its start perhaps from the one before.
    void part(std::uint64_t start)
    {
        if (start != start_)
            return;
        if (const auto e = extents_.first_in(start, start + 1))
            record_.part(e->tag);
    }

    // Forgets the extents of [start, end), whose leaves are gone, after the advance: until then a restart must advance them.
    void forget(std::uint64_t start, std::uint64_t end)
    {
        for (auto e = extents_.first_in(start, end); e; e = extents_.first_in(e->end, end)) {
            assert(e->start >= start);
            if (e->end <= end)
                record_.remove(e->tag);
            else
                record_.cut(e->tag, end);
        }
        extents_.erase(start, end);
        point(Point::unmap_forgotten);
    }

    // The leaf that maps iova, which lies in an extent.
    [[nodiscard]] Leaf find(std::uint64_t iova) const
    {
        unsigned level = top_level;
        while (level > 0 && record_.linked(number(iova, level - 1)))
            --level;
        return {entries(number(iova, level)) + entry_index(iova, level), iova >> entry_lg2(level) << entry_lg2(level),
                1ull << entry_lg2(level)};
    }

    // Unlinks the tables that lie wholly in [start, end), where nothing is mapped any more; a table that is unmapped piece by piece
    // stays, since it is about to be mapped again.
    void reclaim(std::uint64_t start, std::uint64_t end)
    {
        for (unsigned level = std::min(top_level, h_.root_level); level-- > 0;) {
            const unsigned span_lg2 = entry_lg2(level + 1);
            const std::uint64_t from = (start + (1ull << span_lg2) - 1) >> span_lg2;
            const std::uint64_t upto = end >> span_lg2;
            if (from >= upto)
                continue;
            const std::uint64_t last = number((upto - 1) << span_lg2, level);
            for (std::uint64_t t = next_linked(number(from << span_lg2, level), last + 1); t <= last;
                 t = next_linked(t + 1, last + 1))
                retire(t);
        }
    }

    // Calls visit(iova, length) for each table that is unlinked but may still be walked.
    template <class Visit> void for_each_retired(Visit visit) const
    {
        for (const std::uint64_t table : retired_)
            visit(base(table), 1ull << entry_lg2(level_of(table) + 1));
    }

    [[nodiscard]] bool has_retired() const { return !retired_.empty(); }

    // A grace period after the advance over their range has passed: nobody walks them any more.
    void reuse_retired()
    {
        std::sort(retired_.begin(), retired_.end());
        for (std::size_t i = 0; i < retired_.size(); ++i) {
            const std::uint64_t granule = retired_[i] / granule_tables;
            if (i > 0 && retired_[i - 1] / granule_tables == granule)
                continue;
            const std::uint64_t first = granule * granule_tables;
            if ((record_.linked_word(first / 64) >> (first % 64) & ((1ull << granule_tables) - 1)) != 0)
                continue;
            clear(present_, granule);
            backing_.give_back(page_offset(first), granule_tables << table_size_lg2);
        }
        retired_.clear();
    }

    // ---- summary and dirty lines ---------------------------------------------------------------------------------

    // The first word of table bits from `i` on that matters; bit_words(): there is none.
    [[nodiscard]] std::uint64_t next_word(std::uint64_t i) const { return record_.next_word(i); }
    [[nodiscard]] std::uint64_t bit_words() const { return record_.words(); }

    [[nodiscard]] std::uint64_t take_tables(std::uint64_t i)
    {
        return take_bits(tables_.table_bits(first_table_ / 64 + i)) & existing_tables(i);
    }

    [[nodiscard]] std::uint64_t take_lines(std::uint32_t table)
    {
        return take_bits(tables_.line_word(first_table_ + table)) & existing_lines(table);
    }

    [[nodiscard]] bool any_table_bit() const
    {
        for (std::uint64_t i = next_word(0); i < bit_words(); i = next_word(i + 1)) {
            const std::uint64_t bits =
                std::atomic_ref(tables_.table_bits(first_table_ / 64 + i)).load(std::memory_order_seq_cst);
            if ((bits & existing_tables(i)) != 0)
                return true;
        }
        return false;
    }

    [[nodiscard]] std::uint64_t existing_tables(std::uint64_t i) const { return record_.linked_word(i); }

    // Of a top table, the lines that reach into the slice.
    [[nodiscard]] std::uint64_t existing_lines(std::uint32_t table) const
    {
        if (!record_.linked(table))
            return 0;
        if (table >= tops())
            return ~0ull;
        const std::uint64_t from = std::max(start_, base(table));
        const std::uint64_t last = std::min<std::uint64_t>(end_, base(table) + (1ull << top_span_lg2)) - 1;
        const unsigned high = entry_index(last, top_level) / line_entries;
        return (~0ull >> (63 - high)) & (~0ull << (entry_index(from, top_level) / line_entries));
    }

    [[nodiscard]] Line line(std::uint32_t table, unsigned line) const
    {
        const unsigned level = level_of(table);
        const unsigned first = line * line_entries;
        const std::uint64_t iova = base(table) + (std::uint64_t{first} << entry_lg2(level));
        return {entries(table) + first, iova, entry_lg2(level), leaves(level, iova), table, line};
    }

    // Which leaves of the line are dirty. After its summary bit was taken (S4).
    [[nodiscard]] static unsigned dirty(const Line &line)
    {
        unsigned mask = 0;
        for (unsigned i = 0; i < line_entries; ++i) {
            if (F::dirty(std::atomic_ref(line.entries[i]).load(std::memory_order_seq_cst)))
                mask |= 1u << i;
        }
        return mask & line.leaves;
    }

    // Clears D of the leaves in mask, which were seen dirty.
    static void clean(const Line &line, unsigned mask)
    {
        for (; mask != 0; mask &= mask - 1)
            F::make_clean(line.entries[std::countr_zero(mask)]);
    }

    // Sets D in the owner's name: a device may have written there and cannot say so any more. Summarized by nobody: the owner owes
    // a full scan.
    static void make_dirty(const Leaf &leaf) { F::make_dirty(*leaf.entry); }

  private:
    using Bits = std::vector<std::uint64_t>;

    static constexpr std::uint64_t granule_tables = 16;  // whose pages come and go together: 64 KiB
    static constexpr std::uint64_t tables_at_once = 512; // made present in one step: 2 MiB

    // The map that a restart has interrupted and that begins at `start`.
    [[nodiscard]] std::vector<Extent>::iterator begun(std::uint64_t start)
    {
        return std::find_if(begun_.begin(), begun_.end(), [&](const Extent &e) { return e.start == start; });
    }

    // ---- numbers ----

    [[nodiscard]] std::uint64_t tops() const { return tables_at(h_.slice_lg2, top_level); }

    // The table at `level` that translates iova.
    [[nodiscard]] std::uint64_t number(std::uint64_t iova, unsigned level) const
    {
        const unsigned span_lg2 = entry_lg2(level + 1);
        return first_[level] + (iova >> span_lg2) - (start_ >> span_lg2);
    }

    [[nodiscard]] unsigned level_of(std::uint64_t table) const
    {
        unsigned level = 0;
        while (table < first_[level])
            ++level;
        return level;
    }

    // The IOVA of its entry 0.
    [[nodiscard]] std::uint64_t base(std::uint64_t table) const
    {
        const unsigned level = level_of(table);
        const unsigned span_lg2 = entry_lg2(level + 1);
        return ((start_ >> span_lg2) + (table - first_[level])) << span_lg2;
    }

    [[nodiscard]] std::uint64_t *entries(std::uint64_t table) const
    {
        if (table < tops())
            return tables_.entries(first_top_table(h_, top_level) + (base(table) >> top_span_lg2));
        return tables_.entries(first_table_ + table);
    }

    [[nodiscard]] std::uint64_t page_offset(std::uint64_t table) const
    {
        return h_.table_pages + ((first_table_ + table) << table_size_lg2);
    }

    // Which of the 8 entries at iova are this slice's, and no table hangs below them.
    [[nodiscard]] std::uint8_t leaves(unsigned level, std::uint64_t iova) const
    {
        if (level == 0)
            return 0xff;
        std::uint8_t mask = 0;
        for (unsigned i = 0; i < line_entries; ++i, iova += 1ull << entry_lg2(level)) {
            if (iova >= start_ && iova < end_ && !record_.linked(number(iova, level - 1)))
                mask = static_cast<std::uint8_t>(mask | 1u << i);
        }
        return mask;
    }

    // ---- links ----

    void link(std::uint64_t table)
    {
        record_.link(table);
        point(Point::map_table_noted);
        std::memset(entries(table), 0, 1u << table_size_lg2);
        link_parent(table);
        point(Point::map_table_linked);
    }

    void link_parent(std::uint64_t table)
    {
        std::atomic_ref(parent_entry(table))
            .store(F::table(first_table_ + table, level_of(table)), std::memory_order_seq_cst);
    }

    // Unlinks a table that maps nothing, and the tables below it.
    void retire(std::uint64_t table)
    {
        if (const unsigned level = level_of(table); level > 0) {
            const std::uint64_t below = number(base(table), level - 1);
            for (std::uint64_t t = next_linked(below, below + table_entries); t < below + table_entries;
                 t = next_linked(t + 1, below + table_entries))
                retire(t);
        }
        std::atomic_ref(parent_entry(table)).store(0, std::memory_order_seq_cst);
        point(Point::unmap_unlinked);
        record_.unlink(table);
        retired_.push_back(table);
    }

    [[nodiscard]] std::uint64_t &parent_entry(std::uint64_t table) const
    {
        const unsigned above = level_of(table) + 1;
        return entries(number(base(table), above))[entry_index(base(table), above)];
    }

    // The first linked table in [from, end); `end`: there is none.
    [[nodiscard]] std::uint64_t next_linked(std::uint64_t from, std::uint64_t end) const
    {
        while (from < end) {
            const std::uint64_t word = next_word(from / 64);
            if (word > from / 64)
                from = word * 64;
            if (from >= end)
                break;
            const std::uint64_t bits = record_.linked_word(from / 64) >> (from % 64);
            if (bits != 0)
                return std::min(end, from + static_cast<unsigned>(std::countr_zero(bits)));
            from = (from / 64 + 1) * 64;
        }
        return end;
    }

    // ---- memory ----

    // A step towards pages, summary and record of tables [low, high]; a top table has no page of its own.
    int make_present(std::uint64_t low, std::uint64_t high)
    {
        const std::uint64_t from = next_clear(low / granule_tables, high / granule_tables + 1);
        if (from > high / granule_tables)
            return 0;
        std::uint64_t upto = from + 1;
        while (upto <= high / granule_tables && upto - from < tables_at_once / granule_tables && !test(present_, upto))
            ++upto;
        const std::uint64_t number = from * granule_tables;
        const std::uint64_t count = (upto - from) * granule_tables;
        const std::uint64_t index = first_table_ + number;
        const bool pages = number >= tops();
        if ((pages && backing_.make_present(page_offset(number), count << table_size_lg2) != 0) ||
            backing_.make_present(h_.line_words + index * 8, count * 8) != 0 ||
            backing_.make_present(h_.table_bits + index / 8, count / 8) != 0 ||
            record_.make_present(number, count) != 0)
            return -ENOMEM;
        for (std::uint64_t granule = from; granule < upto; ++granule)
            set(present_, granule);
        for (std::uint64_t top = number; top < std::min(number + count, tops()); ++top)
            record_.link(top); // it is there, and stays
        return -EAGAIN;
    }

    // ---- sets of bits ----

    static bool test(const Bits &bits, std::uint64_t i) { return (bits[i / 64] >> (i % 64) & 1) != 0; }
    static void set(Bits &bits, std::uint64_t i) { bits[i / 64] |= 1ull << (i % 64); }
    static void clear(Bits &bits, std::uint64_t i) { bits[i / 64] &= ~(1ull << (i % 64)); }

    [[nodiscard]] std::uint64_t next_clear(std::uint64_t granule, std::uint64_t end) const
    {
        while (granule < end && test(present_, granule))
            ++granule;
        return granule;
    }

    dr_translation_header h_;
    Tables tables_;
    std::uint64_t first_table_;
    std::uint64_t start_;
    std::uint64_t end_;
    unsigned leaf_lg2_max_;
    bool tracked_;
    Backing backing_;
    SliceRecord record_;
    std::array<std::uint64_t, top_level + 1> first_{}; // number of the first table of each level
    ExtentMap extents_;                                // tag: the slot of the record
    std::vector<Extent> begun_;                        // maps that a restart has interrupted
    Bits present_;                                     // granules whose memory is there
    std::vector<std::uint64_t> retired_;               // unlinked, perhaps still walked
};

// Links the root to the top tables of an hwpt; the pages exist.
template <Format F> void make_top_tables(const dr_translation_header &h, const Tables &tables)
{
    for (unsigned level = h.root_level; level > top_level; --level) {
        const std::uint64_t parents = first_top_table(h, level);
        const std::uint64_t children = first_top_table(h, level - 1);
        for (std::uint64_t i = 0; i < covering(h.aperture_lg2, entry_lg2(level)); ++i)
            tables.entries(parents + i / table_entries)[i % table_entries] = F::table(children + i, level - 1);
    }
}

} // namespace dirtyring::iommu
