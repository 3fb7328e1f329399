// The operations of a shard, in their order; but an unmap whose range is pinned waits aside, and the others go on (P1
// to P3 of iommu/layout.h).
#pragma once

#include "iommu/pins.hpp"
#include "service/engine/shard.hpp"

#include <algorithm>
#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

namespace dirtyring::service {

class OpQueue
{
  public:
    // visit_slots: pin slots looked at in one visit.
    OpQueue(dr_shard_control &control, unsigned visit_slots) : closing_(control), visit_slots_(visit_slots) {}

    // An owner before has died with ranges closed.
    void restore() { closing_.open_all(); }

    // ---- devices

    void add(const iommu::DmaThreads &threads) { devices_.push_back(threads); }

    // Where in the list it was: for other waits.
    std::size_t remove(const iommu::DmaThreads &threads)
    {
        const auto device = std::find_if(devices_.begin(), devices_.end(), [&](const iommu::DmaThreads &d) {
            return d.cells.data() == threads.cells.data();
        });
        const auto index = static_cast<std::size_t>(device - devices_.begin());
        for (Aside &a : aside_)
            a.pins.forget(index, threads);
        devices_.erase(device);
        return index;
    }

    [[nodiscard]] const std::vector<iommu::DmaThreads> &devices() const { return devices_; }

    // ---- operations

    void push(ShardOp &op) { queue_.push_back({&op, accepted_++}); }

    // How many have been pushed, and how many of them are not finished.
    [[nodiscard]] std::uint64_t accepted() const { return accepted_; }
    [[nodiscard]] std::size_t unfinished() const { return queue_.size() + aside_.size(); }

    // The operation in progress, else the one to begin. nullptr: there is none, or what there is waits for pins.
    [[nodiscard]] ShardOp *next()
    {
        if (in_progress_)
            return queue_.front().op;
        look_aside();
        while (!queue_.empty()) {
            Queued &front = queue_.front();
            if (!is_unmap(front) || front.closed || !any_pins())
                return front.op;
            if (closing_.room() <= kept_for_begin) // until one of those aside is finished
                return nullptr;
            set_aside();
        }
        return nullptr;
    }

    // What next() gave has begun. True: it had not before. The range of an unmap is closed in any case: a device may
    // attach, and one that leaves may be there again when the worker dies before its leave is recorded.
    bool begin()
    {
        if (std::exchange(in_progress_, true))
            return false;
        const bool open = broken(Rule::closes_for_devices_only) && !any_pins();
        if (is_unmap(queue_.front()) && !queue_.front().closed && !open)
            close(queue_.front());
        return true;
    }
    [[nodiscard]] bool in_progress() const { return in_progress_; }

    // What next() gave is over. Its number: the count of those pushed before it.
    std::uint64_t finish()
    {
        const Queued front = queue_.front();
        queue_.pop_front();
        in_progress_ = false;
        if (front.closed)
            closing_.open(front.op->start);
        return front.number;
    }

    [[nodiscard]] bool waits_for_pins() const { return !aside_.empty(); }
    // Some slots are still to be looked at: next() goes on with it.
    [[nodiscard]] bool sampling() const
    {
        return std::any_of(aside_.begin(), aside_.end(), [&](const Aside &a) { return !a.pins.sampled(devices_); });
    }

    // Takes all of them out.
    template <class Visit> void clear(Visit visit)
    {
        for (; !queue_.empty(); queue_.pop_front())
            visit(*queue_.front().op);
        for (; !aside_.empty(); aside_.pop_back())
            visit(*aside_.back().queued.op);
        in_progress_ = false;
    }

  private:
    // A range of an unmap that does not wait.
    static constexpr std::uint64_t kept_for_begin = 1;

    struct Queued {
        ShardOp *op;
        std::uint64_t number;
        bool closed = false; // its range may not be pinned any more
    };
    struct Aside {
        Queued queued;
        iommu::PinWait pins;
    };

    static bool is_unmap(const Queued &q) { return q.op->kind == ShardOp::Kind::unmap; }

    [[nodiscard]] bool any_pins() const
    {
        return std::any_of(devices_.begin(), devices_.end(),
                           [](const iommu::DmaThreads &d) { return !d.pins.empty(); });
    }

    void close(Queued &unmap)
    {
        closing_.close(unmap.op->start, unmap.op->end - 1);
        unmap.closed = true;
    }

    // Closes the range of the unmap in front and looks for pins that were taken before. It is in front again if there
    // are none.
    void set_aside()
    {
        close(queue_.front());
        const Queued front = queue_.front();
        queue_.pop_front();
        aside_.push_back({front, {front.op->start, front.op->end, false}});
        look_aside();
    }

    // Puts those whose pins are gone in front of the others.
    void look_aside()
    {
        unsigned budget = visit_slots_;
        std::erase_if(aside_, [&](Aside &a) {
            if (!a.pins.passed(devices_, budget) && !broken(Rule::unmap_ignores_pins))
                return false;
            queue_.push_front(a.queued);
            return true;
        });
    }

    iommu::Closing closing_;
    unsigned visit_slots_;
    std::vector<iommu::DmaThreads> devices_;
    std::deque<Queued> queue_;
    std::vector<Aside> aside_; // no more than ranges can be closed
    std::uint64_t accepted_ = 0;
    bool in_progress_ = false; // the one in front has begun
};

} // namespace dirtyring::service
