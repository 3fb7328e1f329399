// What a sweep finds in one visit: dirty leaves become runs, and are cleaned once these are staged.
#pragma once

#include "iommu/invalidation.hpp"
#include "iommu/line_scan.hpp"
#include "iommu/slice.hpp"
#include "service/leaf_sizes.hpp"
#include "service/publisher.hpp"

#include <cstdint>
#include <vector>

namespace dirtyring::service {

template <iommu::Format F> class Batch
{
  public:
    Batch(iommu::Slice<F> &slice, iommu::Invalidation &invalidation, LeafSizes<F> &sizes)
        : slice_(slice), invalidation_(invalidation), sizes_(sizes)
    {
    }

    void begin()
    {
        tables_.clear();
        leaves_.clear();
    }
    [[nodiscard]] bool empty() const { return tables_.empty() && leaves_.empty(); }

    // Adds the leaves that are dirty in these lines to the ring's runs, and touches them. The lines with leaves for which there was no room.
    [[nodiscard]] std::uint64_t collect(const iommu::Lines &lines, Publisher &ring)
    {
        const iommu::OpenTable table = slice_.open(lines.table);
        iommu::EntrySet dirty = slice_.dirty(table, lines.mask);
        if (!dirty.any())
            return 0;
        const iommu::EntrySet left = table.level == 0 && slice_.has_single_entries(table)
                                         ? collect_pages(table, dirty, ring)
                                         : collect_leaves(table, dirty, ring);
        if (dirty.any())
            tables_.push_back({table, dirty});
        return left.lines();
    }

    // Clears D of all of them.
    void clean()
    {
        for (const Found &f : tables_)
            slice_.clean(f.table, f.dirty);
        for (const iommu::Leaf &leaf : leaves_)
            slice_.clean(leaf);
    }

  private:
    struct Found {
        iommu::OpenTable table;
        iommu::EntrySet dirty; // leaves of one entry each
    };

    // Entries that are leaves of 4 KiB, as many together as lie next to each other. Leaves in `dirty` what was added; what there was no room for.
    iommu::EntrySet collect_pages(const iommu::OpenTable &table, iommu::EntrySet &dirty, Publisher &ring)
    {
        invalidation_.touch(table.iova, std::uint64_t{iommu::table_entries} << iommu::granule_lg2);
        iommu::EntrySet left;
        bool full = false;
        dirty.keep_stretches([&](unsigned first, unsigned &pages) {
            const Publisher::Added result =
                full ? Publisher::Added::no_room : ring.add_pages(table.iova_of(first), pages);
            if (result == Publisher::Added::no_room) {
                full = true;
                left.add(first, pages);
            }
            return result == Publisher::Added::yes;
        });
        return left;
    }

    // The same for entries of other sizes, one by one; all replicas are one leaf.
    iommu::EntrySet collect_leaves(const iommu::OpenTable &table, iommu::EntrySet &dirty, Publisher &ring)
    {
        iommu::EntrySet left;
        bool full = false;
        dirty.keep_stretches([&](unsigned i, unsigned &entries) {
            entries = 1;
            const iommu::Leaf leaf =
                fault(Fault::replica_reported_alone) ? slice_.entry_alone(table, i) : slice_.leaf(table, i);
            const bool replicas = leaf.replicas() > 1;
            if (replicas && !leaves_.empty() && leaves_.back().entries == leaf.entries)
                return false; // by another replica
            const Publisher::Added result = full ? Publisher::Added::no_room : ring.add(leaf.iova, leaf.length());
            if (result == Publisher::Added::no_room) {
                full = true;
                left.add(i, 1);
            }
            if (result != Publisher::Added::yes)
                return false;
            invalidation_.touch(leaf.iova, leaf.length());
            sizes_.reported(leaf);
            if (replicas)
                leaves_.push_back(leaf);
            return !replicas;
        });
        return left;
    }

    iommu::Slice<F> &slice_;
    iommu::Invalidation &invalidation_;
    LeafSizes<F> &sizes_;
    std::vector<Found> tables_;
    std::vector<iommu::Leaf> leaves_; // those in replicas
};

} // namespace dirtyring::service
