// What a sweep finds in one visit: dirty leaves become runs, and are cleaned once these are staged.
#pragma once

#include "iommu/invalidation.hpp"
#include "iommu/line_scan.hpp"
#include "iommu/slice.hpp"
#include "service/leaf_sizes.hpp"
#include "service/publisher.hpp"

#include <bit>
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
        for (unsigned w = 0; w < iommu::EntrySet::words; ++w) {
            std::uint64_t added = dirty.word(w);
            for (std::uint64_t rest = added; rest != 0;) {
                const auto first = static_cast<unsigned>(std::countr_zero(rest));
                auto pages = static_cast<unsigned>(std::countr_one(rest >> first));
                const Publisher::Added result = ring.add_pages(table.iova_of(w * 64 + first), pages);
                if (result == Publisher::Added::no_room) {
                    left.set_word(w, rest);
                    for (unsigned later = w + 1; later < iommu::EntrySet::words; ++later) {
                        left.set_word(later, dirty.word(later));
                        dirty.set_word(later, 0);
                    }
                    dirty.set_word(w, added & ~rest);
                    return left;
                }
                const std::uint64_t these = ~0ull >> (64 - pages) << first;
                rest &= ~these;
                if (result == Publisher::Added::not_mapped)
                    added &= ~these;
            }
            dirty.set_word(w, added);
        }
        return left;
    }

    // The same for entries of other sizes; replicas are of one leaf.
    iommu::EntrySet collect_leaves(const iommu::OpenTable &table, iommu::EntrySet &dirty, Publisher &ring)
    {
        iommu::EntrySet left;
        bool full = false;
        for (unsigned w = 0; w < iommu::EntrySet::words; ++w) {
            std::uint64_t added = dirty.word(w);
            for (std::uint64_t rest = added; rest != 0; rest &= rest - 1) {
                const std::uint64_t bit = rest & -rest;
                const unsigned i = w * 64 + static_cast<unsigned>(std::countr_zero(rest));
                const iommu::Leaf leaf =
                    fault(Fault::replica_reported_alone) ? slice_.entry_alone(table, i) : slice_.leaf(table, i);
                const bool replicas = leaf.replicas() > 1;
                if (replicas || full)
                    added &= ~bit;
                if (replicas && !leaves_.empty() && leaves_.back().entries == leaf.entries)
                    continue; // by another replica
                const Publisher::Added result = full ? Publisher::Added::no_room : ring.add(leaf.iova, leaf.length());
                if (result == Publisher::Added::yes) {
                    if (replicas)
                        leaves_.push_back(leaf);
                    invalidation_.touch(leaf.iova, leaf.length());
                    sizes_.reported(leaf);
                    continue;
                }
                added &= ~bit;
                if (result == Publisher::Added::no_room) {
                    full = true;
                    left.set_word(w, left.word(w) | bit);
                }
            }
            dirty.set_word(w, added);
        }
        return left;
    }

    iommu::Slice<F> &slice_;
    iommu::Invalidation &invalidation_;
    LeafSizes<F> &sizes_;
    std::vector<Found> tables_;
    std::vector<iommu::Leaf> leaves_; // those in replicas
};

} // namespace dirtyring::service
