// The walker's wait for device threads that may still use what was just made stale.
#pragma once

#include "iommu/section.hpp"

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

namespace dirtyring::iommu {

// The cells of an hwpt's devices, as one owner knows them.
class CellList
{
  public:
    void add(std::span<dr_cell> cells)
    {
        for (dr_cell &c : cells)
            cells_.push_back(&c);
    }

    void remove(std::span<const dr_cell> cells)
    {
        std::erase_if(cells_, [&](const dr_cell *c) { return c >= cells.data() && c < cells.data() + cells.size(); });
    }

    [[nodiscard]] const std::vector<dr_cell *> &cells() const { return cells_; }

  private:
    std::vector<dr_cell *> cells_;
};

// One at a time: begin after the advance, then ask passed() until it is true.
class GracePeriod
{
  public:
    void begin(const CellList &list)
    {
        waiting_.clear();
        running_ = true;
        for (dr_cell *c : list.cells()) {
            if (const SampledCell sample(c); !sample.passed())
                waiting_.push_back(sample);
        }
    }

    // True when every cell has been seen outside the section it was sampled in. Does not wait.
    [[nodiscard]] bool passed()
    {
        std::erase_if(waiting_, [](const SampledCell &c) { return c.passed(); });
        return waiting_.empty();
    }

    // After passed() was false: one that it waits for.
    [[nodiscard]] const dr_cell *waits_for() const { return waiting_.front().cell(); }

    void end() { running_ = false; }
    [[nodiscard]] bool running() const { return running_; }

    // The thread of a dead device has left its section for good.
    void forget(std::span<const dr_cell> cells)
    {
        std::erase_if(waiting_, [&](const SampledCell &c) {
            return c.cell() >= cells.data() && c.cell() < cells.data() + cells.size();
        });
    }

  private:
    std::vector<SampledCell> waiting_;
    bool running_ = false;
};

} // namespace dirtyring::iommu
