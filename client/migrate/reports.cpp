#include "client/migrate/reports.hpp"

#include "client/migrate/clock.hpp"
#include "client/migrate/failure.hpp"

#include <algorithm>
#include <mutex>

namespace dirtyring::migrate {
namespace {

// Statistics have one writer, this thread.
void add(std::atomic<std::uint64_t> &statistic, std::uint64_t n)
{
    statistic.store(statistic.load(std::memory_order_relaxed) + n, std::memory_order_relaxed);
}

} // namespace

void Reports::drain(RingSet &set)
{
    // Acquire: what the dead worker had published is seen in this drain, so whatever comes after it is its successor's.
    const std::uint64_t killed = shared_.control.killed_ns.load(std::memory_order_acquire);
    while (const auto batch = set.peek()) {
        // Drawn after the peek: whatever these runs are about was stamped before. See Journal::report.
        const std::uint64_t tick = next_tick(shared_.control);
        if (meanings_ != nullptr) {
            const std::lock_guard lock(meanings_->mutex);
            take(*batch, tick);
        } else {
            take(*batch, tick);
        }
        set.release(*batch); // queued is safe enough: the queue dies with the migration
    }
    if (killed > seen_killed_)
        awaited_ = seen_killed_ = killed;
}

void Reports::all()
{
    pages(0, shared_.options.memory, next_tick(shared_.control));
}

void Reports::take(const dirtyring_batch &batch, std::uint64_t tick)
{
    Control &control = shared_.control;
    std::uint64_t runs = 0;
    for (std::uint32_t i = 0; i < batch.count; ++i) {
        if (dr_is_marker(batch.entries[i])) {
            marker(batch.shard, batch.entries[i], tick);
        } else {
            run(batch.shard, batch.entries[i], tick);
            ++runs;
        }
    }
    if (runs != 0 && shared_.options.kill_service_ms != 0)
        note_life();
    add(control.runs_published, runs);
    if (phase(control) == Phase::running)
        add(control.runs_while_writing, runs);
}

void Reports::run(std::uint32_t shard, std::uint64_t entry, std::uint64_t tick)
{
    const std::uint64_t address = dr_run_address(entry);
    const std::uint64_t length = dr_run_length(entry);
    if (meanings_ == nullptr) {
        pages(address, length, tick);
        return;
    }
    std::uint64_t mapped = 0;
    const bool whole = meanings_->map.translate(shard, address, length, [&](std::uint64_t oa, std::uint64_t piece) {
        pages(oa, piece, tick);
        mapped += piece;
    });
    if (whole)
        return;
    // A run that its worker had no time to note as published comes again, perhaps behind the marker of an unmap. It was
    // reported when it came first; were it lost, the judges would find it.
    if (shared_.options.kill_service_ms == 0)
        throw Failure(
            fmt::format("the service reported {} bytes at iova {:#x}, where nothing was mapped", length, address));
    add(shared_.control.pages_gone, (length - mapped) / page_size);
}

// For the killer.
void Reports::note_life()
{
    Control &control = shared_.control;
    const std::uint64_t now = now_ns();
    control.reported_ns.store(now, std::memory_order_relaxed);
    if (awaited_ == 0)
        return;
    control.longest_gap_ns.store(std::max(control.longest_gap_ns.load(std::memory_order_relaxed), now - awaited_),
                                 std::memory_order_relaxed);
    control.back_ns.store(now, std::memory_order_relaxed);
    awaited_ = 0;
}

void Reports::marker(std::uint32_t shard, std::uint64_t entry, std::uint64_t tick)
{
    switch (dr_marker_kind(entry)) {
    case DR_MARKER_EPOCH:
        if (meanings_ != nullptr)
            meanings_->map.passed(shard, dr_marker_payload(entry));
        break;
    case DR_MARKER_ALL_DIRTY:
        if (meanings_ != nullptr)
            meanings_->map.for_each(shard, [&](std::uint64_t oa, std::uint64_t length) { pages(oa, length, tick); });
        else
            pages(0, shared_.options.memory, tick);
        break;
    case DR_MARKER_END:
        throw Failure("the service ended a ring");
    default: // sync markers are the set's
        break;
    }
}

void Reports::pages(std::uint64_t oa, std::uint64_t length, std::uint64_t tick)
{
    const std::uint64_t memory = shared_.options.memory;
    if (oa > memory || length > memory - oa)
        throw Failure(fmt::format("the service reported {} bytes at {:#x}, outside the guest's memory", length, oa));
    std::uint64_t over = 0;
    for (std::uint64_t page = oa / page_size; page < (oa + length) / page_size; ++page) {
        over += !shared_.journal.report(page, tick);
        queue_.push(page);
    }
    add(shared_.control.pages_reported, length / page_size);
    add(shared_.control.over_reported, over);
}

} // namespace dirtyring::migrate
