// Leaves made smaller (split, demote) and larger (collapse, promote), while devices write through them.
//
//   split of a replicated leaf   each replica: compare-and-swap, its D carried; then D in every part if any replica had
//                                it; then the record
//   split by a table             its leaves as they shall be; noted; D in all of them if the large leaf has it; then
//                                compare-and-swap
//   collapse within a table      the record; then each entry: compare-and-swap, its D carried: one dirty replica is a
//                                dirty leaf
//   collapse of a table          swapped for the leaf; when nobody is left who found the table, D if any of its leaves
//                                has it; then the note of the table goes. Before, a restart puts the table back
//
// In doubt the record has the larger leaves: what is dirty then is reported too widely, never too narrowly.
//
// Hardware that must not find a large leaf and the table in its place within one grace period (SMMUv3) gets both in two
// steps, with the grace period between them: the old entry not cached any more (its nT bit), or gone, and whoever
// misses it waits.
#pragma once

#include "iommu/slice.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <optional>
#include <vector>

namespace dirtyring::iommu {

// What stands between two sizes; the numbers are those of SMMUv3's BBML.
enum class Break : std::uint8_t {
    stall = 0,      // no entry: devices wait
    not_cached = 1, // nT
    none = 2,
};

// What is resized, and how far that is.
struct Resize {
    std::uint64_t start;
    std::uint64_t end;
    unsigned lg2; // split: leaves are 2^lg2 bytes at most; collapse: at least, where they can be
    std::uint64_t at = start;
    unsigned stage = 0; // of a collapse
    bool over = false;
};

template <Format F> class Resizer
{
  public:
    // control: of the slice.
    Resizer(Slice<F> &slice, Break how, dr_shard_control &control)
        : slice_(slice), tables_(slice.tables()), how_(how), breaking_(control.breaking)
    {
    }

    // The owner before may have died with a table noted and a leaf in its place, or nothing. Devices may have found the
    // leaf: so the table is linked as after a split, by settle(), once everything is advanced and they are gone.
    void restore()
    {
        for (const std::uint64_t table : slice_.take_unlinked()) {
            if (how_ == Break::none || broken(Rule::relinked_at_once))
                tables_.link_parent(table);
            else
                begin_link(table);
        }
    }

    // Splits some leaves. What touch(iova, length) is called for is to be advanced; settle() when the grace period has
    // passed. 0, or -ENOMEM: what was split stays so.
    template <class Touch> int split(Resize &r, unsigned budget, Touch touch)
    {
        std::uint64_t here = r.at;
        while (budget > 0 && here < r.end) {
            const auto e = slice_.extents().first_in(here, r.end);
            if (!e) {
                here = r.end;
                break;
            }
            here = std::max(here, e->start);
            const Leaf leaf = slice_.find(here);
            if (!is_there(*e, leaf)) {
                here = leaf.end();
                --budget;
                continue;
            }
            if (leaf.lg2 <= r.lg2) {
                // No leaf of a table at level 0 is larger than the others, but for replicas.
                const bool all = leaf.level == 0 && (!replicates() || e->leaf_lg2 <= r.lg2);
                here = all ? std::min(e->end, ((here >> entry_lg2(1)) + 1) << entry_lg2(1)) : leaf.end();
                --budget;
                continue;
            }
            budget -= std::min(budget, cost);
            // No larger than the record allows already: it has the larger leaves at any time.
            const unsigned lg2 = broken(Rule::split_raises_limit) ? r.lg2 : std::min(r.lg2, e->leaf_lg2);
            if (leaf.replicas() > 1) {
                if (const int error = split_replicas(*e, leaf, lg2); error != 0)
                    return error;
                touch(leaf.iova, leaf.length());
                continue;
            }
            if (const int error = split_by_table(*e, leaf, lg2); error != 0)
                return error;
            if (how_ != Break::none) {
                touch(leaf.iova, leaf.length());
                here = leaf.end();
            }
        }
        r.at = splits_.empty() ? here : std::max(r.at, tables_.base(splits_.front()));
        r.over = r.at >= r.end;
        return 0;
    }

    // Collapses some leaves; as split(). A stage for the leaves within the tables of each level, and one for the
    // tables.
    template <class Touch> int collapse(Resize &r, unsigned budget, Touch touch)
    {
        while (budget > 0 && !r.over) {
            const auto e = r.at < r.end ? slice_.extents().first_in(r.at, r.end) : std::nullopt;
            if (!e) {
                if (!collapses_.empty())
                    break; // what the next stage finds is not there yet
                r.at = r.start;
                r.over = ++r.stage > 2 * leaf_level(r.lg2);
                continue;
            }
            r.at = std::max(r.at, e->start);
            const unsigned level = (r.stage + 1) / 2;
            if (r.stage % 2 != 0) {
                budget -= std::min(budget, collapse_table(*e, r, level, touch));
            } else if (!replicates()) {
                r.at = r.end;
            } else if (e->leaf_lg2 < r.lg2) {
                if (const int error = raise_limit(*e, r); error != 0)
                    return error;
            } else {
                budget -= std::min(budget, collapse_within(*e, r, level));
            }
        }
        return 0;
    }

    // Nobody is left who has found what was replaced.
    void settle()
    {
        for (const std::uint64_t table : splits_)
            tables_.link_parent(table);
        splits_.clear();
        for (const Collapsed &c : collapses_)
            finish(c);
        collapses_.clear();
        if ((breaking_ & 1) != 0)
            end_break();
    }

  private:
    static constexpr unsigned cost = 64; // of a table, in units of the budget: a leaf looked at

    struct Collapsed {
        std::uint64_t table;
        std::uint64_t leaf; // clean
    };

    [[nodiscard]] bool replicates() const
    {
        constexpr std::uint64_t plain = 1ull << entry_lg2(0) | 1ull << entry_lg2(1) | 1ull << entry_lg2(2);
        return (slice_.sizes() & ~plain) != 0;
    }

    // ---- split ----

    int split_replicas(const Extent &e, const Leaf &leaf, unsigned lg2)
    {
        if (slice_.reserve_limit() != 0)
            return -ENOMEM;
        const Extent small = limited(e, lg2);
        bool any = false;
        for (unsigned i = 0; i < leaf.replicas(); ++i) {
            const std::uint64_t iova = leaf.iova + (std::uint64_t{i} << entry_lg2(leaf.level));
            const std::uint64_t part = slice_.entry_for(
                e, iova, slice_.largest(small, iova, sizes_at(leaf.level) | 1ull << entry_lg2(leaf.level)));
            any |= swap(leaf.entries[i], part);
            point(Point::split_replica);
        }
        for (unsigned i = 0; any && i < leaf.replicas() && !broken(Rule::naive_replicated_split); ++i) {
            F::make_dirty(leaf.entries[i]);
            tables_.mark(leaf.iova + (std::uint64_t{i} << entry_lg2(leaf.level)), leaf.level);
        }
        point(Point::split_replicas);
        slice_.relimit(leaf.iova, leaf.end(), lg2);
        point(Point::split_limited);
        return 0;
    }

    int split_by_table(const Extent &e, const Leaf &leaf, unsigned lg2)
    {
        const unsigned level = leaf.level - 1;
        const std::uint64_t table = tables_.number(leaf.iova, level);
        if (replicates() && slice_.reserve_limit() != 0)
            return -ENOMEM;
        for (int result = -EAGAIN; result != 0;) {
            result = tables_.make_present(table, table);
            if (result == -ENOMEM)
                return result;
        }
        const Extent small = limited(e, lg2);
        const bool accessed = is_accessed(std::atomic_ref(*leaf.entries).load(std::memory_order_relaxed));
        std::uint64_t *entries = tables_.entries(table);
        for (unsigned i = 0; i < table_entries; ++i) {
            const std::uint64_t iova = leaf.iova + (std::uint64_t{i} << entry_lg2(level));
            const unsigned size = std::max(entry_lg2(level), slice_.largest(small, iova, sizes_at(level)));
            const std::uint64_t part = slice_.entry_for(e, iova, size);
            // Nobody walks it yet; relaxed, since what links it is seq_cst.
            std::atomic_ref(entries[i]).store(accessed ? F::accessed(part, false) : part, std::memory_order_relaxed);
        }
        tables_.note(table);
        if (how_ == Break::none) {
            tables_.link_parent(table);
        } else {
            begin_link(table);
        }
        point(Point::split_broken);
        if (replicates())
            slice_.relimit(leaf.iova, leaf.end(), lg2);
        point(Point::split_limited);
        return 0;
    }

    // Takes what is in the table's place from those who will look for it; settle() links the table.
    void begin_link(std::uint64_t table)
    {
        if (how_ == Break::stall)
            begin_break();
        tables_.replace_leaf(table, [this](std::uint64_t seen) {
            return how_ == Break::stall || seen == 0 ? 0 : seen | F::nt; // 0: a map had not linked it yet
        });
        splits_.push_back(table);
    }

    // ---- collapse ----

    // Of the leaves in the range that the extent's limit keeps small. 0 or -ENOMEM. A leaf that the range begins or
    // ends in stays as it is: the record must not have it in two pieces, when the D of one is that of both.
    int raise_limit(const Extent &e, Resize &r)
    {
        if (slice_.reserve_limit() != 0)
            return -ENOMEM;
        std::uint64_t end = std::min(e.end, r.end);
        if (!broken(Rule::collapse_cuts_leaf)) {
            if (const Leaf first = slice_.find(r.at); first.iova < r.at)
                r.at = first.end();
            if (const Leaf last = slice_.find(end - 1); last.end() > end)
                end = last.iova;
        }
        if (r.at < end)
            slice_.relimit(r.at, end, r.lg2);
        else
            r.at = std::min(e.end, r.end);
        return 0;
    }

    // The entries of one leaf-to-be; what it cost.
    unsigned collapse_within(const Extent &e, Resize &r, unsigned level)
    {
        const unsigned lg2 = entry_lg2(level);
        if (!tables_.linked(tables_.number(r.at, level))) {
            r.at = ((r.at >> entry_lg2(level + 1)) + 1) << entry_lg2(level + 1);
            return 1;
        }
        if (tables_.table_below(r.at, level)) {
            r.at = ((r.at >> lg2) + 1) << lg2;
            return 1;
        }
        const Leaf leaf = slice_.find(r.at);
        const std::uint64_t entry = slice_.entry_for(e, leaf.iova, leaf.lg2);
        bool dirty = false;
        for (unsigned i = 0; is_there(e, leaf) && i < leaf.replicas(); ++i) {
            if (!F::same_translation(std::atomic_ref(leaf.entries[i]).load(std::memory_order_relaxed), entry))
                dirty |= swap(leaf.entries[i], entry);
        }
        if (dirty)
            tables_.mark(leaf.iova, level); // a replica's D is the leaf's, whoever has set it
        r.at = leaf.end();
        return leaf.replicas();
    }

    // One entry of `level`; what it cost.
    template <class Touch> unsigned collapse_table(const Extent &e, Resize &r, unsigned level, Touch touch)
    {
        const unsigned lg2 = entry_lg2(level);
        const std::uint64_t block = r.at >> lg2 << lg2;
        const std::uint64_t next = block + (1ull << lg2);
        const bool fits = block >= r.at && next <= r.end && tables_.table_below(block, level) &&
                          slice_.largest(limited(e, lg2), block, 1ull << lg2) == lg2;
        const bool tables_below = fits && level > 1 && any_linked(block, level - 2);
        r.at = next; // past what it could be of another extent, too: no leaf is of two
        if (!fits || tables_below)
            return 1;
        const std::uint64_t table = tables_.number(block, level - 1);
        if (!all_leaves(tables_.entries(table), table_entries, level - 1))
            return cost;
        std::uint64_t leaf = slice_.entry_for(e, block, lg2);
        if (broken(Rule::naive_collapse) && read(table).dirty)
            leaf = F::accessed(leaf, true);
        if (how_ == Break::stall)
            begin_break();
        std::atomic_ref(tables_.entry(block, level))
            .exchange(how_ == Break::stall        ? 0
                      : how_ == Break::not_cached ? leaf | F::nt
                                                  : leaf,
                      std::memory_order_seq_cst);
        point(Point::collapse_swapped);
        collapses_.push_back({table, leaf});
        touch(block, 1ull << lg2);
        return cost;
    }

    void finish(const Collapsed &c)
    {
        const std::uint64_t iova = tables_.base(c.table);
        const unsigned level = tables_.level_of(c.table) + 1;
        std::uint64_t &entry = tables_.entry(iova, level);
        std::atomic_ref live(entry);
        const Found found = broken(Rule::naive_collapse) ? Found{} : read(c.table);
        if (how_ == Break::stall)
            live.store(c.leaf, std::memory_order_seq_cst);
        else if (how_ == Break::not_cached)
            live.fetch_and(~F::nt, std::memory_order_seq_cst);
        if (found.accessed) {
            std::uint64_t now = live.load(std::memory_order_relaxed);
            live.compare_exchange_strong(now, F::accessed(now, false),
                                         std::memory_order_seq_cst); // or a device has just done it
        }
        if (found.dirty) {
            F::make_dirty(entry);
            tables_.mark(iova, level);
        }
        point(Point::collapse_read);
        tables_.forget(c.table);
        point(Point::collapse_finished);
    }

    struct Found {
        bool dirty = false;
        bool accessed = false;
    };

    [[nodiscard]] Found read(std::uint64_t table) const
    {
        Found found;
        std::uint64_t *entries = tables_.entries(table);
        for (unsigned i = 0; i < table_entries; ++i) {
            const std::uint64_t seen = std::atomic_ref(entries[i]).load(std::memory_order_seq_cst);
            found.dirty |= F::dirty(seen);
            found.accessed |= is_accessed(seen);
        }
        return found;
    }

    // ---- both ----

    // An unmap that a restart has interrupted has taken leaves out, perhaps their table, and not forgotten the extent.
    // They must not come back.
    [[nodiscard]] static bool is_there(const Extent &e, const Leaf &leaf)
    {
        return leaf.iova >= e.start && leaf.end() <= e.end && all_leaves(leaf.entries, leaf.replicas(), leaf.level);
    }

    [[nodiscard]] static bool all_leaves(std::uint64_t *entries, unsigned n, unsigned level)
    {
        return std::all_of(entries, entries + n, [level](std::uint64_t &entry) {
            return F::decode(std::atomic_ref(entry).load(std::memory_order_relaxed), level).kind == EntryKind::leaf;
        });
    }

    // Puts `entry` in the place of a leaf that maps the same, its A and D carried. True: it was dirty.
    static bool swap(std::uint64_t &place, std::uint64_t entry)
    {
        std::atomic_ref live(place);
        std::uint64_t seen = live.load(std::memory_order_seq_cst);
        const bool was = F::dirty(seen);
        point(Point::leaf_seen);
        if (live.compare_exchange_strong(seen, was || is_accessed(seen) ? F::accessed(entry, was) : entry,
                                         std::memory_order_seq_cst))
            return was;
        live.exchange(F::accessed(entry, true),
                      std::memory_order_seq_cst); // a device has set A or D meanwhile, or scribbles
        return true;
    }

    static bool is_accessed(std::uint64_t entry) { return entry != 0 && F::accessed(entry, false) == entry; }

    [[nodiscard]] std::uint64_t sizes_at(unsigned level) const
    {
        return slice_.sizes() & bits_between(entry_lg2(level), entry_lg2(level + 1));
    }

    static Extent limited(Extent e, unsigned lg2)
    {
        e.leaf_lg2 = lg2;
        return e;
    }

    [[nodiscard]] bool any_linked(std::uint64_t block, unsigned level) const
    {
        const std::uint64_t first = tables_.number(block, level);
        return tables_.next_linked(first, first + table_entries) != first + table_entries;
    }

    void begin_break()
    {
        if ((breaking_ & 1) == 0)
            std::atomic_ref(breaking_).store(breaking_ + 1, std::memory_order_seq_cst); // S8
    }
    void end_break() { std::atomic_ref(breaking_).store(breaking_ + 1, std::memory_order_seq_cst); } // S8

    Slice<F> &slice_;
    SliceTables<F> &tables_;
    Break how_;
    std::uint64_t &breaking_;
    std::vector<std::uint64_t> splits_; // tables to be linked
    std::vector<Collapsed> collapses_;
};

} // namespace dirtyring::iommu
