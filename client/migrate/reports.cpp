#include "client/migrate/reports.hpp"

#include "client/migrate/failure.hpp"

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
    if (!meanings_->map.translate(shard, address, length,
                                  [&](std::uint64_t oa, std::uint64_t piece) { pages(oa, piece, tick); }))
        throw Failure(
            fmt::format("the service reported {} bytes at iova {:#x}, where nothing was mapped", length, address));
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
