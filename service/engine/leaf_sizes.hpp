// Which sizes the leaves of a shard have: what its hwpt asks for while dirt is reported, done in the background, and
// what its VMM asks for.
#pragma once

#include "iommu/invalidation.hpp"
#include "iommu/resize.hpp"
#include "ring/control.h"
#include "service/engine/shard.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace dirtyring::service {

template <iommu::Format F> class LeafSizes
{
  public:
    LeafSizes(iommu::Slice<F> &slice, iommu::Invalidation &invalidation, const LeafPolicy &policy,
              dr_shard_control &control)
        : slice_(slice), invalidation_(invalidation), policy_(policy), resizer_(slice, policy.how, control)
    {
    }

    // The owner before may have died in between; the slice is restored.
    void restore(bool reporting)
    {
        resizer_.restore();
        if (reporting)
            begin_reporting();
        else if (slice_.kept().collapsing() && !broken(Rule::collapse_forgotten))
            end_reporting();
    }

    // Dirt is reported from here on, or no more.
    void begin_reporting()
    {
        if (!broken(Rule::collapse_goes_on))
            end_background(); // a collapse would widen what is reported
        if (policy_.split != DR_SPLIT_EAGER)
            return;
        slice_.limit_leaves(iommu::granule_lg2);
        background_ = {slice_.start(), slice_.end(), iommu::granule_lg2};
    }
    void end_reporting()
    {
        end_background();
        large_.clear();
        slice_.limit_leaves(slice_.leaf_lg2_max());
        if (!policy_.collapse)
            return;
        background_ = {slice_.start(), slice_.end(), slice_.leaf_lg2_max()};
        collapses_ = true;
        slice_.kept().set_collapsing(true);
    }

    // A leaf was reported.
    void reported(const iommu::Leaf &leaf)
    {
        if (policy_.split == DR_SPLIT_LAZY && leaf.lg2 > iommu::granule_lg2 && large_.size() < large_max)
            large_.push_back({leaf.iova, leaf.end(), iommu::granule_lg2});
    }

    [[nodiscard]] bool owes_work() const { return background_ || !large_.empty(); }

    // Some of what it owes; then invalidate, if it touched something. No memory for tables: leaves stay as they are.
    void work(unsigned budget)
    {
        if (!background_) {
            background_ = large_.back();
            large_.pop_back();
        }
        if (step(*background_, collapses_, budget) != 0 || background_->over)
            end_background();
    }

    // A step of a split, or a collapse. 0 or -ENOMEM.
    int step(iommu::Resize &r, bool collapse, unsigned budget)
    {
        const auto touch = [this](std::uint64_t iova, std::uint64_t length) {
            invalidation_.touch(iova, length);
            touched_ = true;
        };
        return collapse ? resizer_.collapse(r, budget, touch) : resizer_.split(r, budget, touch);
    }

    // Something is to be advanced; forgets it.
    [[nodiscard]] bool touched() { return std::exchange(touched_, false); }

    // The grace period has passed.
    void settle() { resizer_.settle(); }

  private:
    void end_background()
    {
        background_.reset();
        if (std::exchange(collapses_, false))
            slice_.kept().set_collapsing(false);
    }

    static constexpr std::size_t large_max = 4096; // dirty leaves that wait to be split; more of them come again

    iommu::Slice<F> &slice_;
    iommu::Invalidation &invalidation_;
    LeafPolicy policy_;
    iommu::Resizer<F> resizer_;
    std::optional<iommu::Resize> background_;
    bool collapses_ = false;           // what background_ does
    std::vector<iommu::Resize> large_; // to be split
    bool touched_ = false;
};

} // namespace dirtyring::service
