// A shard's way to its consumer: dirty leaves become runs in the ring; what is staged is published when its grace period is over.
#pragma once

#include "iommu/extent_map.hpp"
#include "iommu/fault.hpp"
#include "ring/producer.hpp"
#include "service/run_writer.hpp"
#include "service/shard.hpp"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
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

    // A new visit: what was found before has been staged.
    void begin() { runs_.emplace(ring_, slots_for_runs()); }

    // A leaf. not_mapped: a device has scribbled there; nothing is mapped, so nothing is reported.
    [[nodiscard]] Added add(std::uint64_t iova, std::uint64_t length)
    {
        if (!find(iova))
            return Added::not_mapped;
        if (!runs_->add(oa_space_ ? last_.oa + (iova - last_.start) : iova, length))
            return Added::no_room;
        counters_.pages += length >> DR_PAGE_LG2;
        return Added::yes;
    }

    // Pages next to each other; fewer than asked for if a map ends or begins among them.
    [[nodiscard]] Added add_pages(std::uint64_t iova, unsigned &pages)
    {
        if (!find(iova)) {
            pages = 1;
            return Added::not_mapped;
        }
        pages = static_cast<unsigned>(std::min<std::uint64_t>(pages, (last_.end - iova) >> DR_PAGE_LG2));
        return add(iova, std::uint64_t{pages} << DR_PAGE_LG2);
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
        if (ring_.publish() && !fault(Fault::arm_without_look))
            call();
        return true;
    }

    void call()
    {
        ++counters_.calls;
        call_();
    }

  private:
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
