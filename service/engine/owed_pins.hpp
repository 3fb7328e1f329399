// What dead devices had pinned for writing: they may have written there and can say so no more, so it is dirty.
#pragma once

#include "iommu/pins.hpp"
#include "iommu/slice.hpp"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace dirtyring::service {

template <iommu::Format F> class OwedPins
{
  public:
    // The part of the device's pins that lies in the slice [start, end).
    void add(const iommu::DmaThreads &threads, std::uint64_t start, std::uint64_t end)
    {
        for (dr_pin &pin : threads.pins) {
            iommu::if_held(pin, [&](std::uint64_t, const iommu::PinRange &range) {
                if (range.write && range.start < end && range.last >= start && range.start <= range.last)
                    ranges_.push_back({std::max(range.start, start), std::min(range.last, end - 1) + 1});
            });
        }
        merge();
    }

    // Sets D of at most `budget` leaves. True: those were the last. No operation is in progress.
    bool mark(iommu::Slice<F> &slice, unsigned budget)
    {
        if (ranges_.empty())
            return false;
        for (; budget > 0 && !ranges_.empty(); --budget) {
            Range &range = ranges_.back();
            const auto extent = slice.first_known_in(range.start, range.end);
            if (!extent) {
                ranges_.pop_back();
                continue;
            }
            const iommu::Leaf leaf = slice.find(std::max(range.start, extent->start));
            slice.make_dirty(leaf);
            range.start = leaf.end();
            if (range.start >= range.end)
                ranges_.pop_back();
        }
        return ranges_.empty();
    }

    [[nodiscard]] bool empty() const { return ranges_.empty(); }
    void clear() { ranges_.clear(); }

  private:
    struct Range {
        std::uint64_t start;
        std::uint64_t end;
    };

    // So that slots which all claim everything are no more work than one.
    void merge()
    {
        std::sort(ranges_.begin(), ranges_.end(), [](const Range &a, const Range &b) { return a.start < b.start; });
        std::vector<Range> merged;
        for (const Range &r : ranges_) {
            if (!merged.empty() && r.start <= merged.back().end)
                merged.back().end = std::max(merged.back().end, r.end);
            else
                merged.push_back(r);
        }
        ranges_ = std::move(merged);
    }

    std::vector<Range> ranges_;
};

} // namespace dirtyring::service
