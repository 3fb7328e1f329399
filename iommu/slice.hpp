// The owner's side of the page tables: the slice of an hwpt that one walker owns. What is mapped, in which leaves, and
// which are dirty.
//
// Goes by its own record; of the shared tables it reads leaf entries and summary words, never a pointer. One thread.
//
//   which leaf maps an IOVA follows from the record: its level from the tables that are linked, and its size, where a
//   format has several
//   for a level, from its extent: the largest that fits in it
#pragma once

#include "iommu/extent_map.hpp"
#include "iommu/format.hpp"
#include "iommu/geometry.hpp"
#include "iommu/line_scan.hpp"
#include "iommu/rules.hpp"
#include "iommu/slice_record.hpp"
#include "iommu/slice_tables.hpp"
#include "iommu/summary.hpp"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace dirtyring::iommu {

// Lines of one table: bit n is line n, 8 entries that share a cache line and a summary bit.
struct Lines {
    std::uint32_t table; // its number
    std::uint64_t mask;
};

// One leaf, found by the owner's record.
struct Leaf {
    std::uint64_t *entries; // its entry, or all its replicas
    std::uint64_t iova;
    unsigned lg2;
    unsigned level;

    [[nodiscard]] std::uint64_t length() const { return 1ull << lg2; }
    [[nodiscard]] std::uint64_t end() const { return iova + length(); }
    [[nodiscard]] unsigned replicas() const { return 1u << (lg2 - entry_lg2(level)); }
};

struct SliceOptions {
    unsigned leaf_lg2_max = largest_leaf_lg2;
    bool all_sizes = false; // also those between the spans of entries, where the format has them
    bool tracked = false;   // the hwpt has dirty tracking
};

template <Format F> class Slice
{
  public:
    // `record`: empty, or what the owner before has left. Then the slice is as it was, but for maps that had begun:
    // record() takes up each of them.
    Slice(const dr_translation_header &h, unsigned shard, Tables tables, const SliceOptions &options, Backing backing,
          SliceRecord record)
        : record_(std::move(record)), tables_(h, shard, tables, std::move(backing), record_),
          leaf_lg2_max_(std::min(options.leaf_lg2_max, entry_lg2(h.root_level))), tracked_(options.tracked),
          sizes_(leaf_sizes<F>(options.all_sizes))
    {
        record_.restore();
        record_.for_each([&](const SliceRecord::Found &found) {
            found.whole ? extents_.insert(found.extent) : begun_.push_back(found.extent);
        });
        unlinked_ = tables_.restore();
    }

    [[nodiscard]] std::uint64_t start() const { return tables_.start(); }
    [[nodiscard]] std::uint64_t end() const { return tables_.end(); }
    [[nodiscard]] const ExtentMap &extents() const { return extents_; }
    [[nodiscard]] SliceTables<F> &tables() { return tables_; }
    // Tables to which the owner before has left no parent's entry; once.
    [[nodiscard]] std::vector<std::uint64_t> take_unlinked() { return std::exchange(unlinked_, {}); }
    // What outlives the owner.
    [[nodiscard]] SliceRecord &kept() { return record_; }

    // Calls visit(Extent) for all that devices may have translations of.
    template <class Visit> void for_each_known(Visit visit) const
    {
        extents_.for_each(visit);
        std::for_each(begun_.begin(), begun_.end(), visit);
    }

    // The first of those in [start, end).
    [[nodiscard]] std::optional<Extent> first_known_in(std::uint64_t start, std::uint64_t end) const
    {
        std::optional<Extent> first = extents_.first_in(start, end);
        for (const Extent &e : begun_) {
            if (e.start < end && e.end > start && (!first || e.start < first->start) &&
                !broken(Rule::death_skips_begun))
                first = e;
        }
        return first;
    }

    // ---- map and unmap -------------------------------------------------------------------------------------------

    // The largest leaf of maps to come, at most leaf_lg2_max of the options.
    void limit_leaves(unsigned lg2) { leaf_lg2_ = std::min(lg2, leaf_lg2_max_); }

    // Makes a step towards having the memory that mapping [start, end) to oa may need. 0: it is there; -EAGAIN: more
    // steps to go; -ENOMEM: it cannot be had, and nothing has changed.
    int reserve(std::uint64_t start, std::uint64_t end, std::uint64_t oa)
    {
        if (begun(start) == begun_.end() && record_.reserve(1) != 0)
            return -ENOMEM;
        for (unsigned level = top_level + 1; level-- > 0;) {
            const unsigned span_lg2 = entry_lg2(level + 1);
            const bool leaves_above = span_lg2 <= leaf_lg2_ && ((oa - start) & ((1ull << span_lg2) - 1)) == 0;
            const std::uint64_t low = tables_.number(start, level);
            const std::uint64_t high = tables_.number(end - 1, level);
            if (const int result = tables_.make_present(low, leaves_above ? low : high); result != 0)
                return result;
            if (const int result = tables_.make_present(high, high); result != 0)
                return result;
        }
        return 0;
    }

    // A map begins; reserved before. `continues`: it goes on from the slice before.
    void record(Extent e, bool continues)
    {
        if (const auto before = begun(e.start); before == begun_.end()) {
            e.leaf_lg2 = leaf_lg2_;
            e.tag = record_.add(e, continues ? SliceRecord::continues : 0);
        } else {
            assert(before->end == e.end && before->oa == e.oa && before->rights == e.rights);
            e.leaf_lg2 = before->leaf_lg2;
            e.tag = before->tag;
            begun_.erase(before);
        }
        extents_.insert(e);
        point(Point::map_recorded);
    }

    // Maps of [start, end) that had begun before a restart do not go on: what there is of them is swept, and taken out,
    // as of any map. for_good: nor do they after another restart.
    void give_up_begun(std::uint64_t start, std::uint64_t end, bool for_good)
    {
        std::erase_if(begun_, [&](const Extent &e) {
            if (e.start >= end || e.end <= start)
                return false;
            if (for_good)
                record_.set_whole(e.tag);
            extents_.insert(e);
            return true;
        });
    }

    // The map that begins at `start` has all its leaves.
    void recorded(std::uint64_t start)
    {
        record_.set_whole(extents_.first_in(start, start + 1)->tag);
        point(Point::map_whole);
    }

    // Maps one leaf of the extent, the largest that fits at iova; recorded before. Returns its length. A leaf that a
    // map before a restart has put there keeps its D.
    std::uint64_t map_leaf(const Extent &e, std::uint64_t iova)
    {
        const unsigned lg2 = largest(e, iova, sizes_);
        const unsigned level = leaf_level(lg2);
        for (unsigned l = top_level; l > level; --l) {
            if (const std::uint64_t table = tables_.number(iova, l - 1); !tables_.linked(table))
                tables_.link(table);
        }
        const Leaf leaf = leaf_at(iova, lg2, level);
        for_each_below(leaf, [this](std::uint64_t table) { tables_.retire(table); });
        const std::uint64_t entry = F::leaf(oa_of(e, iova), lg2, e.rights, tracked_);
        for (unsigned i = 0; i < leaf.replicas(); ++i) {
            std::atomic_ref live(leaf.entries[i]);
            if (!F::same_translation(live.load(std::memory_order_relaxed),
                                     entry)) // what it was is no concern of any order
                live.store(entry, std::memory_order_seq_cst);
        }
        point(Point::map_leaf_stored);
        return leaf.length();
    }

    // An unmap comes to the slice, at its start perhaps from the one before.
    void part(std::uint64_t start)
    {
        if (start != tables_.start())
            return;
        if (const auto e = extents_.first_in(start, start + 1))
            record_.part(e->tag);
    }

    // Forgets the extents of [start, end), whose leaves are gone, after the advance: until then a restart must advance
    // them.
    void forget(std::uint64_t start, std::uint64_t end)
    {
        if (const auto next = extents_.first_in(end, end + 1); next && next->start == end && end < tables_.end())
            record_.part(next->tag); // of the same map perhaps, whose front is gone
        for (auto e = extents_.first_in(start, end); e; e = extents_.first_in(e->end, end)) {
            assert(e->start >= start);
            if (e->end <= end) {
                record_.remove(e->tag);
            } else {
                record_.part(e->tag);
                record_.cut(e->tag, end);
            }
        }
        extents_.erase(start, end);
        point(Point::unmap_forgotten);
    }

    // The leaf that maps iova, which lies in an extent.
    [[nodiscard]] Leaf find(std::uint64_t iova) const
    {
        unsigned level = top_level;
        while (tables_.table_below(iova, level))
            --level;
        return find(iova, level);
    }

    // Unlinks the tables that lie wholly in [start, end), where nothing is mapped any more; a table that is unmapped
    // piece by piece stays, since it is about to be mapped again.
    void reclaim(std::uint64_t start, std::uint64_t end)
    {
        for (unsigned level = tables_.free_level(); level-- > 0;) {
            const unsigned span_lg2 = entry_lg2(level + 1);
            const std::uint64_t from = (start + (1ull << span_lg2) - 1) >> span_lg2;
            const std::uint64_t upto = end >> span_lg2;
            if (from >= upto)
                continue;
            const std::uint64_t last = tables_.number((upto - 1) << span_lg2, level);
            for (std::uint64_t t = tables_.next_linked(tables_.number(from << span_lg2, level), last + 1); t <= last;
                 t = tables_.next_linked(t + 1, last + 1))
                tables_.retire(t);
        }
    }

    // ---- sizes of leaves, for resize.hpp ---------------------------------------------------------------------------

    // log2 of the largest leaf for iova that fits in the extent and in what `allowed` says: bit n: 2^n bytes.
    [[nodiscard]] unsigned largest(const Extent &e, std::uint64_t iova, std::uint64_t allowed) const
    {
        unsigned lg2 = granule_lg2;
        for (std::uint64_t rest = allowed & bits_between(granule_lg2 + 1, e.leaf_lg2 + 1); rest != 0;
             rest &= rest - 1) {
            const auto next = static_cast<unsigned>(std::countr_zero(rest));
            const std::uint64_t base = iova >> next << next;
            if (base < e.start || base + (1ull << next) > e.end || ((e.oa - e.start) & ((1ull << next) - 1)) != 0)
                break;
            lg2 = next;
        }
        return lg2;
    }

    [[nodiscard]] std::uint64_t sizes() const { return sizes_; }
    [[nodiscard]] unsigned leaf_lg2_max() const { return leaf_lg2_max_; }

    // A leaf for iova of this extent, clean.
    [[nodiscard]] std::uint64_t entry_for(const Extent &e, std::uint64_t iova, unsigned lg2) const
    {
        return F::leaf(oa_of(e, iova >> lg2 << lg2), lg2, e.rights, tracked_);
    }

    // There is room in the record for relimit(). 0 or -ENOMEM.
    int reserve_limit() { return record_.reserve(2); }

    // The leaves of [start, end), in one extent, are 2^lg2 bytes at most from here on. Reserved before.
    void relimit(std::uint64_t start, std::uint64_t end, unsigned lg2)
    {
        Extent e = *extents_.first_in(start, end);
        if (e.leaf_lg2 == lg2)
            return;
        if (end < e.end)
            e = cut(e, end).first;
        if (e.start < start)
            e = cut(e, start).second;
        extents_.erase(e.start, e.end);
        e.leaf_lg2 = lg2;
        record_.set_limit(e.tag, lg2);
        join(e);
    }

    // ---- summary and dirty lines ---------------------------------------------------------------------------------

    // The first word of table bits from `i` on with tables that exist; bit_words(): there is none.
    [[nodiscard]] std::uint64_t next_word(std::uint64_t i) const { return record_.next_word(i); }
    [[nodiscard]] std::uint64_t bit_words() const { return record_.words(); }
    // The first from `i` on in which a bit is set, too.
    [[nodiscard]] std::uint64_t next_marked_word(std::uint64_t i) const
    {
        // 8 words that share a cache line are looked at together: nearly always there is nothing.
        constexpr std::uint64_t group = 8;
        for (i = next_word(i); i < bit_words(); i = next_word(i)) {
            const std::uint64_t end = (i / group + 1) * group;
            std::uint64_t any = 0;
            for (std::uint64_t w = end - group; w < end; ++w)
                any |= table_bits(w);
            for (; any != 0 && i < end; ++i) {
                if ((table_bits(i) & existing_tables(i)) != 0)
                    return i;
            }
            i = end;
        }
        return bit_words();
    }

    [[nodiscard]] std::uint64_t take_tables(std::uint64_t i) const
    {
        return take_bits(tables_.table_bits(i)) & existing_tables(i);
    }

    // Not only of lines that exist: a device may have set any.
    [[nodiscard]] std::uint64_t take_lines(std::uint32_t table) const { return take_bits(tables_.line_word(table)); }

    [[nodiscard]] bool any_table_bit() const { return next_marked_word(0) != bit_words(); }

    // It is about to be taken.
    void prefetch_word(std::uint32_t table) const { prefetch_to_write(&tables_.line_word(table)); }

    void list(const Lines &lines, LinesAhead &list) const
    {
        const std::uint64_t *entries = tables_.entries(lines.table);
        for (std::uint64_t rest = lines.mask; rest != 0; rest &= rest - 1)
            list.add(entries + static_cast<unsigned>(std::countr_zero(rest)) * line_entries);
    }

    [[nodiscard]] std::uint64_t existing_tables(std::uint64_t i) const { return record_.linked_word(i); }

    // Of a top table, the lines that reach into the slice.
    [[nodiscard]] std::uint64_t existing_lines(std::uint32_t table) const
    {
        if (!tables_.linked(table))
            return 0;
        if (table >= tables_.tops())
            return ~0ull;
        const std::uint64_t base = tables_.base(table);
        const std::uint64_t from = std::max(start(), base);
        const std::uint64_t last = std::min<std::uint64_t>(end(), base + (1ull << top_span_lg2)) - 1;
        const unsigned high = entry_index(last, top_level) / line_entries;
        return (~0ull >> (63 - high)) & (~0ull << (entry_index(from, top_level) / line_entries));
    }

    [[nodiscard]] OpenTable open(std::uint32_t table) const
    {
        return {tables_.entries(table), tables_.base(table), tables_.level_of(table)};
    }

    // Lists those of the lines in which leaves are dirty, by their entries; room for table_lines. How many. After the
    // lines' summary bits were taken (S4).
    [[nodiscard]] std::size_t find_dirty(const OpenTable &table, std::uint64_t lines, unsigned which,
                                         LineEntries *out) const
    {
        const std::size_t n = find_lines(table, lines, F::leaf_dirty, which, out);
        if (table.level > 0)
            std::for_each(out, out + n, [&](LineEntries &l) { l.mask &= leaves(table, l.line); });
        return n;
    }

    // Each leaf of such a table is one entry.
    [[nodiscard]] bool has_single_entries(const OpenTable &table) const
    {
        return (sizes_ & bits_between(entry_lg2(table.level) + 1, entry_lg2(table.level + 1))) == 0;
    }

    // What entry i of the table spans.
    [[nodiscard]] static Leaf entry_alone(const OpenTable &table, unsigned i)
    {
        return {table.entries + i, table.iova_of(i), entry_lg2(table.level), table.level};
    }

    // Is any of its replicas there?
    [[nodiscard]] static bool is_there(const Leaf &leaf)
    {
        for (unsigned i = 0; i < leaf.replicas(); ++i) {
            if (F::decode(std::atomic_ref(leaf.entries[i]).load(std::memory_order_relaxed), leaf.level).kind ==
                EntryKind::leaf)
                return true;
        }
        return false;
    }

    // Has any of its replicas D?
    [[nodiscard]] static bool is_dirty(const Leaf &leaf)
    {
        for (unsigned i = 0; i < leaf.replicas(); ++i) {
            if (F::dirty(std::atomic_ref(leaf.entries[i]).load(std::memory_order_seq_cst)))
                return true;
        }
        return false;
    }

    // The leaf that entry i of the table is of; where nothing is mapped, what the entry spans.
    [[nodiscard]] Leaf leaf(const OpenTable &table, unsigned i) const
    {
        return has_single_entries(table) ? entry_alone(table, i) : find(table.iova_of(i), table.level);
    }

    // Clears D of the entries, which were seen dirty.
    static void clean(std::span<LineEntries> dirty) { make_clean<F>(dirty); }

    // Clears D wherever in the leaf's replicas it is.
    static void clean(const Leaf &leaf)
    {
        for (unsigned i = 0; i < leaf.replicas(); ++i) {
            if (F::dirty(std::atomic_ref(leaf.entries[i]).load(std::memory_order_seq_cst)))
                make_clean<F>(leaf.entries[i]);
        }
    }

    // Sets D in the owner's name: a device may have written there and cannot say so any more. Summarized by nobody: the
    // owner owes a full scan.
    static void make_dirty(const Leaf &leaf) { F::make_dirty(*leaf.entries); }

  private:
    [[nodiscard]] std::uint64_t table_bits(std::uint64_t i) const
    {
        return std::atomic_ref(tables_.table_bits(i)).load(std::memory_order_seq_cst); // S4, S5
    }

    static std::uint64_t oa_of(const Extent &e, std::uint64_t iova) { return e.oa + (iova - e.start); }

    // The map that a restart has interrupted and that begins at `start`.
    [[nodiscard]] std::vector<Extent>::iterator begun(std::uint64_t start)
    {
        return std::find_if(begun_.begin(), begun_.end(), [&](const Extent &e) { return e.start == start; });
    }

    [[nodiscard]] Leaf leaf_at(std::uint64_t iova, unsigned lg2, unsigned level) const
    {
        const std::uint64_t base = iova >> lg2 << lg2;
        return {&tables_.entry(base, level), base, lg2, level};
    }

    [[nodiscard]] Leaf find(std::uint64_t iova, unsigned level) const
    {
        const std::uint64_t here = sizes_ & bits_between(entry_lg2(level), entry_lg2(level + 1));
        unsigned lg2 = entry_lg2(level);
        if ((here & (here - 1)) != 0) { // replicas
            if (const auto e = extents_.first_in(iova, iova + 1))
                lg2 = std::max(lg2, largest(*e, iova, here));
            while (lg2 > entry_lg2(level) && any_table_below(leaf_at(iova, lg2, level)))
                --lg2; // a collapse is on its way
        }
        return leaf_at(iova, lg2, level);
    }

    // Calls visit(table) for each that hangs below an entry of the leaf: it is in the way of a map.
    template <class Visit> void for_each_below(const Leaf &leaf, Visit visit) const
    {
        if (leaf.level == 0)
            return;
        const std::uint64_t first = tables_.number(leaf.iova, leaf.level - 1);
        const std::uint64_t end = first + leaf.replicas();
        for (std::uint64_t t = tables_.next_linked(first, end); t < end; t = tables_.next_linked(t + 1, end))
            visit(t);
    }

    [[nodiscard]] bool any_table_below(const Leaf &leaf) const
    {
        bool any = false;
        for_each_below(leaf, [&](std::uint64_t) { any = true; });
        return any;
    }

    // Which of the 8 entries of the line are this slice's, and no table hangs below them.
    [[nodiscard]] unsigned leaves(const OpenTable &table, unsigned line) const
    {
        unsigned mask = 0;
        for (unsigned i = 0; i < line_entries; ++i) {
            const std::uint64_t iova = table.iova_of(line * line_entries + i);
            if (iova >= start() && iova < end() && !tables_.table_below(iova, table.level))
                mask |= 1u << i;
        }
        return mask;
    }

    // ---- extents in pieces ----
    //
    // Each step is one store. In between two pieces overlap, and the restart takes the first one for the right one:
    // their leaves are as either says.

    // Two pieces of one map.
    std::pair<Extent, Extent> cut(const Extent &e, std::uint64_t at)
    {
        Extent low = e;
        Extent high = e;
        low.end = high.start = at;
        high.oa = oa_of(e, at);
        high.tag = record_.add(high, SliceRecord::whole | SliceRecord::continues);
        record_.set_end(low.tag, at);
        extents_.erase(e.start, e.end);
        extents_.insert(low);
        extents_.insert(high);
        return {low, high};
    }

    // Inserts a piece, with its neighbours of the same map if they are like it.
    void join(Extent e)
    {
        if (const auto low = e.start > start() ? extents_.first_in(e.start - 1, e.start) : std::nullopt;
            low && goes_on(*low, e)) {
            record_.set_end(low->tag, e.end);
            record_.remove(e.tag);
            extents_.erase(low->start, low->end);
            e = {low->start, e.end, low->oa, e.rights, low->tag, e.leaf_lg2};
        }
        if (const auto high = e.end < end() ? extents_.first_in(e.end, e.end + 1) : std::nullopt;
            high && goes_on(e, *high)) {
            record_.set_end(e.tag, high->end);
            record_.remove(high->tag);
            extents_.erase(high->start, high->end);
            e.end = high->end;
        }
        extents_.insert(e);
    }

    [[nodiscard]] bool goes_on(const Extent &low, const Extent &high) const
    {
        return record_.goes_on(high.tag) && low.leaf_lg2 == high.leaf_lg2 && low.oa - low.start == high.oa - high.start;
    }

    SliceRecord record_;
    SliceTables<F> tables_;
    unsigned leaf_lg2_max_;
    unsigned leaf_lg2_ = leaf_lg2_max_; // of maps to come
    bool tracked_;
    std::uint64_t sizes_;       // bit n: a leaf may have 2^n bytes
    ExtentMap extents_;         // tag: the slot of the record
    std::vector<Extent> begun_; // maps that a restart has interrupted
    std::vector<std::uint64_t> unlinked_;
};

} // namespace dirtyring::iommu
