// A shard's way to its consumer: dirty leaves become runs in the ring; what is staged is published when its grace
// period is over.
#pragma once

#include "iommu/extent_map.hpp"
#include "iommu/line_scan.hpp"
#include "iommu/rules.hpp"
#include "ring/producer.hpp"
#include "service/engine/run_writer.hpp"
#include "service/engine/shard.hpp"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <utility>

namespace dirtyring::service {

class Publisher
{
  public:
    enum class Added { yes, no_room, not_mapped };

    Publisher(dr_ring_producer *producer, dr_ring_consumer *consumer, const iommu::ExtentMap &extents,
              std::function<void()> call)
        : ring_(producer, consumer), oa_space_(producer->header.space == DR_SPACE_OA), extents_(extents),
          call_(std::move(call))
    {
    }

    [[nodiscard]] bool oa_space() const { return oa_space_; }
    [[nodiscard]] const ShardCounters &counters() const { return counters_; }

    // ---- room ----

    [[nodiscard]] std::uint64_t room() { return ring_.room(); }
    [[nodiscard]] std::uint64_t slots_for_runs()
    {
        const std::uint64_t room = ring_.room();
        return room > DR_MARKER_SLOTS ? room - DR_MARKER_SLOTS : 0;
    }
    [[nodiscard]] bool released() { return ring_.released(); }
    void want_kick(bool wanted) { ring_.want_kick(wanted); }

    // For the consumer's eyes: how much was found and left, and since when.
    void note_full(bool full, std::uint64_t pending, std::uint64_t now_ns)
    {
        if (full == (full_since_ != 0))
            return;
        full_since_ = full ? now_ns : 0;
        ring_.report_pending(pending, full_since_);
    }

    // ---- runs ----

    // A new visit: what was found before has been staged. Runs go behind what is staged now, so no marker comes between
    // this and stage().
    void begin() { runs_.emplace(ring_, slots_for_runs()); }

    // A leaf. not_mapped: a device has scribbled there; nothing is mapped, so nothing is reported.
    [[nodiscard]] Added add(std::uint64_t iova, std::uint64_t length)
    {
        if (!find(iova))
            return Added::not_mapped;
        if (!runs_->add(reported(iova), length))
            return Added::no_room;
        counters_.pages += length >> DR_PAGE_LG2;
        return Added::yes;
    }

    struct AddedPages {
        bool any;
        std::size_t lines; // up to the first that there was no room for
        unsigned left;     // of that line: for these entries
    };

    // The pages of these entries, one after the other, as far as there is room; takes out of the masks what is not
    // mapped.
    AddedPages add_pages(std::span<iommu::LineEntries> lines, iommu::LinesAhead &ahead)
    {
        AddedPages added{false, 0, 0};
        std::uint64_t pages = 0;
        while (added.lines < lines.size() && added.left == 0) {
            const auto many = runs_->add_lines(lines.subspan(added.lines), last_window(), ahead);
            added.lines += many.lines;
            pages += many.pages;
            if (added.lines < lines.size()) {
                added.left = add_pages(lines[added.lines], pages);
                added.lines += added.left == 0 ? 1 : 0;
            }
        }
        added.any = pages != 0;
        counters_.pages += pages;
        return added;
    }

    void stage() { counters_.runs += runs_->stage(); }

    void put_marker(enum dr_marker kind, std::uint64_t payload)
    {
        ring_.put(0, dr_marker(kind, payload));
        ring_.stage(1);
    }

    void extents_changed() { last_ = {}; }

    // ---- publishing ----

    [[nodiscard]] bool unpublished() const { return ring_.staged() != ring_.head(); }

    // Everything staged has had its grace period. True: there was something.
    bool publish()
    {
        if (!unpublished())
            return false;
        if (ring_.publish() && !broken(Rule::arm_without_look))
            call();
        return true;
    }

    void call()
    {
        ++counters_.calls;
        call_();
    }

  private:
    // The address of a page in last_.
    [[nodiscard]] std::uint64_t reported(std::uint64_t iova) const
    {
        return oa_space_ ? last_.oa + (iova - last_.start) : iova;
    }

    [[nodiscard]] RunWriter::Window last_window() const
    {
        return {last_.start, last_.end - last_.start, oa_space_ ? last_.oa - last_.start : 0};
    }

    // The same of one line, which may lie in several extents or none. For which of its entries there was no room.
    unsigned add_pages(iommu::LineEntries &line, std::uint64_t &pages)
    {
        for (unsigned rest = line.mask; rest != 0;) {
            const auto first = static_cast<unsigned>(std::countr_zero(rest));
            const std::uint64_t iova = line.iova + (std::uint64_t{first} << DR_PAGE_LG2);
            if (!find(iova)) {
                rest &= rest - 1;
                line.mask &= ~(1u << first);
                continue;
            }
            const auto n = std::min<std::uint64_t>(static_cast<unsigned>(std::countr_one(rest >> first)),
                                                   (last_.end - iova) >> DR_PAGE_LG2);
            if (!runs_->add(reported(iova), n << DR_PAGE_LG2))
                return rest;
            pages += n;
            rest &= ~(((1u << n) - 1) << first);
        }
        return 0;
    }

    // Makes last_ the extent in which iova lies. False: there is none.
    [[nodiscard]] bool find(std::uint64_t iova)
    {
        if (iova - last_.start < last_.end - last_.start)
            return true;
        const auto extent = extents_.first_in(iova, iova + 1);
        if (extent)
            last_ = *extent;
        return extent.has_value();
    }

    ring::Producer<std::uint64_t> ring_;
    bool oa_space_;
    const iommu::ExtentMap &extents_;
    std::function<void()> call_;
    std::optional<RunWriter> runs_; // since begin
    iommu::Extent last_{};          // where the leaf before was
    std::uint64_t full_since_ = 0;
    ShardCounters counters_;
};

} // namespace dirtyring::service
