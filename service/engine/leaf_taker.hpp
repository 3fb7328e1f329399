// How an unmap takes out leaves without losing a dirty: read → stage if dirty → swap out the value that was read.
#pragma once

#include "iommu/invalidation.hpp"
#include "iommu/slice.hpp"
#include "service/engine/publisher.hpp"

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

    // Takes leaves out of [reached, end), at most `budget` or a chunk more, and moves `reached`. `ring`: where what was
    // dirty is reported; nullptr: nowhere. What was taken out is touched.
    Taken take(std::uint64_t &reached, std::uint64_t end, Publisher *ring, unsigned budget)
    {
        Taken taken;
        if (ring != nullptr)
            ring->begin();
        while (budget > 0 && reached < end && !taken.full) {
            collect(reached, end, ring, taken.full);
            if (ring != nullptr && !broken(Rule::take_before_stage))
                ring->stage();
            point(Point::unmap_staged);
            budget -= std::min(budget, std::max(1u, static_cast<unsigned>(found_.size())));
            swap_out(reached, ring, taken);
            if (ring != nullptr && broken(Rule::take_before_stage)) {
                point(Point::unmap_taken_out);
                ring->stage();
            }
        }
        // An unmap that a restart does again finds no tables where the leaves were, and a hole larger than the range.
        reached = std::min(reached, end);
        return taken;
    }

    // Moves `reached` to the first leaf of [reached, end) that is there, past those that a worker before has taken out;
    // looks at `budget` of them. A leaf of which some replicas are out is whole again. False: there are more to look
    // at.
    bool skip_taken_out(std::uint64_t &reached, std::uint64_t end, unsigned budget)
    {
        for (auto e = slice_.extents().first_in(reached, end); e; e = slice_.extents().first_in(reached, end)) {
            reached = std::max(reached, e->start);
            const iommu::Leaf leaf = slice_.find(reached);
            if (slice_.is_there(leaf)) {
                put_back_missing(leaf);
                return true;
            }
            reached = std::min(leaf.end(), end);
            if (--budget == 0)
                return false;
        }
        reached = end;
        return true;
    }

  private:
    // Leaves that are staged together.
    static constexpr unsigned chunk = 64;

    struct Found {
        iommu::Leaf leaf;
        bool staged;
    };

    // Adds a leaf, which is mapped, to the runs.
    [[nodiscard]] static bool no_room(Publisher &ring, const iommu::Leaf &leaf)
    {
        return ring.add(leaf.iova, leaf.length()) == Publisher::Added::no_room;
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
            at = std::max(at, e->start);
            const iommu::Leaf leaf = slice_.find(at);
            const bool report = ring != nullptr && slice_.is_dirty(leaf);
            if (report && no_room(*ring, leaf)) {
                if (!broken(Rule::leaf_left_in_part))
                    put_back_missing(leaf); // it stays mapped
                full = true;
                break;
            }
            found_.push_back({leaf, report});
            at = leaf.end();
        }
        if (found_.empty() && (!full || !broken(Rule::hole_not_counted)))
            reached = at; // a worker before may have unmapped what is a hole now
    }

    // Takes out the leaves found. Ends at the leaf that has no room.
    void swap_out(std::uint64_t &reached, Publisher *ring, Taken &taken)
    {
        for (Found &f : found_) {
            reached = std::max(reached, f.leaf.iova); // behind a hole, perhaps
            for (unsigned i = 0; i < f.leaf.replicas(); ++i) {
                if (!swap_out(f.leaf.entries[i], f, ring)) {
                    put_back(f.leaf, i);
                    taken.full = true;
                    return;
                }
                if (f.leaf.replicas() > 1)
                    point(Point::unmap_replica_taken);
            }
            invalidation_.touch(f.leaf.iova, f.leaf.length());
            taken.any = true;
            reached = f.leaf.end();
        }
    }

    // The first `n` replicas, which were clean.
    void put_back(const iommu::Leaf &leaf, unsigned n)
    {
        const iommu::Extent e = *slice_.extents().first_in(leaf.iova, leaf.end());
        while (n-- > 0)
            std::atomic_ref(leaf.entries[n]).store(slice_.entry_for(e, leaf.iova, leaf.lg2), std::memory_order_seq_cst);
    }

    // The replicas that a worker before has taken out, each clean or after it had staged the leaf, before it died.
    void put_back_missing(const iommu::Leaf &leaf)
    {
        const iommu::Extent e = *slice_.extents().first_in(leaf.iova, leaf.end());
        for (unsigned i = 0; i < leaf.replicas(); ++i) {
            std::uint64_t none = 0;
            std::atomic_ref(leaf.entries[i])
                .compare_exchange_strong(none, slice_.entry_for(e, leaf.iova, leaf.lg2), std::memory_order_seq_cst);
        }
    }

    // One entry: as it is seen clean, or after its leaf is staged. False: there is no room for that.
    static bool swap_out(std::uint64_t &place, Found &found, Publisher *ring)
    {
        std::atomic_ref entry(place);
        std::uint64_t seen = entry.load(std::memory_order_seq_cst);
        for (unsigned tries = 0; !found.staged && tries < 2 && !F::dirty(seen); ++tries) { // a read may set A
            if (entry.compare_exchange_strong(seen, 0, std::memory_order_seq_cst))
                return true;
        }
        if (!found.staged && ring != nullptr) {
            if (no_room(*ring, found.leaf))
                return false;
            ring->stage();
            found.staged = true;
        }
        entry.exchange(0, std::memory_order_seq_cst);
        return true;
    }

    iommu::Slice<F> &slice_;
    iommu::Invalidation &invalidation_;
    std::vector<Found> found_;
};

} // namespace dirtyring::service
