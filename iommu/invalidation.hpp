// Advance, then wait: how an owner makes what devices have cached stale and knows that nobody uses it any more (S1,
// S3).
#pragma once

#include "iommu/grace.hpp"
#include "iommu/layout.h"
#include "iommu/rules.hpp"
#include "iommu/section.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace dirtyring::iommu {

class Invalidation
{
  public:
    // Generations of the whole hwpt, of which the owner advances those of its slice.
    explicit Invalidation(std::uint64_t *generations) : generations_(generations) {}

    // IOTLB entries of [iova, iova + length) are to become stale.
    void touch(std::uint64_t iova, std::uint64_t length)
    {
        for (std::uint64_t region = iova >> DR_REGION_LG2; region <= (iova + length - 1) >> DR_REGION_LG2; ++region) {
            if (touched_.empty() || touched_.back() != region)
                touched_.push_back(region);
        }
    }

    // Advances what was touched, then begins to wait for those who entered before. `before_advance` is for faults.
    template <class BeforeAdvance> void begin(BeforeAdvance before_advance)
    {
        if (broken(Rule::sample_before_advance))
            grace_.begin(cells_);
        point(Point::walker_before_advance);
        before_advance();
        for (const std::uint64_t region : touched_)
            advance(generations_[region]);
        touched_.clear();
        if (touched_.capacity() > regions_kept)
            touched_.shrink_to_fit(); // enabling touches everything; a sweep never does
        if (!broken(Rule::sample_before_advance))
            grace_.begin(cells_);
    }

    // Only waits for those who are inside now.
    void begin_grace() { grace_.begin(cells_); }

    [[nodiscard]] bool running() const { return grace_.running(); }
    [[nodiscard]] bool passed() { return broken(Rule::no_grace) || grace_.passed(); }
    [[nodiscard]] const dr_cell *waits_for() const { return grace_.waits_for(); }
    void end() { grace_.end(); }

    void add_cells(std::span<dr_cell> cells) { cells_.add(cells); }
    // Its threads are outside for good.
    void remove_cells(std::span<dr_cell> cells)
    {
        cells_.remove(cells);
        grace_.forget(cells);
    }

  private:
    static constexpr std::size_t regions_kept = 4096; // of memory for the list

    std::uint64_t *generations_;
    std::vector<std::uint64_t> touched_;
    CellList cells_;
    GracePeriod grace_;
};

} // namespace dirtyring::iommu
