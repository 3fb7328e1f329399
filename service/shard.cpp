#include "service/shard.hpp"

#include "iommu/format_amdv1.hpp"
#include "iommu/invalidation.hpp"
#include "iommu/slice.hpp"
#include "ring/control.h"
#include "service/owed_pins.hpp"
#include "service/pass.hpp"
#include "service/publisher.hpp"

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <optional>
#include <utility>
#include <vector>

namespace dirtyring::service {

namespace {

using iommu::Extent;
using iommu::Leaf;
using iommu::Line;

// A visit ends after this many lines and tables, or leaves: some 50 µs.
constexpr unsigned visit_lines = 2048;
constexpr unsigned visit_leaves = 4096;
// Leaves of an unmap that are staged together.
constexpr unsigned unmap_chunk = 64;
// Pin slots looked at in one visit.
constexpr unsigned visit_slots = 4096;
// How soon to look again at what nobody will wake us for: a device inside a section, deferred runs.
constexpr std::uint64_t recheck_ns = 200'000;
// A stream of map changes lets a sweep through this often.
constexpr std::uint64_t sweep_at_least_every_ns = 100'000;
// A map change in an IOVA ring needs a slot for its marker and leaves these for sync and end.
constexpr std::uint64_t markers_kept = 2;

template <iommu::Format F> class ShardOf final : public Shard
{
  public:
    explicit ShardOf(ShardConfig config)
        : slice_(config.geometry, config.index, config.tables, config.leaf_lg2_max, std::move(config.make_present)),
          invalidation_(config.generations), control_(config.control), closing_(*config.control),
          min_interval_ns_(config.min_interval_ns)
    {
        if (config.producer != nullptr)
            ring_.emplace(config.producer, config.consumer, slice_.extents(), std::move(config.call));
    }

    bool step(std::uint64_t now_ns) override
    {
        now_ = now_ns;
        if (invalidation_.running())
            return settle();
        if (cancelled_)
            return false;
        const bool worked = visit();
        if (invalidation_.running())
            settle();
        return worked;
    }

    void submit(ShardOp &op) override
    {
        op.reached = op.start;
        if (cancelled_)
            complete(op, -ECANCELED);
        else if (op.kind == ShardOp::Kind::sync)
            syncs_.push_back(
                {&op, accepted_, ops_.size() + aside_.size(), SyncPhase::lead, {slice_.start(), slice_.end(), true}});
        else
            ops_.push_back({&op, accepted_++});
    }

    void cancel() override
    {
        cancelled_ = true;
        after_ = {};
        if (finishing_ != nullptr)
            complete(*std::exchange(finishing_, nullptr), -ECANCELED);
        for (; !ops_.empty(); ops_.pop_front())
            complete(*ops_.front().op, -ECANCELED);
        for (; !aside_.empty(); aside_.pop_back())
            complete(*aside_.back().queued.op, -ECANCELED);
        for (; !syncs_.empty(); syncs_.pop_front())
            complete(*syncs_.front().op, -ECANCELED);
        if (ring_ && ring_->room() > 0) { // nobody does DMA through it any more, so nothing staged has to wait
            ring_->put_marker(DR_MARKER_END, 0);
            publish();
        }
        invalidation_.end();
    }

    Rest prepare_sleep(std::uint64_t now_ns) override
    {
        now_ = now_ns;
        Rest rest;
        if (cancelled_)
            return rest;
        if (invalidation_.running()) {
            rest.until_ns = now_ + recheck_ns;
            return rest;
        }
        if (!ops_.empty() && !front_is_blocked()) {
            rest.busy = true;
            return rest;
        }
        if (waits_for_pins()) {
            fall_asleep(DR_ASLEEP_PINS);                               // P3
            rest.busy = !fault(Fault::no_second_look) && pins_moved(); // P3: look again
            if (rest.busy)
                return rest;
        }
        if (!ring_)
            return rest;
        if (ring_->unpublished())
            rest.until_ns = now_ + recheck_ns;
        if (waits_for_consumer()) {
            if (!fault(Fault::no_want_kick))
                ring_->want_kick(true); // R5
            asked_for_kick_ = true;
            point(Point::walker_before_sleep);
            rest.busy = !fault(Fault::no_second_look) && !waits_for_consumer(); // R5: look again
            return rest;
        }
        if (sync_can_go() || pass_.running()) {
            rest.busy = true;
            return rest;
        }
        if (!tracking_)
            return rest;
        if (!pace_allows()) {
            rest.until_ns = std::min(rest.until_ns, pass_began_ + min_interval_ns_);
            return rest;
        }
        fall_asleep(waits_for_pins() ? DR_ASLEEP_PINS : DR_ASLEEP);          // S5
        rest.busy = !fault(Fault::no_second_look) && slice_.any_table_bit(); // S5: look again
        return rest;
    }

    void wake() override
    {
        if (std::exchange(asleep_, false))
            std::atomic_ref(control_->asleep).store(DR_AWAKE, std::memory_order_seq_cst);
        if (std::exchange(asked_for_kick_, false))
            ring_->want_kick(false);
    }

    void add(const iommu::DmaThreads &threads) override
    {
        invalidation_.add_cells(threads.cells);
        devices_.push_back(threads);
        // It can pin as soon as it is attached, and the unmap has not closed its range.
        if (in_progress_ && ops_.front().op->kind == ShardOp::Kind::unmap && !ops_.front().closed)
            close(ops_.front());
    }

    void remove(const iommu::DmaThreads &threads) override
    {
        invalidation_.remove_cells(threads.cells);
        const auto device = std::find_if(devices_.begin(), devices_.end(), [&](const iommu::DmaThreads &d) {
            return d.cells.data() == threads.cells.data();
        });
        const auto index = static_cast<std::size_t>(device - devices_.begin());
        for (Aside &a : aside_)
            a.pins.forget(index, threads);
        for (Sync &s : syncs_)
            s.pins.forget(index, threads);
        devices_.erase(device);
    }

    void bury(const iommu::DmaThreads &threads) override
    {
        remove(threads);
        if (!tracking_)
            return;
        if (!fault(Fault::death_ignores_pins))
            owed_.add(threads, slice_.start(), slice_.end());
        if (!fault(Fault::no_full_scan_on_death))
            pass_.begin(true);
    }

    ShardCounters counters() const override { return ring_ ? ring_->counters() : ShardCounters{}; }

  private:
    struct Queued {
        ShardOp *op;
        std::uint64_t number;
        bool closed = false; // its range may not be pinned any more
    };
    // An unmap that waits for pins.
    struct Aside {
        Queued queued;
        iommu::PinWait pins;
    };
    enum class SyncPhase { lead, pins, pass, marker };
    struct Sync {
        ShardOp *op;
        std::uint64_t number; // of the next operation: it covers those before
        std::size_t before;   // of those, how many are not finished
        SyncPhase phase;
        iommu::PinWait pins;
    };
    struct Taken {
        Line line;
        unsigned mask;
    };
    struct Found {
        Leaf leaf;
        std::uint64_t seen;
    };
    // What the end of the running grace period brings.
    struct After {
        bool publish = false;
        std::optional<SyncPhase> phase{}; // of the sync in front
    };

    bool visit()
    {
        bool worked = false;
        if (!in_progress_) {
            worked = look_aside();
            if (!owed_.empty()) {
                if (owed_.mark(slice_, visit_leaves))
                    pass_.begin(true);
                return true;
            }
        }
        const bool sync = sync_can_go();
        const bool sweep_owed = tracking_ && now_ >= swept_ + sweep_at_least_every_ns;
        // Others come between two operations, not between two visits of one: an unmap counts on the slot for its marker, a map
        // on its own advance before the tables it took out are used again.
        const bool others = std::exchange(others_turn_, false) && (sync || sweep_owed);
        const bool op = !ops_.empty() && !front_is_blocked();
        if (op && !others)
            return run(ops_.front());
        if (sync)
            return run_sync(syncs_.front()) || op;
        if (tracking_ && !pass_.running() && !pace_allows())
            return op || worked;
        return (tracking_ && sweep()) || publish() /* what deferred unmaps have left */ || op || worked;
    }

    // ---- grace ---------------------------------------------------------------------------------------------------

    void invalidate(After after)
    {
        after_ = after;
        invalidation_.begin([this] {
            if (fault(Fault::publish_before_advance))
                publish();
        });
    }

    bool settle()
    {
        if (!invalidation_.passed())
            return false;
        invalidation_.end();
        slice_.reuse_retired();
        const After after = std::exchange(after_, {});
        if (after.publish)
            publish();
        if (after.phase)
            enter_phase(*after.phase);
        if (finishing_ != nullptr)
            complete(*std::exchange(finishing_, nullptr), finishing_result_);
        return true;
    }

    void touch_retired()
    {
        slice_.for_each_retired([&](std::uint64_t iova, std::uint64_t length) { invalidation_.touch(iova, length); });
    }

    void touch_mapped()
    {
        slice_.extents().for_each([&](const Extent &e) { invalidation_.touch(e.start, e.end - e.start); });
    }

    // ---- pins ----------------------------------------------------------------------------------------------------

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

    // Closes the range of the unmap in front, and sets it aside until the pins that were taken before are gone.
    void set_aside()
    {
        close(ops_.front());
        const Queued front = ops_.front();
        ops_.pop_front();
        aside_.push_back({front, {front.op->start, front.op->end, false}});
        look_aside();
    }

    // Puts those whose pins are gone in front of the others. True: there is more to be done at once.
    bool look_aside()
    {
        unsigned budget = visit_slots;
        bool worked = false;
        for (auto a = aside_.begin(); a != aside_.end();) {
            if (a->pins.passed(devices_, budget) || fault(Fault::unmap_ignores_pins)) {
                ops_.push_front(a->queued);
                a = aside_.erase(a);
                worked = true;
            } else {
                worked |= !a->pins.sampled(devices_);
                ++a;
            }
        }
        return worked;
    }

    // There are no more ranges to close: it waits until one of those aside is finished.
    [[nodiscard]] bool front_is_blocked() const
    {
        const Queued &front = ops_.front();
        return front.op->kind == ShardOp::Kind::unmap && !front.closed && closing_.full();
    }

    [[nodiscard]] bool waits_for_pins() const
    {
        return !aside_.empty() || (!syncs_.empty() && syncs_.front().phase == SyncPhase::pins);
    }

    // Is there one that need not wait any longer, or has not seen all slots yet?
    [[nodiscard]] bool pins_moved()
    {
        return look_aside() || (!syncs_.empty() && syncs_.front().phase == SyncPhase::pins && sync_can_go());
    }

    void fall_asleep(enum dr_asleep how)
    {
        std::atomic_ref(control_->asleep).store(how, std::memory_order_seq_cst);
        asleep_ = true;
        point(Point::walker_before_sleep);
    }

    // Everything staged has had its grace period.
    bool publish() { return ring_ && ring_->publish(); }

    void extents_changed()
    {
        if (ring_)
            ring_->extents_changed();
    }

    // ---- sweep ---------------------------------------------------------------------------------------------------

    // A slice in which something was dirty rests for min_interval, or until its consumer has taken it.
    [[nodiscard]] bool pace_allows()
    {
        if (!pass_found_)
            return true;
        return min_interval_ns_ > 0 ? now_ >= pass_began_ + min_interval_ns_ : ring_->released();
    }

    [[nodiscard]] bool waits_for_consumer()
    {
        if (!syncs_.empty() && syncs_.front().phase == SyncPhase::marker)
            return ring_->room() == 0;
        if (pass_.running())
            return ring_->slots_for_runs() == 0;
        return tracking_ && !sync_can_go() && min_interval_ns_ == 0 && !pace_allows();
    }

    // One batch of the running pass, or of a new one. False: nothing was found, or there is no room.
    bool sweep()
    {
        ring_->begin();
        swept_ = now_;
        if (!pass_.running()) {
            pass_.begin(false);
            pass_began_ = now_;
            pass_found_ = false;
        }
        taken_.clear();
        bool full = false;
        unsigned budget = visit_lines;
        while (!full) {
            const std::optional<Line> line = pass_.next(slice_, budget);
            if (!line)
                break;
            const std::uint64_t length = 1ull << line->leaf_lg2;
            unsigned mask = 0;
            for (unsigned dirty = slice_.dirty(*line); dirty != 0 && !full; dirty &= dirty - 1) {
                const auto i = static_cast<unsigned>(std::countr_zero(dirty));
                const std::uint64_t iova = line->iova + i * length;
                const Publisher::Added added = ring_->add(iova, length);
                full = added == Publisher::Added::no_room;
                if (added == Publisher::Added::yes) {
                    mask |= 1u << i;
                    invalidation_.touch(iova, length);
                }
            }
            if (mask != 0)
                taken_.push_back({*line, mask});
            if (full)
                pass_.put_back(*line);
        }
        ring_->note_full(full, pass_.unfinished(), now_);
        if (taken_.empty())
            return (full && publish()) || budget == 0; // a consumer cannot make room of what it does not see
        pass_found_ = true;
        ring_->stage();
        for (const Taken &t : taken_)
            slice_.clean(t.line, t.mask);
        invalidate({.publish = true});
        return true;
    }

    // The operations before it are finished, and it waits for no pin.
    [[nodiscard]] bool sync_can_go()
    {
        if (syncs_.empty() || syncs_.front().before > 0)
            return false;
        iommu::PinWait &pins = syncs_.front().pins;
        unsigned budget = visit_slots;
        return syncs_.front().phase != SyncPhase::pins || fault(Fault::sync_ignores_pins) ||
               pins.passed(devices_, budget) || !pins.sampled(devices_);
    }

    void enter_phase(SyncPhase phase)
    {
        syncs_.front().phase = phase;
        if (phase == SyncPhase::pass)
            pass_.begin(false);
    }

    bool run_sync(Sync &sync)
    {
        switch (sync.phase) {
        case SyncPhase::lead:
            if (fault(Fault::no_leading_grace)) {
                enter_phase(SyncPhase::pass);
            } else {
                invalidation_.begin_grace();
                after_ = {.phase = SyncPhase::pins};
            }
            return true;
        case SyncPhase::pins:
            if (unsigned budget = visit_slots; !sync.pins.passed(devices_, budget) && !fault(Fault::sync_ignores_pins))
                return true; // there are slots still to be sampled
            if (sync.pins.met_any() && !fault(Fault::no_grace_after_pins)) {
                invalidation_.begin_grace();
                after_ = {.phase = SyncPhase::pass};
            } else {
                enter_phase(SyncPhase::pass);
            }
            return true;
        case SyncPhase::pass:
            if (tracking_ && pass_.running()) {
                const bool worked = sweep();
                if (worked || pass_.running())
                    return worked;
            }
            sync.phase = SyncPhase::marker;
            [[fallthrough]];
        case SyncPhase::marker:
            if (ring_->room() == 0)
                return publish();
            ring_->put_marker(DR_MARKER_SYNC, sync.op->cookie);
            publish();
            ShardOp &op = *sync.op;
            syncs_.pop_front();
            complete(op, 0);
            return true;
        }
        return false;
    }

    // ---- operations ----------------------------------------------------------------------------------------------

    bool run(Queued &front)
    {
        ShardOp &op = *front.op;
        if (op.kind == ShardOp::Kind::unmap && !front.closed && any_pins()) {
            set_aside();
            return true;
        }
        if (!std::exchange(in_progress_, true))
            took_out_ = false;
        switch (op.kind) {
        case ShardOp::Kind::map:
            run_map(op);
            break;
        case ShardOp::Kind::unmap:
            run_unmap(op);
            break;
        case ShardOp::Kind::enable:
            run_enable(op);
            break;
        case ShardOp::Kind::disable:
            run_disable(op);
            break;
        case ShardOp::Kind::sync:
            break;
        }
        return true;
    }

    static void complete(ShardOp &op, int result)
    {
        op.result = result;
        op.done();
    }

    // The operation in front is over as soon as the grace period has passed, or now if none runs.
    void finish(ShardOp &op, int result)
    {
        const Queued front = ops_.front();
        assert(front.op == &op);
        ops_.pop_front();
        if (front.closed)
            closing_.open(op.start);
        for (Sync &s : syncs_)
            s.before -= front.number < s.number ? 1 : 0;
        in_progress_ = false;
        others_turn_ = true;
        if (invalidation_.running()) {
            finishing_ = &op;
            finishing_result_ = result;
        } else {
            complete(op, result);
        }
    }

    void run_map(ShardOp &op)
    {
        if (op.reached == op.start) {
            const int error = slice_.reserve(op.start, op.end, op.oa);
            if (error == -EAGAIN)
                return;
            if (error != 0)
                return finish(op, error);
            slice_.record({op.start, op.end, op.oa, op.rights});
            extents_changed();
        }
        for (unsigned budget = visit_leaves; budget > 0 && op.reached < op.end; --budget)
            op.reached += slice_.map_leaf(op.reached, op.end, op.oa + (op.reached - op.start), op.rights);
        if (op.reached < op.end)
            return;
        if (slice_.has_retired()) {
            touch_retired();
            invalidate({});
        }
        finish(op, 0);
    }

    void run_unmap(ShardOp &op)
    {
        const bool report = ring_ && tracking_ && op.harvest != ShardOp::Harvest::discard;
        const bool mark = ring_ && !ring_->oa_space() && op.epoch != 0;
        if (fault(Fault::unmap_waits_for_room) && ring_ && ring_->slots_for_runs() == 0)
            return;
        if (mark && op.reached == op.start && ring_->room() <= markers_kept) {
            publish();
            return finish(op, -EAGAIN);
        }

        const std::uint64_t from = op.reached;
        if (report)
            ring_->begin();
        bool full = false;
        for (unsigned budget = visit_leaves; budget > 0 && op.reached < op.end && !full;) {
            budget -= std::min(budget, collect_leaves(op, report, full));
            if (report)
                ring_->stage();
            take_out_leaves(op, report, full);
        }
        slice_.forget(from, op.reached);
        extents_changed();
        slice_.reclaim(op.start, op.reached);
        touch_retired();
        const bool over = full || op.reached == op.end;
        if (over && mark && took_out_)
            ring_->put_marker(DR_MARKER_EPOCH, op.epoch);
        if (!fault(Fault::unmap_without_grace))
            invalidate({.publish = op.harvest == ShardOp::Harvest::now || full});
        if (over)
            finish(op, full ? -EAGAIN : 0);
    }

    // Adds a leaf, which is mapped, to the runs.
    [[nodiscard]] bool no_room(const Leaf &leaf)
    {
        return ring_->add(leaf.iova, leaf.length) == Publisher::Added::no_room;
    }

    // Reads the next leaves and adds the dirty ones to the runs. How many; at least one, so that the caller's budget ends.
    unsigned collect_leaves(ShardOp &op, bool report, bool &full)
    {
        found_.clear();
        std::uint64_t at = op.reached;
        while (found_.size() < unmap_chunk && at < op.end) {
            const auto e = slice_.extents().first_in(at, op.end);
            if (!e) {
                at = op.end;
                break;
            }
            const Leaf leaf = slice_.find(std::max(at, e->start));
            const std::uint64_t seen = std::atomic_ref(*leaf.entry).load(std::memory_order_seq_cst);
            if (report && F::dirty(seen) && no_room(leaf)) {
                full = true;
                break;
            }
            found_.push_back({leaf, seen});
            at = leaf.iova + leaf.length;
        }
        if (found_.empty() && !full)
            op.reached = at; // holes only
        return std::max(1u, static_cast<unsigned>(found_.size()));
    }

    // Takes out the leaves found: as they were seen, or, if they changed, after they are staged. Ends at the leaf that has no room.
    void take_out_leaves(ShardOp &op, bool report, bool &full)
    {
        for (const Found &f : found_) {
            std::atomic_ref entry(*f.leaf.entry);
            std::uint64_t now = f.seen;
            bool out = report && F::dirty(f.seen) ? (entry.exchange(0, std::memory_order_seq_cst), true)
                                                  : entry.compare_exchange_strong(now, 0, std::memory_order_seq_cst);
            if (!out && !F::dirty(now)) // a read set A
                out = entry.compare_exchange_strong(now, 0, std::memory_order_seq_cst);
            if (!out) {
                if (report && no_room(f.leaf)) {
                    full = true;
                    return;
                }
                if (report)
                    ring_->stage();
                entry.exchange(0, std::memory_order_seq_cst);
            }
            invalidation_.touch(f.leaf.iova, f.leaf.length);
            slice_.unmapped(f.leaf);
            took_out_ = true;
            op.reached = f.leaf.iova + f.leaf.length;
        }
    }

    // Clean, then arm, then make everybody walk again. While tracking is off nobody sets D, so what is cleaned stays clean; a
    // leaf left dirty would never be summarized again.
    void run_enable(ShardOp &op)
    {
        if (!cleaning_) {
            cleaning_ = true;
            pass_.begin(true);
        }
        unsigned budget = visit_lines;
        while (const std::optional<Line> line = pass_.next(slice_, budget))
            slice_.clean(*line, slice_.dirty(*line));
        if (pass_.running())
            return;
        cleaning_ = false;
        set_tracking(true);
        pass_found_ = false;
        swept_ = now_;
        if (fault(Fault::enable_without_advance))
            return finish(op, 0);
        touch_mapped();
        invalidate({});
        finish(op, 0);
    }

    void run_disable(ShardOp &op)
    {
        set_tracking(false);
        pass_.abandon();
        owed_.clear();
        touch_mapped();
        invalidate({.publish = true});
        finish(op, 0);
    }

    // Devices load it after the generation, which is advanced behind it.
    void set_tracking(bool on)
    {
        tracking_ = on;
        std::atomic_ref(control_->tracking).store(on ? 1 : 0, std::memory_order_seq_cst);
    }

    iommu::Slice<F> slice_;
    iommu::Invalidation invalidation_;
    After after_;
    std::optional<Publisher> ring_; // with dirty tracking only
    dr_shard_control *control_;
    iommu::Closing closing_;
    std::uint64_t min_interval_ns_;
    std::vector<iommu::DmaThreads> devices_;
    bool tracking_ = false;
    bool cancelled_ = false;

    Pass<F> pass_;
    bool pass_found_ = false;
    std::uint64_t pass_began_ = 0; // ns
    std::uint64_t swept_ = 0;      // ns
    std::vector<Taken> taken_;     // lines of the batch being made

    OwedPins<F> owed_;

    std::deque<Queued> ops_;
    std::vector<Aside> aside_; // no more than ranges can be closed
    std::deque<Sync> syncs_;
    std::uint64_t accepted_ = 0;
    bool in_progress_ = false; // the operation in front has begun
    bool took_out_ = false;    // and has taken out a leaf
    bool others_turn_ = false;
    bool cleaning_ = false;
    ShardOp *finishing_ = nullptr; // waits for the grace period
    int finishing_result_ = 0;
    std::vector<Found> found_;

    bool asleep_ = false;
    bool asked_for_kick_ = false;
    std::uint64_t now_ = 0; // ns
};

} // namespace

std::unique_ptr<Shard> make_shard(unsigned format, ShardConfig config)
{
    switch (format) {
    case DR_FORMAT_AMDV1:
        return std::make_unique<ShardOf<iommu::AmdV1>>(std::move(config));
    default:
        return nullptr;
    }
}

} // namespace dirtyring::service
