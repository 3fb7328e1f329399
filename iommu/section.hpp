// Sections and grace periods (edges S1, S3 of iommu/layout.h).
#pragma once

#include "iommu/layout.h"
#include "iommu/rules.hpp"

#include <atomic>
#include <cstdint>

namespace dirtyring::iommu {

// A device thread's cell, from its owner's side.
class Section
{
  public:
    explicit Section(dr_cell *cell) : cell_(cell), count_(cell->count) {}

    void enter()
    {
        std::atomic_ref count(cell_->count);
        if (broken(Rule::section_without_order))
            count.store(++count_, std::memory_order_release);
        else
            count.store(++count_, std::memory_order_seq_cst); // S3: before any generation is loaded
    }

    void leave()
    {
        std::atomic_ref count(cell_->count);
        if (broken(Rule::leave_relaxed))
            count.store(++count_, std::memory_order_relaxed);
        else
            count.store(++count_, std::memory_order_release); // S1: after the data
    }

    [[nodiscard]] bool inside() const { return (count_ & 1) != 0; }

  private:
    dr_cell *cell_;
    std::uint64_t count_; // only this thread writes the cell
};

// A cell that was inside a section when it was sampled, from the walker's side.
class SampledCell
{
  public:
    explicit SampledCell(dr_cell *cell)
        : cell_(cell), sample_(std::atomic_ref(cell->count).load(std::memory_order_seq_cst)) // S3: after the advance
    {
    }

    [[nodiscard]] bool passed() const
    {
        if ((sample_ & 1) == 0)
            return true;
        return std::atomic_ref(cell_->count).load(std::memory_order_acquire) != sample_; // S1
    }

    [[nodiscard]] const dr_cell *cell() const { return cell_; }

  private:
    dr_cell *cell_;
    std::uint64_t sample_;
};

// Makes every IOTLB entry of the region stale (S3). The generations of a region have one writer, its shard's owner; the
// RMW is for its order.
inline void advance(std::uint64_t &generation)
{
    std::atomic_ref word(generation);
    if (broken(Rule::advance_plain))
        word.store(word.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    else
        word.fetch_add(1, std::memory_order_seq_cst);
}

} // namespace dirtyring::iommu
