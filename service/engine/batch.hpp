// What a sweep finds in one visit: dirty leaves become runs, and are cleaned once these are staged.
//
// In three rounds over many tables, each a loop over lines: they are found, added to the runs, and at the end cleaned.
#pragma once

#include "iommu/invalidation.hpp"
#include "iommu/line_scan.hpp"
#include "iommu/slice.hpp"
#include "service/engine/leaf_sizes.hpp"
#include "service/engine/publisher.hpp"

#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace dirtyring::service {

template <iommu::Format F> class Batch
{
  public:
    // lines_max: in one visit.
    Batch(iommu::Slice<F> &slice, iommu::Invalidation &invalidation, LeafSizes<F> &sizes, std::size_t lines_max)
        : slice_(slice), invalidation_(invalidation), sizes_(sizes), found_(lines_max)
    {
    }

    void begin()
    {
        any_ = false;
        used_ = 0;
        leaves_.clear();
    }
    [[nodiscard]] bool empty() const { return !any_; }

    // Adds the leaves that are dirty in these lines to the ring's runs, and touches them. False: there was no room for
    // all; what is left is still in the masks, what is finished no longer.
    [[nodiscard]] bool collect(std::span<iommu::Lines> tables, iommu::LinesAhead &ahead, Publisher &ring)
    {
        const std::size_t before = used_;
        for (unsigned t = 0; t < tables.size(); ++t) {
            if (tables[t].mask == 0)
                continue;
            const iommu::OpenTable table = slice_.open(tables[t].table);
            if (table.level > 0 || !slice_.has_single_entries(table)) {
                others_.push_back(t);
            } else if (!find(table, tables[t], t).empty()) {
                invalidation_.touch(table.iova, std::uint64_t{iommu::table_entries} << iommu::granule_lg2);
            }
        }
        bool full = !add_pages(tables, std::span(found_).subspan(before, used_ - before), ahead, ring);
        for (const unsigned t : others_) {
            const iommu::OpenTable table = slice_.open(tables[t].table);
            for (iommu::LineEntries &line : find(table, tables[t], t)) {
                if (const unsigned left = add_leaves(table, line, ring, full); left != 0)
                    tables[t].mask |= 1ull << line.line;
            }
        }
        others_.clear();
        return !full;
    }

    // Only clears D of what is dirty in these lines; finishes them.
    void clean(std::span<iommu::Lines> tables)
    {
        for (iommu::Lines &lines : tables) {
            used_ = 0;
            slice_.clean(find(slice_.open(lines.table), lines, 0));
        }
        begin();
    }

    // Clears D of all that was collected.
    void clean()
    {
        slice_.clean(std::span(found_).first(used_));
        for (const iommu::Leaf &leaf : leaves_)
            slice_.clean(leaf);
    }

  private:
    // Moves the table's lines from its mask to those found.
    std::span<iommu::LineEntries> find(const iommu::OpenTable &table, iommu::Lines &lines, unsigned which)
    {
        const std::size_t n = slice_.find_dirty(table, lines.mask, which, &found_[used_]);
        lines.mask = 0;
        used_ += n;
        return std::span(found_).subspan(used_ - n, n);
    }

    // Entries that are leaves of 4 KiB. Leaves in the lines what was added. False: there was no room for all.
    bool add_pages(std::span<iommu::Lines> tables, std::span<iommu::LineEntries> lines, iommu::LinesAhead &ahead,
                   Publisher &ring)
    {
        const auto added = ring.add_pages(lines, ahead);
        any_ |= added.any;
        unsigned left = added.left;
        for (iommu::LineEntries &line : lines.subspan(added.lines)) {
            tables[line.table].mask |= 1ull << line.line;
            line.mask &= ~left;
            left = ~0u; // of those behind
        }
        return added.left == 0;
    }

    // The same for entries of other sizes, one by one; all replicas are one leaf. Leaves in the line what is one entry
    // and was added; for which there was no room.
    unsigned add_leaves(const iommu::OpenTable &table, iommu::LineEntries &line, Publisher &ring, bool &full)
    {
        unsigned left = 0;
        for (unsigned rest = std::exchange(line.mask, 0); rest != 0; rest &= rest - 1) {
            const unsigned bit = rest & -rest;
            const unsigned i = line.line * iommu::line_entries + static_cast<unsigned>(std::countr_zero(rest));
            const iommu::Leaf leaf =
                broken(Rule::replica_reported_alone) ? slice_.entry_alone(table, i) : slice_.leaf(table, i);
            const bool replicas = leaf.replicas() > 1;
            if (replicas && !leaves_.empty() && leaves_.back().entries == leaf.entries)
                continue; // by another replica
            const Publisher::Added result = full ? Publisher::Added::no_room : ring.add(leaf.iova, leaf.length());
            if (result == Publisher::Added::no_room) {
                full = true;
                left |= bit;
            }
            if (result != Publisher::Added::yes)
                continue;
            any_ = true;
            invalidation_.touch(leaf.iova, leaf.length());
            sizes_.reported(leaf);
            if (replicas)
                leaves_.push_back(leaf);
            else
                line.mask |= bit;
        }
        return left;
    }

    iommu::Slice<F> &slice_;
    iommu::Invalidation &invalidation_;
    LeafSizes<F> &sizes_;
    bool any_ = false;
    std::vector<iommu::LineEntries> found_;
    std::size_t used_ = 0;            // of found_
    std::vector<iommu::Leaf> leaves_; // those in replicas
    std::vector<unsigned> others_;    // tables of larger leaves
};

} // namespace dirtyring::service
