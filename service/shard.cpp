#include "service/shard.hpp"

#include "iommu/format_amdv1.hpp"
#include "ring/control.h"
#include "service/pass.hpp"

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

// A visit ends after this many lines or leaves: some 50 µs.
constexpr unsigned visit_lines = 2048;
constexpr unsigned visit_leaves = 4096;
// Leaves of an unmap that are staged together.
constexpr unsigned unmap_chunk = 64;
// How soon to look again at what nobody will wake us for: a device inside a section, deferred runs.
constexpr std::uint64_t recheck_ns = 200'000;
// A map change in an IOVA ring needs a slot for its marker and leaves these for sync and end.
constexpr std::uint64_t markers_kept = 2;

template <iommu::Format F> class ShardOf final : public Shard
{
  public:
    explicit ShardOf(ShardConfig config)
        : config_(std::move(config)), slice_(config_.geometry, config_.index, config_.tables, config_.generations,
                                             config_.leaf_lg2_max, config_.make_present)
    {
        if (config_.producer != nullptr) {
            ring_.emplace(config_.producer, config_.consumer);
            oa_space_ = config_.producer->header.space == DR_SPACE_OA;
        }
    }

    bool step(std::uint64_t now_ns) override
    {
        now_ = now_ns;
        if (grace_.running())
            return settle();
        if (cancelled_)
            return false;
        const bool worked = visit();
        if (grace_.running())
            settle();
        return worked;
    }

    void submit(ShardOp &op) override
    {
        op.reached = op.start;
        if (cancelled_)
            complete(op, -ECANCELED);
        else if (op.kind == ShardOp::Kind::sync)
            syncs_.push_back({&op, accepted_, SyncPhase::lead});
        else {
            ops_.push_back(&op);
            ++accepted_;
        }
    }

    void cancel() override
    {
        cancelled_ = true;
        after_ = {};
        if (finishing_ != nullptr)
            complete(*std::exchange(finishing_, nullptr), -ECANCELED);
        for (; !ops_.empty(); ops_.pop_front())
            complete(*ops_.front(), -ECANCELED);
        for (; !syncs_.empty(); syncs_.pop_front())
            complete(*syncs_.front().op, -ECANCELED);
        if (ring_ && ring_->room() > 0) { // nobody does DMA through it any more, so nothing staged has to wait
            put_marker(DR_MARKER_END, 0);
            publish();
        }
        grace_.end();
    }

    Rest prepare_sleep(std::uint64_t now_ns) override
    {
        now_ = now_ns;
        Rest rest;
        if (cancelled_)
            return rest;
        if (grace_.running()) {
            rest.until_ns = now_ + recheck_ns;
            return rest;
        }
        if (!ops_.empty()) {
            rest.busy = true;
            return rest;
        }
        if (!ring_)
            return rest;
        if (ring_->staged() != ring_->head())
            rest.until_ns = now_ + recheck_ns;
        if (waits_for_consumer()) {
            if (!fault(Fault::no_want_kick))
                ring_->want_kick(true); // R5
            asked_for_kick_ = true;
            point(Point::walker_before_sleep);
            rest.busy = !fault(Fault::no_second_look) && !waits_for_consumer(); // R5: look again
            return rest;
        }
        if (!syncs_.empty() || pass_.running()) {
            rest.busy = true;
            return rest;
        }
        if (!tracking_)
            return rest;
        if (!pace_allows()) {
            rest.until_ns = std::min(rest.until_ns, pass_began_ + config_.min_interval_ns);
            return rest;
        }
        std::atomic_ref(config_.control->asleep).store(1, std::memory_order_seq_cst); // S5
        asleep_ = true;
        point(Point::walker_before_sleep);
        rest.busy = !fault(Fault::no_second_look) && slice_.any_table_bit(); // S5: look again
        return rest;
    }

    void wake() override
    {
        if (std::exchange(asleep_, false))
            std::atomic_ref(config_.control->asleep).store(0, std::memory_order_seq_cst);
        if (std::exchange(asked_for_kick_, false))
            ring_->want_kick(false);
    }

    void add_cells(std::span<dr_cell> cells) override { cells_.add(cells); }

    void remove_cells(std::span<dr_cell> cells) override
    {
        cells_.remove(cells);
        grace_.forget(cells);
    }

    void bury_cells(std::span<dr_cell> cells) override
    {
        remove_cells(cells);
        if (tracking_ && !fault(Fault::no_full_scan_on_death))
            pass_.begin(true);
    }

    const ShardCounters &counters() const override { return counters_; }

  private:
    enum class SyncPhase { lead, pass, marker };
    struct Sync {
        ShardOp *op;
        std::uint64_t after; // operations that come before it
        SyncPhase phase;
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
        bool pass = false; // of the sync in front
    };

    bool visit()
    {
        const bool sync = !syncs_.empty() && syncs_.front().after <= finished_;
        if (!ops_.empty() && !(sync && syncs_turn_))
            return run(*ops_.front());
        syncs_turn_ = false;
        if (sync)
            return run_sync(syncs_.front()) || !ops_.empty();
        if (tracking_ && !pass_.running() && !pace_allows())
            return false;
        return (tracking_ && sweep()) || publish(); // what deferred unmaps have left
    }

    // ---- grace ---------------------------------------------------------------------------------------------------

    // Advances the regions in touched_ and begins to wait for those who entered before.
    void invalidate(After after)
    {
        after_ = after;
        ++counters_.batches;
        if (fault(Fault::sample_before_advance))
            grace_.begin(cells_);
        point(Point::walker_before_advance);
        if (fault(Fault::publish_before_advance))
            publish();
        for (const std::uint64_t region : touched_)
            iommu::advance(config_.generations[region]);
        touched_.clear();
        if (!fault(Fault::sample_before_advance))
            grace_.begin(cells_);
    }

    bool settle()
    {
        if (!fault(Fault::no_grace) && !grace_.passed())
            return false;
        grace_.end();
        slice_.reuse_retired();
        const After after = std::exchange(after_, {});
        if (after.publish)
            publish();
        if (after.pass) {
            syncs_.front().phase = SyncPhase::pass;
            pass_.begin(false);
        }
        if (finishing_ != nullptr)
            complete(*std::exchange(finishing_, nullptr), finishing_result_);
        return true;
    }

    void touch(std::uint64_t iova, std::uint64_t length)
    {
        for (std::uint64_t region = iova >> DR_REGION_LG2; region <= (iova + length - 1) >> DR_REGION_LG2; ++region) {
            if (touched_.empty() || touched_.back() != region)
                touched_.push_back(region);
        }
    }

    void touch_retired()
    {
        slice_.for_each_retired([&](std::uint64_t iova, std::uint64_t length) { touch(iova, length); });
    }

    void touch_mapped()
    {
        slice_.extents().for_each([&](const Extent &e) { touch(e.start, e.end - e.start); });
    }

    // ---- ring ----------------------------------------------------------------------------------------------------

    [[nodiscard]] std::uint64_t slots_for_runs()
    {
        const std::uint64_t room = ring_->room();
        return room > DR_MARKER_SLOTS ? room - DR_MARKER_SLOTS : 0;
    }

    // Everything staged has had its grace period.
    bool publish()
    {
        if (!ring_ || ring_->staged() == ring_->head())
            return false;
        if (ring_->publish() && !fault(Fault::arm_without_look)) {
            ++counters_.calls;
            config_.call();
        }
        return true;
    }

    void put_marker(enum dr_marker kind, std::uint64_t payload)
    {
        ring_->put(0, dr_marker(kind, payload));
        ring_->stage(1);
    }

    void note_full(bool full)
    {
        if (full == (full_since_ != 0))
            return;
        full_since_ = full ? now_ : 0;
        ring_->report_pending(pass_.unfinished(), full_since_);
    }

    // What the ring names for a leaf; nothing: it is not mapped, a device has scribbled.
    [[nodiscard]] std::optional<std::uint64_t> address(std::uint64_t iova)
    {
        if (iova < last_extent_.start || iova >= last_extent_.end) {
            const auto e = slice_.extents().first_in(iova, iova + 1);
            if (!e)
                return std::nullopt;
            last_extent_ = *e;
        }
        return oa_space_ ? last_extent_.oa + (iova - last_extent_.start) : iova;
    }

    void extents_changed() { last_extent_ = {}; }

    [[nodiscard]] bool add(RunWriter &runs, std::uint64_t address, std::uint64_t length)
    {
        if (!runs.add(address, length))
            return false;
        counters_.pages += length >> DR_PAGE_LG2;
        return true;
    }

    void stage(RunWriter &runs) { counters_.runs += runs.stage(); }

    // ---- sweep ---------------------------------------------------------------------------------------------------

    // A slice in which something was dirty rests for min_interval, or until its consumer has taken it.
    [[nodiscard]] bool pace_allows()
    {
        if (!pass_found_)
            return true;
        return config_.min_interval_ns > 0 ? now_ >= pass_began_ + config_.min_interval_ns : ring_->released();
    }

    [[nodiscard]] bool waits_for_consumer()
    {
        if (!syncs_.empty() && syncs_.front().phase == SyncPhase::marker)
            return ring_->room() == 0;
        if (pass_.running())
            return slots_for_runs() == 0;
        return tracking_ && syncs_.empty() && config_.min_interval_ns == 0 && !pace_allows();
    }

    // One batch of the running pass, or of a new one. False: nothing was found, or there is no room.
    bool sweep()
    {
        RunWriter runs(*ring_, slots_for_runs());
        if (!pass_.running()) {
            pass_.begin(false);
            pass_began_ = now_;
            pass_found_ = false;
        }
        taken_.clear();
        bool full = false;
        unsigned budget = visit_lines;
        for (; budget > 0 && !full; --budget) {
            const std::optional<Line> line = pass_.next(slice_);
            if (!line)
                break;
            const std::uint64_t length = 1ull << line->leaf_lg2;
            unsigned mask = 0;
            for (unsigned dirty = slice_.dirty(*line); dirty != 0 && !full; dirty &= dirty - 1) {
                const auto i = static_cast<unsigned>(std::countr_zero(dirty));
                const std::uint64_t iova = line->iova + i * length;
                const auto named = address(iova);
                if (!named)
                    continue;
                full = !add(runs, *named, length);
                if (!full) {
                    mask |= 1u << i;
                    touch(iova, length);
                }
            }
            if (mask != 0)
                taken_.push_back({*line, mask});
            if (full)
                pass_.put_back(*line);
        }
        note_full(full);
        if (taken_.empty())
            return (full && publish()) || budget == 0; // a consumer cannot make room of what it does not see
        pass_found_ = true;
        stage(runs);
        for (const Taken &t : taken_)
            slice_.clean(t.line, t.mask);
        invalidate({.publish = true});
        return true;
    }

    bool run_sync(Sync &sync)
    {
        switch (sync.phase) {
        case SyncPhase::lead:
            if (fault(Fault::no_leading_grace)) {
                sync.phase = SyncPhase::pass;
                pass_.begin(false);
            } else {
                grace_.begin(cells_);
                after_ = {.pass = true};
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
            put_marker(DR_MARKER_SYNC, sync.op->cookie);
            publish();
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
        assert(ops_.front() == &op);
        ops_.pop_front();
        ++finished_;
        syncs_turn_ = true; // not before: an unmap in several visits counts on the slot for its marker
        if (grace_.running()) {
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
        const bool mark = ring_ && !oa_space_ && op.epoch != 0;
        if (fault(Fault::unmap_waits_for_room) && ring_ && slots_for_runs() == 0)
            return;
        if (mark && op.reached == op.start && ring_->room() <= markers_kept) {
            publish();
            return finish(op, -EAGAIN);
        }

        const std::uint64_t from = op.reached;
        std::optional<RunWriter> runs;
        if (report)
            runs.emplace(*ring_, slots_for_runs());
        bool full = false;
        for (unsigned budget = visit_leaves; budget > 0 && op.reached < op.end && !full;) {
            budget -= std::min(budget, collect_leaves(op, runs, full));
            if (runs)
                stage(*runs);
            take_out_leaves(op, runs, full);
        }
        slice_.forget(from, op.reached);
        extents_changed();
        slice_.reclaim(op.start, op.reached);
        touch_retired();
        const bool over = full || op.reached == op.end;
        if (over && mark)
            put_marker(DR_MARKER_EPOCH, op.epoch);
        if (!fault(Fault::unmap_without_grace))
            invalidate({.publish = op.harvest == ShardOp::Harvest::now || full});
        if (over)
            finish(op, full ? -EAGAIN : 0);
    }

    // Reads the next leaves and adds the dirty ones to runs. How many; at least one, so that the caller's budget ends.
    unsigned collect_leaves(ShardOp &op, std::optional<RunWriter> &runs, bool &full)
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
            if (runs && F::dirty(seen) && !add(*runs, *address(leaf.iova), leaf.length)) {
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
    void take_out_leaves(ShardOp &op, std::optional<RunWriter> &runs, bool &full)
    {
        for (const Found &f : found_) {
            std::atomic_ref entry(*f.leaf.entry);
            std::uint64_t now = f.seen;
            bool out = runs && F::dirty(f.seen) ? (entry.exchange(0, std::memory_order_seq_cst), true)
                                                : entry.compare_exchange_strong(now, 0, std::memory_order_seq_cst);
            if (!out && !F::dirty(now)) // a read set A
                out = entry.compare_exchange_strong(now, 0, std::memory_order_seq_cst);
            if (!out) {
                if (runs && !add(*runs, *address(f.leaf.iova), f.leaf.length)) {
                    full = true;
                    return;
                }
                if (runs)
                    stage(*runs);
                entry.exchange(0, std::memory_order_seq_cst);
            }
            touch(f.leaf.iova, f.leaf.length);
            slice_.unmapped(f.leaf);
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
        for (unsigned budget = visit_lines; budget > 0; --budget) {
            const std::optional<Line> line = pass_.next(slice_);
            if (!line) {
                cleaning_ = false;
                break;
            }
            slice_.clean(*line, slice_.dirty(*line));
        }
        if (cleaning_)
            return;
        set_tracking(true);
        pass_found_ = false;
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
        touch_mapped();
        invalidate({.publish = true});
        finish(op, 0);
    }

    // Devices load it after the generation, which is advanced behind it.
    void set_tracking(bool on)
    {
        tracking_ = on;
        std::atomic_ref(config_.control->tracking).store(on ? 1 : 0, std::memory_order_seq_cst);
    }

    ShardConfig config_;
    iommu::Slice<F> slice_;
    std::optional<ring::Producer<std::uint64_t>> ring_;
    bool oa_space_ = false;
    bool tracking_ = false;
    bool cancelled_ = false;

    iommu::CellList cells_;
    iommu::GracePeriod grace_;
    After after_;
    std::vector<std::uint64_t> touched_; // regions to advance

    Pass<F> pass_;
    bool pass_found_ = false;
    std::uint64_t pass_began_ = 0; // ns
    std::vector<Taken> taken_;     // lines of the batch being made
    Extent last_extent_{};

    std::deque<ShardOp *> ops_;
    std::deque<Sync> syncs_;
    std::uint64_t accepted_ = 0;
    std::uint64_t finished_ = 0;
    bool syncs_turn_ = false;
    bool cleaning_ = false;
    ShardOp *finishing_ = nullptr; // waits for the grace period
    int finishing_result_ = 0;
    std::vector<Found> found_;

    bool asleep_ = false;
    bool asked_for_kick_ = false;
    std::uint64_t full_since_ = 0; // ns
    std::uint64_t now_ = 0;        // ns
    ShardCounters counters_;
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
