// How an unmap takes out leaves without losing a dirty: read → stage if dirty → swap out the value that was read.
#pragma once

#include "iommu/invalidation.hpp"
#include "iommu/slice.hpp"
#include "service/publisher.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace dirtyring::service {

template <iommu::Format F> class LeafTaker
{
  public:
    LeafTaker(iommu::Slice<F> &slice, iommu::Invalidation &invalidation) : slice_(slice), invalidation_(invalidation) {}

    struct Taken {
        bool any = false;
        bool full = false; // the ring has no room for the next leaf
    };

    // Takes leaves out of [reached, end), at most `budget` or a chunk more, and moves `reached`. `ring`: where what was dirty is
    // reported; nullptr: nowhere. What was taken out is touched.
    Taken take(std::uint64_t &reached, std::uint64_t end, Publisher *ring, unsigned budget)
    {
        Taken taken;
        if (ring != nullptr)
            ring->begin();
        while (budget > 0 && reached < end && !taken.full) {
            collect(reached, end, ring, taken.full);
            if (ring != nullptr)
                ring->stage();
            point(Point::unmap_staged);
            budget -= std::min(budget, std::max(1u, static_cast<unsigned>(found_.size())));
            swap_out(reached, ring, taken);
        }
        // An unmap that a restart does again finds no tables where the leaves were, and a hole larger than the range.
        reached = std::min(reached, end);
        return taken;
    }

  private:
    // Leaves that are staged together.
    static constexpr unsigned chunk = 64;

    struct Found {
        iommu::Leaf leaf;
        std::uint64_t seen;
    };

    // Adds a leaf, which is mapped, to the runs.
    [[nodiscard]] static bool no_room(Publisher &ring, const iommu::Leaf &leaf)
    {
        return ring.add(leaf.iova, leaf.length) == Publisher::Added::no_room;
    }

    // Reads the next leaves and adds the dirty ones to the runs. Skips a hole that reaches to the end.
    void collect(std::uint64_t &reached, std::uint64_t end, Publisher *ring, bool &full)
    {
        found_.clear();
        std::uint64_t at = reached;
        while (found_.size() < chunk && at < end) {
            const auto e = slice_.extents().first_in(at, end);
            if (!e) {
                at = end;
                break;
            }
            const iommu::Leaf leaf = slice_.find(std::max(at, e->start));
            const std::uint64_t seen = std::atomic_ref(*leaf.entry).load(std::memory_order_seq_cst);
            if (ring != nullptr && F::dirty(seen) && no_room(*ring, leaf)) {
                full = true;
                break;
            }
            found_.push_back({leaf, seen});
            at = leaf.iova + leaf.length;
        }
        if (found_.empty() && !full)
            reached = at;
    }

    // Takes out the leaves found: as they were seen, or, if they changed, after they are staged. Ends at the leaf that has no room.
    void swap_out(std::uint64_t &reached, Publisher *ring, Taken &taken)
    {
        for (const Found &f : found_) {
            std::atomic_ref entry(*f.leaf.entry);
            std::uint64_t now = f.seen;
            bool out = ring != nullptr && F::dirty(f.seen)
                           ? (entry.exchange(0, std::memory_order_seq_cst), true)
                           : entry.compare_exchange_strong(now, 0, std::memory_order_seq_cst);
            if (!out && !F::dirty(now)) // a read set A
                out = entry.compare_exchange_strong(now, 0, std::memory_order_seq_cst);
            if (!out) {
                if (ring != nullptr && no_room(*ring, f.leaf)) {
                    taken.full = true;
                    return;
                }
                if (ring != nullptr)
                    ring->stage();
                entry.exchange(0, std::memory_order_seq_cst);
            }
            invalidation_.touch(f.leaf.iova, f.leaf.length);
            taken.any = true;
            reached = f.leaf.iova + f.leaf.length;
        }
    }

    iommu::Slice<F> &slice_;
    iommu::Invalidation &invalidation_;
    std::vector<Found> found_;
};

} // namespace dirtyring::service
