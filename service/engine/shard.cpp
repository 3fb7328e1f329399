#include "service/engine/shard.hpp"

#include "iommu/formats.hpp"
#include "iommu/invalidation.hpp"
#include "iommu/slice.hpp"
#include "service/engine/batch.hpp"
#include "service/engine/leaf_sizes.hpp"
#include "service/engine/leaf_taker.hpp"
#include "service/engine/op_queue.hpp"
#include "service/engine/owed_pins.hpp"
#include "service/engine/pass.hpp"
#include "service/engine/publisher.hpp"

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <optional>
#include <utility>
#include <vector>

namespace dirtyring::service {

namespace {

using iommu::Extent;

// How soon to look again at what nobody will wake us for: a device inside a section, deferred runs.
constexpr std::uint64_t recheck_ns = 200'000;
// A stream of map changes lets a sweep through this often.
constexpr std::uint64_t sweep_at_least_every_ns = 100'000;
// How often leaves are resized when nobody waits for it.
constexpr std::uint64_t resize_every_ns = 100'000;
// An unmap in an IOVA ring needs a slot for its marker and leaves these for sync and end.
constexpr std::uint64_t kept_by_unmap = 2;
// A sync's marker leaves this one there: should the service die, an unmap that has taken leaves out can put its marker
// even so. Only such an unmap and the end of the ring take the last slot.
constexpr std::uint64_t kept_by_sync = 1;

template <iommu::Format F> class ShardOf final : public Shard
{
  public:
    explicit ShardOf(ShardConfig config)
        : slice_(config.geometry, config.index, config.tables,
                 {config.leaves.leaf_lg2_max, config.leaves.all_sizes, config.producer != nullptr},
                 std::move(config.backing), std::move(config.record)),
          invalidation_(config.generations), taker_(slice_, invalidation_),
          sizes_(slice_, invalidation_, config.leaves, *config.control), control_(config.control),
          noted_(1ull << config.index), always_on_(config.producer != nullptr && (F::always_on || config.always_on)),
          min_interval_ns_(config.min_interval_ns), stall_ns_(config.stall_ns), stalled_(std::move(config.stalled)),
          visit_(config.visit), batch_(slice_, invalidation_, sizes_, visit_.lines + iommu::lines_at_once),
          ops_(*config.control, visit_.slots)
    {
        if (config.producer != nullptr)
            ring_.emplace(config.producer, config.consumer, slice_.extents(), std::move(config.call));
        if (config.restored)
            restore();
        else
            tell_devices();
    }

    bool step(std::uint64_t now_ns) override
    {
        now_ = now_ns;
        static_cast<void>(stirred_.take());
        if (invalidation_.running())
            return settle();
        if (cancelled_)
            return false;
        if (restored_)
            return begin_again();
        const bool worked = visit();
        if (invalidation_.running())
            settle();
        return worked;
    }

    void submit(ShardOp &op) override
    {
        stirred_.set();
        op.reached = op.start;
        if (cancelled_)
            complete(op, -ECANCELED);
        else if (op.kind == ShardOp::Kind::sync && op.again && (*op.note & noted_) != 0 &&
                 !broken(Rule::sync_marks_again))
            syncs_.push_back({&op, 0, 0, SyncPhase::marked, {slice_.start(), slice_.end(), true}});
        else if (op.kind == ShardOp::Kind::sync)
            syncs_.push_back(
                {&op, ops_.accepted(), ops_.unfinished(), SyncPhase::pins, {slice_.start(), slice_.end(), true}});
        else
            ops_.push(op);
    }

    void cancel() override
    {
        stirred_.set();
        cancelled_ = true;
        after_ = {};
        forget_owed();
        if (finishing_ != nullptr)
            complete(*std::exchange(finishing_, nullptr), -ECANCELED);
        ops_.clear([](ShardOp &op) { complete(op, -ECANCELED); });
        for (; !syncs_.empty(); syncs_.pop_front())
            complete(*syncs_.front().op, -ECANCELED);
        if (ring_ && ring_->room() > 0) { // nobody does DMA through it any more, so nothing staged has to wait
            ring_->put_marker(DR_MARKER_END, 0);
            publish();
            point(Point::ring_ended);
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
        rest.busy = restored_ || !owed_.empty() || op_can_go() || sizes_.owes_work();
        if (!rest.busy && waits_for_pins()) {
            fall_asleep(DR_ASLEEP_PINS);                                                 // P3
            rest.busy = !broken(Rule::no_second_look) && (op_can_go() || sync_can_go()); // P3: look again
        }
        if (rest.busy)
            return rest;
        if (!ring_)
            return rest;
        if (ring_->unpublished())
            rest.until_ns = now_ + recheck_ns;
        if (waits_for_consumer()) {
            if (!broken(Rule::no_want_kick))
                ring_->want_kick(true); // R5
            asked_for_kick_ = true;
            point(Point::walker_before_sleep);
            rest.busy = !broken(Rule::no_second_look) && !waits_for_consumer(); // R5: look again
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
        rest.busy = !broken(Rule::no_second_look) && slice_.any_table_bit(); // S5: look again
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
        stirred_.set();
        invalidation_.add_cells(threads.cells);
        ops_.add(threads);
    }

    void remove(const iommu::DmaThreads &threads) override
    {
        stirred_.set();
        invalidation_.remove_cells(threads.cells);
        const std::size_t index = ops_.remove(threads);
        for (Sync &s : syncs_)
            s.pins.forget(index, threads);
    }

    void bury(const iommu::DmaThreads &threads, std::function<void()> reported) override
    {
        remove(threads);
        if (tracking_ && !broken(Rule::death_ignores_pins))
            owed_.add(threads, slice_.start(), slice_.end());
        const bool cleaning = cleaning_ && !broken(Rule::cleaned_for_good);
        if ((tracking_ || cleaning) && !broken(Rule::no_full_scan_on_death))
            pass_.begin(true); // D without its summary: reported, or cleaned before any is
        reported_.push_back(std::move(reported));
        if (owed_.empty())
            forget_owed();
    }

    void made_large(std::uint64_t offset) override { slice_.tables().made_large(offset); }

    ShardCounters counters() const override { return ring_ ? ring_->counters() : ShardCounters{}; }

  private:
    // marked: a restart does it again, but its marker is there. Its VMM may have read it, and read no more until this
    // is done.
    enum class SyncPhase { pins, pass, marker, marked };
    struct Sync {
        ShardOp *op;
        std::uint64_t number; // of the next operation: it covers those before
        std::size_t before;   // of those, how many are not finished
        SyncPhase phase;
        iommu::PinWait pins;
    };
    // What the end of the running grace period brings.
    struct After {
        bool publish = false;
        bool call = false;                // the consumer, whatever it asked for
        std::optional<SyncPhase> phase{}; // of the sync in front
    };

    bool visit()
    {
        if (resize_in_background())
            return true;
        if (!ops_.in_progress() && !owed_.empty()) {
            if (owed_.mark(slice_, visit_.leaves)) {
                point(Point::death_marked);
                pass_.begin(true);
                forget_owed();
            }
            return true;
        }
        const bool sync = sync_can_go();
        const bool sweep_owed = tracking_ && now_ >= swept_ + sweep_at_least_every_ns;
        // Others come between two operations, not between two visits of one: an unmap counts on the slot for its
        // marker, a map on its own advance before the tables it took out are used again.
        const bool others = std::exchange(others_turn_, false) && (sync || sweep_owed);
        const bool op = op_can_go();
        if (op && !others && ops_.next() != nullptr)
            return run(*ops_.next());
        if (sync)
            return run_sync(syncs_.front()) || op;
        if (tracking_ && !pass_.running() && !pace_allows())
            return op;
        return (tracking_ && sweep()) || publish() /* what deferred unmaps have left */ || op;
    }

    // What nobody waits for gets its turn, too.
    bool resize_in_background()
    {
        if (!sizes_.owes_work() || ops_.in_progress() || now_ < resized_ + resize_every_ns)
            return false;
        resized_ = now_;
        sizes_.work(visit_.lines);
        if (sizes_.touched())
            invalidate({});
        return true;
    }

    // There is one to go on with, or pin slots to look at.
    [[nodiscard]] bool op_can_go() { return ops_.next() != nullptr || ops_.sampling(); }

    [[nodiscard]] bool waits_for_pins() const
    {
        return ops_.waits_for_pins() || (!syncs_.empty() && syncs_.front().phase == SyncPhase::pins);
    }

    void fall_asleep(enum dr_asleep how)
    {
        std::atomic_ref(control_->asleep).store(how, std::memory_order_seq_cst);
        asleep_ = true;
        point(Point::walker_before_sleep);
    }

    // What dead devices had pinned is dirty now, or nobody asks for it any more.
    void forget_owed()
    {
        owed_.clear();
        for (const auto &reported : std::exchange(reported_, {}))
            reported();
    }

    // ---- restart -------------------------------------------------------------------------------------------------
    //
    // The owner before died between any two of its steps. It may have cleared D and not advanced, staged and not
    // published, taken bits out of the summary, taken leaves out of an unmap, slept. So: advance everything → grace →
    // publish what is staged → call; and a full scan, before any sync is answered. What it had begun of maps and unmaps
    // comes again as operations.

    void restore()
    {
        restored_ = true;
        tracking_ = slice_.kept().reported();
        tell_devices(); // the owner before may have died in between
        sizes_.restore(tracking_);
        std::atomic_ref(control_->asleep).store(DR_AWAKE, std::memory_order_seq_cst);
        if (broken(Rule::restart_opens_early))
            ops_.restore();
        if (ring_)
            ring_->want_kick(false);
        if (tracking_ && !broken(Rule::restart_without_scan))
            pass_.begin(true);
    }

    bool begin_again()
    {
        restored_ = false;
        if (!broken(Rule::restart_without_advance))
            touch_known();
        invalidate({.publish = true, .call = true});
        ops_.restore(); // not before: a device could pin by a translation that is taken out already
        point(Point::restart_advanced);
        return true;
    }

    // ---- grace ---------------------------------------------------------------------------------------------------

    void invalidate(After after)
    {
        after_ = after;
        waiting_since_ = now_;
        invalidation_.begin([this] {
            if (broken(Rule::publish_before_advance))
                publish();
        });
    }

    bool settle()
    {
        if (!invalidation_.passed()) {
            if (now_ - waiting_since_ >= stall_ns_ && !std::exchange(told_, true))
                stalled_(invalidation_.waits_for());
            return false;
        }
        invalidation_.end();
        if (std::exchange(told_, false))
            stalled_(nullptr);
        sizes_.settle();
        slice_.tables().reuse_retired();
        const After after = std::exchange(after_, {});
        if (after.publish) {
            point(Point::sweep_before_publish);
            publish();
            point(Point::sweep_published);
        }
        if (after.call && ring_ && !broken(Rule::restart_without_call)) {
            ring_->call();
            point(Point::restart_published);
        }
        if (after.phase)
            enter_phase(*after.phase);
        if (finishing_ != nullptr)
            complete(*std::exchange(finishing_, nullptr), finishing_result_);
        return true;
    }

    void touch_retired()
    {
        slice_.tables().for_each_retired(
            [&](std::uint64_t iova, std::uint64_t length) { invalidation_.touch(iova, length); });
    }

    void touch_known()
    {
        slice_.for_each_known([&](const Extent &e) { invalidation_.touch(e.start, e.end - e.start); });
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
            return !has_room_for_sync();
        if (pass_.running())
            return ring_->slots_for_runs() == 0;
        return tracking_ && !sync_can_go() && min_interval_ns_ == 0 && !pace_allows();
    }

    // One batch of the running pass, or of a new one. False: nothing was found, or there is no room.
    bool sweep()
    {
        ring_->begin();
        swept_ = now_;
        const bool dirtied = slice_.tables().dirtied();
        if (!pass_.running()) {
            pass_.begin(false);
            pass_began_ = now_;
            pass_found_ = false;
        } else if (dirtied && !broken(Rule::resized_behind_pass)) {
            pass_.begin(false); // a sync covers what was dirty before, wherever it is now
        }
        batch_.begin();
        bool full = false;
        unsigned budget = visit_.lines;
        while (!full) {
            const std::span<iommu::Lines> tables = pass_.next(slice_, budget);
            if (tables.empty())
                break;
            full = !batch_.collect(tables, pass_.lines_ahead(), *ring_);
        }
        ring_->note_full(full, pass_.unfinished(), now_);
        if (batch_.empty())
            return (full && publish()) || budget == 0; // a consumer cannot make room of what it does not see
        pass_found_ = true;
        if (!broken(Rule::clear_before_stage))
            ring_->stage();
        point(Point::sweep_staged);
        batch_.clean();
        point(Point::sweep_cleared);
        if (broken(Rule::clear_before_stage))
            ring_->stage();
        invalidate({.publish = true});
        point(Point::sweep_advanced);
        return true;
    }

    // The operations before it are finished, and it waits for no pin.
    [[nodiscard]] bool sync_can_go()
    {
        if (syncs_.empty() || syncs_.front().before > 0)
            return false;
        iommu::PinWait &pins = syncs_.front().pins;
        unsigned budget = visit_.slots;
        return syncs_.front().phase != SyncPhase::pins || broken(Rule::sync_ignores_pins) ||
               pins.passed(ops_.devices(), budget) || !pins.sampled(ops_.devices());
    }

    [[nodiscard]] bool has_room_for_sync()
    {
        const bool keeps = !ring_->oa_space() && !broken(Rule::sync_takes_last_slot);
        return ring_->room() > (keeps ? kept_by_sync : 0);
    }

    void enter_phase(SyncPhase phase)
    {
        syncs_.front().phase = phase;
        if (phase == SyncPhase::pass) {
            pass_.begin(false);
            pass_began_ = now_;
        }
    }

    bool run_sync(Sync &sync)
    {
        switch (sync.phase) {
        case SyncPhase::pins:
            if (unsigned budget = visit_.slots;
                !sync.pins.passed(ops_.devices(), budget) && !broken(Rule::sync_ignores_pins))
                return true; // there are slots still to be sampled
            // Behind the pins: they too may have found the D of a thread that has not come to the summary.
            if (broken(Rule::no_leading_grace) || (broken(Rule::no_grace_after_pins) && sync.pins.met_any())) {
                enter_phase(SyncPhase::pass);
            } else {
                invalidation_.begin_grace();
                waiting_since_ = now_;
                after_ = {.phase = SyncPhase::pass};
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
            if (!has_room_for_sync())
                return publish();
            ring_->put_marker(DR_MARKER_SYNC, sync.op->cookie);
            // Release, for the restart that reads it: the marker is staged. Others' bits are in it, so a fetch_or.
            std::atomic_ref(*sync.op->note).fetch_or(noted_, std::memory_order_release);
            point(Point::sync_marked);
            publish();
            [[fallthrough]];
        case SyncPhase::marked:
            ShardOp &op = *sync.op;
            syncs_.pop_front();
            complete(op, 0);
            return true;
        }
        return false;
    }

    // ---- operations ----------------------------------------------------------------------------------------------

    bool run(ShardOp &op)
    {
        if (ops_.begin())
            took_out_ = op.epoch != 0 && slice_.kept().unmarked() == op.epoch;
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
        case ShardOp::Kind::split:
        case ShardOp::Kind::collapse:
            run_resize(op);
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
        const std::uint64_t number = ops_.finish();
        for (Sync &s : syncs_)
            s.before -= number < s.number ? 1 : 0;
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
            if (op.again && slice_.extents().maps_to(op.start, op.end, op.oa, op.rights))
                return finish(op, 0);
            const int error = slice_.reserve(op.start, op.end, op.oa);
            if (error == -EAGAIN)
                return;
            if (error != 0) {
                if (op.again && !broken(Rule::failed_map_not_scanned))
                    scan_begun(op);
                return finish(op, error);
            }
            slice_.record({op.start, op.end, op.oa, op.rights}, op.continues);
            extents_changed();
        }
        const Extent map = *slice_.extents().first_in(op.reached, op.end);
        for (unsigned budget = visit_.leaves; budget > 0 && op.reached < op.end; --budget)
            op.reached += slice_.map_leaf(map, op.reached);
        if (op.reached < op.end)
            return;
        slice_.recorded(op.start);
        if (op.again && tracking_ && !broken(Rule::resumed_map_not_scanned))
            pass_.begin(true); // leaves that were there may be dirty, and no sweep took them for mapped until now
        if (slice_.tables().has_retired()) {
            touch_retired();
            invalidate({});
        }
        finish(op, 0);
    }

    // A map that a restart does again fails: until it is rolled back it is mapped as far as it had come, and syncs
    // report it. The roll-back is not recorded yet: another restart does the map again.
    void scan_begun(const ShardOp &op)
    {
        slice_.give_up_begun(op.start, op.end, broken(Rule::failed_map_is_whole));
        extents_changed();
        if (tracking_)
            pass_.begin(true);
    }

    // Does it put markers? An ENABLE may overtake an unmap that waits for pins, or come between two of its parts.
    bool is_marked(ShardOp &op)
    {
        if (op.epoch == 0)
            return false;
        if ((*op.note & UnmapNote::decided) == 0) // release: a restart that finds anything taken out finds this
            std::atomic_ref(*op.note).store(UnmapNote::decided | (tracking_ ? UnmapNote::marked : 0),
                                            std::memory_order_release);
        return (*op.note & UnmapNote::marked) != 0;
    }

    void run_unmap(ShardOp &op)
    {
        const bool mark = is_marked(op);
        if (op.again && !broken(Rule::begun_stays))
            slice_.give_up_begun(op.start, op.end, true); // it is rolled back
        slice_.part(op.start);
        if (op.epoch != 0 && !mark && tracking_ && !broken(Rule::unmap_passes_enable))
            return end_before_reporting(op);
        // Before a restart it may have come to its end for want of room: then its marker may be there, and nothing more
        // that it takes out may come behind.
        const std::uint64_t noted = mark && op.again ? *op.note & UnmapNote::cut_mask : 0;
        const bool cut = op.start < noted && noted < op.end;
        const std::uint64_t end = cut ? noted : op.end;
        const int result = cut ? -EAGAIN : 0;
        if (op.again && !slice_.extents().first_in(op.reached, end)) {
            op.reached = end;
            if (took_out_)
                slice_.kept().set_unmarked(0);
            return finish(op, result); // what was taken out is forgotten after the marker
        }
        const bool report = ring_ && tracking_ && op.harvest != ShardOp::Harvest::discard;
        if (broken(Rule::unmap_waits_for_room) && ring_ && ring_->slots_for_runs() == 0)
            return;
        if (mark && !took_out_) {
            // Before a restart another may have taken leaves out: the slot that is kept is for its marker.
            const std::uint64_t due = slice_.kept().unmarked();
            const bool yields = due != 0 && due != op.epoch && !broken(Rule::due_marker_forgotten);
            if (yields || ring_->room() <= kept_by_unmap) {
                publish();
                return finish(op, -EAGAIN);
            }
            slice_.kept().set_unmarked(op.epoch);
        }

        const std::uint64_t from = op.reached;
        const auto taken = taker_.take(op.reached, end, report ? &*ring_ : nullptr, visit_.leaves);
        point(Point::unmap_taken_out);
        took_out_ |= taken.any;
        if (!taken.full && !slice_.extents().first_in(op.reached, end))
            op.reached = end;
        const bool over = taken.full || op.reached == end;
        slice_.reclaim(op.start, op.reached);
        touch_retired();
        if (taken.full && mark && op.reached > op.start && !broken(Rule::cut_not_noted))
            std::atomic_ref(*op.note).store(UnmapNote::decided | UnmapNote::marked | op.reached,
                                            std::memory_order_release); // for the restart, before the marker
        // Without room it is there already: a worker before has put it into the slot that is kept, and died.
        if (over && mark && took_out_ && op.reached > op.start && ring_->room() > 0) {
            ring_->put_marker(DR_MARKER_EPOCH, op.epoch);
            point(Point::unmap_marked);
        }
        if (!broken(Rule::unmap_without_grace))
            invalidate({.publish = op.harvest == ShardOp::Harvest::now || taken.full});
        point(Point::unmap_advanced);
        slice_.forget(from, op.reached);
        extents_changed();
        if (!over)
            return;
        if (mark)
            slice_.kept().set_unmarked(0);
        finish(op, taken.full ? -EAGAIN : result);
    }

    // What it has taken out so far was not reported and has no marker; what it would take out now is. Another unmap
    // does that. Before a restart it may have come some way in this slice; all that has been advanced since.
    void end_before_reporting(ShardOp &op)
    {
        const std::uint64_t from = op.reached;
        const bool over =
            broken(Rule::taken_out_stays_mapped) || taker_.skip_taken_out(op.reached, op.end, visit_.leaves);
        slice_.forget(from, op.reached);
        extents_changed();
        if (over)
            finish(op, op.reached < op.end ? -EAGAIN : 0);
    }

    void run_resize(ShardOp &op)
    {
        if (!resize_)
            resize_ = {op.start, op.end, op.leaf_lg2};
        const int error = sizes_.step(*resize_, op.kind == ShardOp::Kind::collapse, visit_.lines);
        const bool over = error != 0 || resize_->over;
        if (over)
            resize_.reset();
        if (sizes_.touched())
            invalidate({});
        if (over)
            finish(op, error);
    }

    // Clean, then arm, then make everybody walk again. Where devices are not armed, what is cleaned stays clean; a leaf
    // left dirty would never be summarized again. Where they are always armed, they mark on: a leaf that was marked and
    // cleaned is written without D by those who have it cached, until they walk again, which is before the reply and so
    // before the VMM copies everything; one that was marked after it was cleaned has its summary and is reported.
    void run_enable(ShardOp &op)
    {
        if (tracking_) // a restart: it was armed, so what is dirty now is to be reported
            return arm(op);
        if (!cleaning_) {
            cleaning_ = true;
            pass_.begin(true);
        }
        unsigned budget = visit_.lines;
        for (auto tables = pass_.next(slice_, budget); !tables.empty(); tables = pass_.next(slice_, budget))
            batch_.clean(tables);
        point(Point::enable_cleaning);
        if (pass_.running())
            return;
        cleaning_ = false;
        point(Point::enable_cleaned);
        pass_found_ = false;
        swept_ = now_;
        arm(op);
    }

    void arm(ShardOp &op)
    {
        set_tracking(true);
        sizes_.begin_reporting();
        point(Point::enable_armed);
        if (broken(Rule::enable_without_advance))
            return finish(op, 0);
        touch_known();
        invalidate({});
        finish(op, 0);
    }

    // What was taken from the summary is forgotten: the next enable cleans every leaf.
    void run_disable(ShardOp &op)
    {
        set_tracking(false);
        sizes_.end_reporting();
        pass_.abandon();
        forget_owed();
        touch_known();
        invalidate({.publish = true});
        finish(op, 0);
    }

    void set_tracking(bool on)
    {
        tracking_ = on;
        slice_.kept().set_reported(on);
        tell_devices();
    }

    // Devices load it after the generation, which is advanced behind it.
    void tell_devices()
    {
        std::atomic_ref(control_->context).store(F::context(always_on_ || tracking_), std::memory_order_seq_cst); // S7
    }

    iommu::Slice<F> slice_;
    iommu::Invalidation invalidation_;
    LeafTaker<F> taker_;
    LeafSizes<F> sizes_;
    After after_;
    std::optional<Publisher> ring_; // with dirty tracking only
    dr_shard_control *control_;
    std::uint64_t noted_; // our bit in ShardOp::note of a sync
    bool always_on_;      // devices set D whether it is reported or not
    std::uint64_t min_interval_ns_;
    std::uint64_t stall_ns_;
    std::function<void(const dr_cell *)> stalled_;
    Visit visit_;
    bool told_ = false;               // that a grace period stalls
    std::uint64_t waiting_since_ = 0; // ns, the grace period
    bool restored_ = false;           // and has not begun again
    bool tracking_ = false;           // dirt is reported
    bool cancelled_ = false;

    Pass<F> pass_;
    bool pass_found_ = false;
    std::uint64_t pass_began_ = 0; // ns
    std::uint64_t swept_ = 0;      // ns
    Batch<F> batch_;

    OwedPins<F> owed_;
    std::vector<std::function<void()>> reported_; // to be told when nothing is owed

    OpQueue ops_;
    std::deque<Sync> syncs_;
    bool took_out_ = false; // the unmap in progress has taken out a leaf
    bool others_turn_ = false;
    bool cleaning_ = false;
    std::optional<iommu::Resize> resize_; // in progress
    ShardOp *finishing_ = nullptr;        // waits for the grace period
    int finishing_result_ = 0;

    std::uint64_t resized_ = 0; // ns
    bool asleep_ = false;
    bool asked_for_kick_ = false;
    std::uint64_t now_ = 0; // ns
};

} // namespace

std::unique_ptr<Shard> make_shard(unsigned format, ShardConfig config)
{
    return iommu::with_format(format, [&](auto f) -> std::unique_ptr<Shard> {
        return std::make_unique<ShardOf<decltype(f)>>(std::move(config));
    });
}

} // namespace dirtyring::service
