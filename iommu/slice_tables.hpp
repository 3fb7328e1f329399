// The tables of one slice as their owner has them: which are linked, where each lies, and whether its memory is there.
//
// Goes by its own record; of the shared tables it reads leaf entries and summary words, never a pointer. One thread.
//
//   number       of a table: its place in the shard's index range (table index − first_table). It follows from what the
//                table translates, so there is nothing to allocate, and a restart finds every table where it was
//   top number   numbers below tables_at(top_level): this slice's part of a top table; has a summary word, no page of
//                its own
#pragma once

#include "iommu/backing.hpp"
#include "iommu/format.hpp"
#include "iommu/geometry.hpp"
#include "iommu/rules.hpp"
#include "iommu/slice_record.hpp"

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

template <Format F> class SliceTables
{
  public:
    // `record`: empty, or what the owner before has left.
    SliceTables(const dr_translation_header &h, unsigned shard, Tables tables, Backing backing, SliceRecord &record)
        : h_(h), tables_(tables), first_table_(first_table(h, shard)), start_(std::uint64_t{shard} << h.slice_lg2),
          end_(start_ + (1ull << h.slice_lg2)), backing_(std::move(backing)), record_(record)
    {
        for (unsigned level = 0; level <= top_level; ++level)
            first_[level] = first_number(h.slice_lg2, level);
        present_.resize(shard_tables(h.slice_lg2) / granule_tables / 64 + 1);
        large_.resize(shard_tables(h.slice_lg2) / large_page_tables / 64 + 1);
    }
    SliceTables(const SliceTables &) = delete;
    SliceTables &operator=(const SliceTables &) = delete;

    // Takes up the tables that the owner before has noted: their memory is there. Returns those to which no parent's
    // entry points: it died between noting a link and making it, or while it replaced a table by a leaf.
    std::vector<std::uint64_t> restore()
    {
        std::vector<std::uint64_t> unlinked;
        const std::uint64_t end = words() * 64;
        for (std::uint64_t t = next_linked(first_[top_level - 1], end); t < end; t = next_linked(t + 1, end)) {
            if (!broken(Rule::present_forgotten))
                set(present_, t / granule_tables);
            const std::uint64_t link = link_to(t);
            if (const std::uint64_t now = std::atomic_ref(parent_entry(t)).load(std::memory_order_relaxed);
                now != link && now != F::accessed_table(link)) // A is the devices'
                unlinked.push_back(t);
        }
        // A root of this slice's own is always there, and so are those above it, which nobody walks. Their memory is
        // there already.
        for (unsigned level = top_level; level > h_.root_level; --level) {
            const std::uint64_t table = number(start_, level - 1);
            set(present_, table / granule_tables);
            if (!linked(table))
                link(table);
        }
        return unlinked;
    }

    [[nodiscard]] std::uint64_t start() const { return start_; }
    [[nodiscard]] std::uint64_t end() const { return end_; }
    // The highest level whose tables come and go.
    [[nodiscard]] unsigned free_level() const { return std::min(top_level, h_.root_level); }

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

    // The entry at `level` that translates iova; the table is linked.
    [[nodiscard]] std::uint64_t &entry(std::uint64_t iova, unsigned level) const
    {
        return entries(number(iova, level))[entry_index(iova, level)];
    }

    // What hangs under the entry at `level` for iova: 0 where leaves are, which have none.
    [[nodiscard]] bool table_below(std::uint64_t iova, unsigned level) const
    {
        return level > 0 && linked(number(iova, level - 1));
    }

    // ---- links ----

    [[nodiscard]] bool linked(std::uint64_t table) const { return record_.linked(table); }

    // The first linked table in [from, end); `end`: there is none.
    [[nodiscard]] std::uint64_t next_linked(std::uint64_t from, std::uint64_t end) const
    {
        while (from < end) {
            const std::uint64_t word = record_.next_word(from / 64);
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

    // An empty table; its memory is there.
    void link(std::uint64_t table)
    {
        std::memset(entries(table), 0, 1u << table_size_lg2);
        note(table);
        link_parent(table);
        point(Point::map_table_linked);
    }

    // The table is as devices shall find it: should the owner die now, the next one links it.
    void note(std::uint64_t table)
    {
        assert(test(present_, table / granule_tables) || broken(Rule::present_forgotten));
        record_.link(table);
        point(Point::map_table_noted);
        const std::uint64_t large = table / large_page_tables;
        if (test(large_, large) || !all_linked(large * large_page_tables, large_page_tables))
            return;
        set(large_, large);
        backing_.make_large(page_offset(large * large_page_tables));
    }

    // Makes the parent's entry point to the table.
    void link_parent(std::uint64_t table)
    {
        replace_leaf(table, [&](std::uint64_t) { return link_to(table); });
    }

    // Puts replacement(what was there) into the parent's entry. If a leaf was there and dirty, the leaves of the table
    // are, before anybody sees it gone.
    template <class Replacement> void replace_leaf(std::uint64_t table, Replacement replacement)
    {
        std::atomic_ref parent(parent_entry(table));
        std::uint64_t seen = parent.load(std::memory_order_seq_cst);
        if (F::dirty(seen) && !broken(Rule::split_drops_dirty))
            make_dirty(table);
        point(Point::leaf_seen);
        if (parent.compare_exchange_strong(seen, replacement(seen), std::memory_order_seq_cst))
            return;
        make_dirty(table); // a device has set A or D meanwhile, or scribbles
        parent.exchange(replacement(seen), std::memory_order_seq_cst);
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
        forget(table);
    }

    // Nothing points to it any more.
    void forget(std::uint64_t table)
    {
        record_.unlink(table);
        retired_.push_back(table);
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
            clear(large_, first / large_page_tables);
            backing_.give_back(page_offset(first), granule_tables << table_size_lg2);
        }
        retired_.clear();
    }

    // What make_large asked for at this offset is done: what was given back meanwhile may be there again.
    void made_large(std::uint64_t offset)
    {
        const std::uint64_t first = ((offset - h_.table_pages) >> table_size_lg2) - first_table_;
        for (std::uint64_t table = first; table < first + large_page_tables; table += granule_tables) {
            if (!test(present_, table / granule_tables))
                backing_.give_back(page_offset(table), granule_tables << table_size_lg2);
        }
    }

    // ---- dirt ----

    // D of all leaves in the table, and their summary, in the owner's name.
    void make_dirty(std::uint64_t table)
    {
        const unsigned level = level_of(table);
        std::uint64_t *all = entries(table);
        for (unsigned i = 0; i < table_entries; ++i) {
            if (F::decode(std::atomic_ref(all[i]).load(std::memory_order_relaxed), level).kind == EntryKind::leaf)
                F::make_dirty(all[i]);
        }
        std::atomic_ref(line_word(table)).store(~0ull, std::memory_order_seq_cst); // S4
        const std::uint64_t index = first_table_ + table;
        std::atomic_ref(tables_.table_bits(index / 64)).fetch_or(1ull << (index % 64), std::memory_order_seq_cst); // S4
        dirtied_ = true;
    }

    // The summary of one entry, in the owner's name; after D (S4).
    void mark(std::uint64_t iova, unsigned level)
    {
        if (!broken(Rule::resized_not_summarized))
            static_cast<void>(mark_line(tables_, first_table_ + number(iova, level), entry_index(iova, level)));
        dirtied_ = true;
    }

    // Since it was asked last, D was set in the owner's name, or has moved: perhaps to where a pass has been.
    [[nodiscard]] bool dirtied() { return std::exchange(dirtied_, false); }

    // ---- summary words ----

    [[nodiscard]] std::uint64_t words() const { return record_.words(); }
    [[nodiscard]] std::uint64_t &table_bits(std::uint64_t word) const
    {
        return tables_.table_bits(first_table_ / 64 + word);
    }
    [[nodiscard]] std::uint64_t &line_word(std::uint64_t table) const
    {
        return tables_.line_word(first_table_ + table);
    }

    // ---- memory ----

    // A step towards pages, summary and record of tables [low, high]; a top table has no page of its own. 0: all is
    // there; -EAGAIN: more steps to go; -ENOMEM.
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

  private:
    using Bits = std::vector<std::uint64_t>;

    static constexpr std::uint64_t granule_tables = 16;  // whose pages come and go together: 64 KiB
    static constexpr std::uint64_t tables_at_once = 512; // made present in one step: 2 MiB

    [[nodiscard]] std::uint64_t page_offset(std::uint64_t table) const
    {
        return h_.table_pages + ((first_table_ + table) << table_size_lg2);
    }

    [[nodiscard]] std::uint64_t link_to(std::uint64_t table) const
    {
        return F::table(first_table_ + table, level_of(table));
    }

    [[nodiscard]] std::uint64_t &parent_entry(std::uint64_t table) const
    {
        return entry(base(table), level_of(table) + 1);
    }

    // Whole words of the record.
    [[nodiscard]] bool all_linked(std::uint64_t first, std::uint64_t count) const
    {
        for (std::uint64_t word = first / 64; word < (first + count) / 64; ++word) {
            if (~record_.linked_word(word) != 0)
                return false;
        }
        return true;
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
    Backing backing_;
    SliceRecord &record_;
    std::array<std::uint64_t, top_level + 1> first_{}; // number of the first table of each level
    Bits present_; // granules whose memory is there; those of linked tables always, whoever has linked them
    Bits large_;   // large pages, perhaps
    std::vector<std::uint64_t> retired_; // unlinked, perhaps still walked
    bool dirtied_ = false;
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
