// What the runs of IOVA rings mean. An IOVA may have been unmapped and mapped again before its run is read; a run
// before the epoch marker of an unmap means the map that the unmap ended. So a map that has gone is retained until the
// ring of its slice has passed that very marker (unmaps of other IOVAs may overtake it), and a run names the oldest
// retained map of its IOVA.
//
//   ring of a slice    … run of X … marker 5 … run of X … marker 9 … run of X …
//   X means                 A                     B                     C (live)
//
// Call map() before the map is submitted and unmapped() before anything is mapped there again.
#pragma once

#include "iommu/extent_map.hpp"
#include "ring/layout.h"

#include <algorithm>
#include <cstdint>
#include <deque>
#include <vector>

namespace dirtyring {

class RetainedMap
{
  public:
    // Slice s is [s << slice_lg2, (s + 1) << slice_lg2).
    RetainedMap(std::uint32_t slices, std::uint32_t slice_lg2) : slices_(slices), slice_lg2_(slice_lg2) {}

    // What is mapped there already stays as it is.
    void map(std::uint64_t start, std::uint64_t length, std::uint64_t oa)
    {
        const std::uint64_t end = start + length;
        for_slices(start, end, [&](Slice &slice, std::uint64_t from, std::uint64_t to) {
            while (from < to) {
                const auto next = slice.live.first_in(from, to);
                const std::uint64_t gap_end = next ? std::max(next->start, from) : to;
                if (gap_end > from)
                    slice.live.insert({from, gap_end, oa + (from - start), rights});
                from = next ? next->end : to;
            }
        });
    }

    // The unmap's marker has `epoch`, 0: it put none. A length beyond the space ends with the space.
    void unmapped(std::uint64_t start, std::uint64_t length, std::uint64_t epoch)
    {
        const std::uint64_t space = static_cast<std::uint64_t>(slices_.size()) << slice_lg2_;
        const std::uint64_t end = start + std::min(length, space - std::min(start, space));
        for_slices(start, end, [&](Slice &slice, std::uint64_t from, std::uint64_t to) {
            const bool read = epoch == 0 || std::erase(slice.read, epoch) > 0;
            for (auto e = slice.live.first_in(from, to); e; e = slice.live.first_in(from, to)) {
                const std::uint64_t cut_start = std::max(e->start, from);
                const std::uint64_t cut_end = std::min(e->end, to);
                if (!read)
                    slice.gone.push_back({cut_start, cut_end, e->oa + (cut_start - e->start), epoch});
                slice.live.erase(cut_start, cut_end);
            }
        });
    }

    // The ring of the slice has passed the marker of `epoch`, perhaps before the unmap was heard to be complete. It may
    // come again after a restart of the service.
    void passed(std::uint32_t shard, std::uint64_t epoch)
    {
        Slice &slice = slices_.at(shard);
        if (std::erase_if(slice.gone, [&](const Gone &g) { return g.epoch == epoch; }) == 0 &&
            std::ranges::find(slice.read, epoch) == slice.read.end())
            slice.read.push_back(epoch);
    }

    // Visits (oa, length) of each piece of a run, in order. False: some of it is not mapped, as may be with a run that
    // came again after a restart of the service; the rest has been visited.
    template <class Visit>
    [[nodiscard]] bool translate(std::uint32_t shard, std::uint64_t start, std::uint64_t length, Visit visit) const
    {
        const Slice &slice = slices_.at(shard);
        const std::uint64_t run_end = start + length;
        bool whole = true;
        while (start < run_end) {
            std::uint64_t end = run_end;
            if (const auto oldest = slice.oldest(start, end))
                visit(*oldest, end - start);
            else
                whole = false;
            start = end;
        }
        return whole;
    }

    // Visits (oa, length) of all that runs of this slice may mean.
    template <class Visit> void for_each(std::uint32_t shard, Visit visit) const
    {
        const Slice &slice = slices_.at(shard);
        for (const Gone &g : slice.gone)
            visit(g.oa, g.end - g.start);
        slice.live.for_each([&](const iommu::Extent &e) { visit(e.oa, e.end - e.start); });
    }

    // Maps that wait for their marker.
    [[nodiscard]] std::size_t retained() const
    {
        std::size_t count = 0;
        for (const Slice &slice : slices_)
            count += slice.gone.size();
        return count;
    }

  private:
    struct Gone {
        std::uint64_t start;
        std::uint64_t end;
        std::uint64_t oa;
        std::uint64_t epoch;
    };

    struct Slice {
        iommu::ExtentMap live;
        std::deque<Gone> gone;           // oldest first
        std::vector<std::uint64_t> read; // epochs whose markers came before their unmap was heard to be complete

        // The OA of `at` in the oldest map; `end` shrinks to where that map, or this map's being the oldest, ends.
        // Null: none; `end` shrinks to where the next one begins.
        [[nodiscard]] std::optional<std::uint64_t> oldest(std::uint64_t at, std::uint64_t &end) const
        {
            for (const Gone &g : gone) {
                if (g.start <= at && at < g.end) {
                    end = std::min(end, g.end);
                    return g.oa + (at - g.start);
                }
                if (at < g.start)
                    end = std::min(end, g.start);
            }
            const auto e = live.first_in(at, end);
            if (!e || e->start > at) {
                end = e ? e->start : end;
                return std::nullopt;
            }
            end = std::min(end, e->end);
            return e->oa + (at - e->start);
        }
    };

    static constexpr iommu::Rights rights{true, true}; // irrelevant here

    template <class Visit> void for_slices(std::uint64_t start, std::uint64_t end, Visit visit)
    {
        while (start < end) {
            const std::uint64_t slice = start >> slice_lg2_;
            const std::uint64_t to = std::min(end, (slice + 1) << slice_lg2_);
            visit(slices_.at(slice), start, to);
            start = to;
        }
    }

    std::vector<Slice> slices_;
    std::uint32_t slice_lg2_;
};

} // namespace dirtyring
