// How a VMM changes its guest's maps and tracking. What a successor must know is stored before each command and after
// its completion.
#include "tests/chaos/children.hpp"
#include "tests/chaos/vmm.hpp"

#include <algorithm>
#include <future>
#include <span>
#include <thread>

namespace dirtyring::chaos {
namespace {

constexpr unsigned changes_max = 4;

} // namespace

void Vmm::change_maps()
{
    if (anywhere_ || deaf() || changes_ >= changes_max || now_ns() < next_change_)
        return;
    const auto block = static_cast<unsigned>(draw(blocks));
    if (state_.block[block].change.load() != BlockState::none)
        return;
    // Mapped most of the time.
    next_change_ = now_ns() + draw(3 * ms);
    if (state_.block[block].place.load() == 0)
        map(block, static_cast<unsigned>(draw(places)));
    else
        unmap(block, draw(10) == 0 ? BlockState::discarding : BlockState::unmapping);
    tell_changes();
}

void Vmm::map(unsigned block, unsigned place)
{
    state_.block[block].change = BlockState::mapping;
    change_[block] = {now_ns(), 0, 0, place};
    ++changes_;
    const std::uint64_t iova = layout_.iova(block);
    retained_.map(iova, layout_.block_size, layout_.oa(block, place));
    check(dirtyring_queue_map(vm_, state_.ioas, iova, layout_.block_size, layout_.oa(block, place),
                              DIRTYRING_READ | DIRTYRING_WRITE, block),
          "queue_map");
    check(dirtyring_submit(vm_), "submit");
}

void Vmm::unmap(unsigned block, BlockState::Change how)
{
    state_.block[block].change = how;
    const std::uint32_t harvest = how == BlockState::discarding ? DIRTYRING_HARVEST_DISCARD
                                  : draw(2) == 0                ? DIRTYRING_HARVEST_NOW
                                                                : DIRTYRING_HARVEST_DEFERRED;
    change_[block] = {now_ns(), 0, harvest, 0};
    ++changes_;
    queue_unmap(block, 0);
}

void Vmm::queue_unmap(unsigned block, std::uint64_t from)
{
    change_[block].from = from;
    check(dirtyring_queue_unmap(vm_, state_.ioas, layout_.iova(block) + from, layout_.block_size - from,
                                change_[block].harvest | DIRTYRING_UNMAP_EMPTY_OK, block),
          "queue_unmap");
    check(dirtyring_submit(vm_), "submit");
}

void Vmm::reap()
{
    dr_completion completions[blocks];
    const std::uint32_t count = dirtyring_reap(vm_, completions, blocks);
    for (const dr_completion &completion : std::span(completions, count)) {
        const auto block = static_cast<unsigned>(completion.user_data);
        if (state_.block[block].change.load() == BlockState::mapping)
            mapped(block, completion);
        else
            unmapped(block, completion);
    }
    if (count > 0)
        tell_changes();
}

void Vmm::mapped(unsigned block, const dr_completion &completion)
{
    if (completion.result != 0)
        throw migrate::Failure(fmt::format("the map of block {} completed with {}", block, completion.result));
    state_.block[block].place = change_[block].place + 1;
    changed(block);
}

void Vmm::unmapped(unsigned block, const dr_completion &completion)
{
    Change &change = change_[block];
    const std::uint64_t start = layout_.iova(block) + change.from;
    if (completion.done > 0)
        retained_.unmapped(start, std::min(completion.done, layout_.block_size - change.from), completion.epoch);
    if (completion.result == -EAGAIN) {
        state_.again.fetch_add(1, std::memory_order_relaxed);
        consume();
        return queue_unmap(block, change.from + completion.done);
    }
    if (completion.result != 0)
        throw migrate::Failure(fmt::format("the unmap of block {} completed with {}", block, completion.result));
    // Nothing of what was written there is reported: this VMM takes it all.
    if (state_.block[block].change.load() == BlockState::discarding) {
        for (unsigned place = 0; place < places; ++place)
            copy(layout_.oa(block, place), layout_.block_size);
    }
    state_.block[block].place = 0;
    changed(block);
}

void Vmm::changed(unsigned block)
{
    state_.block[block].change = BlockState::none;
    change_[block] = {};
    --changes_;
    state_.changes.fetch_add(1, std::memory_order_relaxed);
}

// A change of tracking waits for the syncs before it, and these may wait for room in the rings (client/dirtyring.h). So
// the rings are consumed meanwhile.
void Vmm::while_consuming(const std::function<void()> &call)
{
    std::future<void> made = std::async(std::launch::async, call);
    while (made.wait_for(std::chrono::microseconds(200)) != std::future_status::ready)
        consume();
    made.get();
}

// These begin while nobody tracks, and those that wait for a pin or for another slice are overtaken by the ENABLE
// behind them.
void Vmm::unmap_some()
{
    for (unsigned b = 0; b < blocks && changes_ < changes_max; ++b) {
        if (state_.block[b].change.load() == BlockState::none && state_.block[b].place.load() != 0 && draw(2) == 0)
            unmap(b, BlockState::unmapping);
    }
    tell_changes();
}

// Runs are read when the unmaps that they are of have been heard to be complete: their epochs alone say what the runs
// mean.
void Vmm::hear_first()
{
    for (const std::uint64_t deadline = now_ns() + 20 * ms; changes_ > 0 && now_ns() < deadline;) {
        reap();
        std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
}

// Now and then tracking ends and begins anew; what is written in between is copied with all the rest.
void Vmm::switch_tracking()
{
    if (syncing_ || anywhere_ || now_ns() < next_switch_ || wanted(state_.hold))
        return;
    state_.switching = 1;
    if (!wanted(state_.hold)) {
        state_.tracked = 0;
        while_consuming([this] { check(dirtyring_disable(vm_, state_.hwpt), "disable"); });
        std::this_thread::sleep_for(std::chrono::microseconds(draw(2000)));
        if (draw(2) == 0)
            unmap_some();
        state_.overtaken.fetch_add(changes_, std::memory_order_relaxed);
        track();
        if (draw(2) == 0)
            hear_first();
        next_switch_ = now_ns() + (50 + draw(300)) * ms;
        state_.changes.fetch_add(1, std::memory_order_relaxed);
    }
    state_.switching = 0;
}

// What was written there is not looked at until the VMM has taken it.
std::vector<bool> Vmm::being_discarded() const
{
    std::vector<bool> pages(layout_.pages());
    for (unsigned b = 0; b < blocks; ++b) {
        if (state_.block[b].change.load() != BlockState::discarding)
            continue;
        for (unsigned place = 0; place < places; ++place)
            std::fill_n(pages.begin() + static_cast<std::ptrdiff_t>(layout_.oa(b, place) / page_size),
                        layout_.block_pages(), true);
    }
    return pages;
}

void Vmm::tell_changes() const
{
    std::uint64_t oldest = 0;
    for (const Change &change : change_) {
        if (change.since != 0 && (oldest == 0 || change.since < oldest))
            oldest = change.since;
    }
    state_.change_since = oldest;
}

} // namespace dirtyring::chaos
