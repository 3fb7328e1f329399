#include "tests/chaos/vmm.hpp"

#include "tests/chaos/children.hpp"

#include <algorithm>
#include <cstring>
#include <poll.h>
#include <unistd.h>

namespace dirtyring::chaos {
namespace {

constexpr std::uint32_t linger_ms = 60'000; // longer than any successor takes
constexpr std::uint32_t stall_ms = 100;

} // namespace

Vmm::Vmm(Shared &shared, Guest &guest, std::uint64_t seed)
    : shared_(shared), guest_(guest), state_(guest.state), layout_(guest.layout), random_(seed)
{
    state_.lives.fetch_add(1);
    state_.switching = 0;
    state_.stalled_pid = 0;
    state_.change_since = 0;
}

void Vmm::run()
{
    open();
    next_switch_ = now_ns() + (50 + draw(300)) * ms;
    while (!wanted(state_.leave) && !wanted(state_.finish)) {
        consume();
        reap();
        sync();
        change_maps();
        switch_tracking();
        wait();
    }
    if (wanted(state_.finish))
        finish();
    else
        leave();
}

// ---- beginning and end

void Vmm::open()
{
    dirtyring_guest attributes{};
    attributes.linger_ms = linger_ms;
    attributes.stall_ms = stall_ms;
    std::memcpy(attributes.secret, state_.secret, sizeof state_.secret);
    const char *path = shared_.socket_path.c_str();
    if (state_.ready.load() != 0) {
        check(dirtyring_take(path, state_.secret, &vm_), "takeover");
        take_up();
        return;
    }
    // One that died while it set up may have come to any step: away with what it made.
    if (state_.begun.exchange(1) != 0) {
        check(dirtyring_connect_guest(path, &attributes, &vm_), "connect");
        dirtyring_close(vm_);
    }
    check(dirtyring_connect_guest(path, &attributes, &vm_), "connect");
    set_up();
}

void Vmm::set_up()
{
    for (unsigned i = 0; i < layout_.copies(); ++i)
        check(dirtyring_memory_add(vm_, i * layout_.memory(), layout_.memory(), guest_.source.fd.get(), 0),
              "memory_add");
    check(dirtyring_ioas_alloc(vm_, &state_.ioas), "ioas_alloc");
    dirtyring_hwpt attributes{};
    attributes.format = layout_.format;
    attributes.always_on = layout_.always_on ? 1 : 0;
    attributes.aperture_lg2 = layout_.aperture_lg2();
    attributes.shards = layout_.shards;
    attributes.leaf_lg2_max = layout_.leaf_lg2_max;
    attributes.all_sizes = 1;
    attributes.split = layout_.split;
    attributes.collapse = 1;
    attributes.space = layout_.space;
    attributes.ring_entries = layout_.ring_entries;
    check(dirtyring_hwpt_alloc(vm_, state_.ioas, &attributes, &state_.hwpt), "hwpt_alloc");
    std::memcpy(state_.token, dirtyring_token(vm_), sizeof state_.token);
    check(dirtyring_set_open(vm_, state_.hwpt, &set_), "rings");
    for (BlockState &block : state_.block) {
        block.place = 0;
        block.change = BlockState::none;
    }
    fill();
    track();
    state_.ready = 1;
}

void Vmm::fill()
{
    layout_.for_each_gap([this](std::uint64_t start, std::uint64_t end) {
        check(dirtyring_map(vm_, state_.ioas, start, end - start, start, DIRTYRING_READ | DIRTYRING_WRITE), "map");
    });
}

// What a predecessor left. Where it was changing a map, that is unmapped, whatever there is.
void Vmm::take_up()
{
    check(dirtyring_set_open(vm_, state_.hwpt, &set_), "rings");
    anywhere_ = true;
    for (unsigned b = 0; b < blocks; ++b) {
        const BlockState &block = state_.block[b];
        const std::uint64_t place = block.place.load();
        const auto change = static_cast<BlockState::Change>(block.change.load());
        if (change != BlockState::none)
            unmap(b, change == BlockState::discarding ? change : BlockState::unmapping);
        else if (place != 0)
            retained_.map(layout_.iova(b), layout_.block_size, layout_.oa(b, static_cast<unsigned>(place - 1)));
    }
    tell_changes();
    if (state_.tracked.load() == 0)
        track();
}

void Vmm::track()
{
    DeviceState &device = guest_.device[draw(guest_.device.size())];
    const Only only = shared_.options.only;
    const std::uint64_t died = state_.died_cleaned.load();
    device.die_cleaned = (only == Only::everything || only == Only::devices) && draw(2) == 0 ? 1 : 0;
    while_consuming([this] {
        if (const int error = dirtyring_enable(vm_, state_.hwpt); error != -EALREADY)
            check(error, "enable");
    });
    device.die_cleaned = 0;
    if (state_.died_cleaned.load() != died)
        state_.spared_until = now_ns() + 50 * ms;
    copy(0, layout_.memory());
    state_.tracked = 1;
}

void Vmm::leave()
{
    state_.leave = 0;
    dirtyring_set_close(std::exchange(set_, nullptr));
    dirtyring_leave(vm_);
}

// No device writes any more: the copy is to be equal to the memory, what died in the middle of a write included.
void Vmm::finish()
{
    for (int syncs = 0; syncs < 2;) {
        consume();
        reap();
        if (!syncing_ && changes_ == 0) {
            ++syncs;
            start_sync();
        }
        sync();
        if (syncs < 2 || syncing_)
            wait();
    }
    const std::byte *source = guest_.source.map.data();
    for (std::uint64_t page = 0; page < layout_.pages(); ++page) {
        if (std::memcmp(source + page * page_size, guest_.destination.data() + page * page_size, page_size) != 0)
            throw Lost(fmt::format("lost: guest {} ({}), page {}: the copy differs at the end, when nobody writes",
                                   guest_.index, layout_.name, page));
    }
    dirtyring_set_close(std::exchange(set_, nullptr));
    dirtyring_close(vm_);
    state_.done = 1;
}

// ---- reports

void Vmm::consume()
{
    dirtyring_batch batch{};
    for (int batches = 0; batches < 64 && dirtyring_set_peek(set_, &batch); ++batches) {
        std::for_each_n(batch.entries, batch.count, [&](std::uint64_t entry) { take(entry, batch.shard); });
        dirtyring_set_release(set_, &batch);
    }
}

void Vmm::take(std::uint64_t entry, std::uint32_t shard)
{
    if (!dr_is_marker(entry))
        return copy_run(dr_run_address(entry), dr_run_length(entry), shard);
    switch (dr_marker_kind(entry)) {
    case DR_MARKER_SYNC:
        break;
    case DR_MARKER_EPOCH:
        retained_.passed(shard, dr_marker_payload(entry));
        break;
    case DR_MARKER_ALL_DIRTY:
        copy(0, layout_.memory());
        break;
    default:
        throw migrate::Failure(fmt::format("marker {:#x} in ring {}", entry, shard));
    }
}

void Vmm::copy_run(std::uint64_t start, std::uint64_t length, std::uint32_t shard)
{
    if (layout_.space == DR_SPACE_OA)
        return copy(start, length);
    if (!anywhere_) {
        if (!retained_.translate(shard, start, length, [&](std::uint64_t oa, std::uint64_t n) { copy(oa, n); }))
            state_.unknown.fetch_add(1, std::memory_order_relaxed);
        return;
    }
    for (std::uint64_t iova = start; iova < start + length; iova += page_size)
        layout_.for_each_oa(iova, [this](std::uint64_t oa) { copy(oa, page_size); });
}

void Vmm::copy(std::uint64_t oa, std::uint64_t length)
{
    if (oa > layout_.oa_end() || length > layout_.oa_end() - oa)
        throw migrate::Failure(fmt::format("a run at {:#x} of {:#x} bytes is not in the guest's memory", oa, length));
    for (std::uint64_t i = 0; i < length; i += page_size) {
        const std::uint64_t at = (oa + i) % layout_.memory();
        std::byte *to = guest_.destination.data() + at;
        const std::byte *from = guest_.source.map.data() + at;
        state_.reported.fetch_add(1, std::memory_order_relaxed);
        if (std::memcmp(to, from, page_size) == 0)
            state_.over_reported.fetch_add(1, std::memory_order_relaxed);
        else
            std::memcpy(to, from, page_size);
    }
}

// ---- syncs

void Vmm::sync()
{
    if (!syncing_) {
        if (now_ns() >= next_sync_ && !(anywhere_ && changes_ > 0))
            start_sync();
        return;
    }
    const int done = dirtyring_set_synced(set_);
    check(done, "sync");
    if (done == 0)
        return;
    syncing_ = false;
    anywhere_ = false;
    judge();
    state_.synced_since = sync_since_;
    state_.syncs.fetch_add(1, std::memory_order_relaxed);
    next_sync_ = now_ns() + draw(4 * ms);
}

void Vmm::start_sync()
{
    guest_.journal.look(wanted_);
    sync_since_ = now_ns();
    check(dirtyring_set_sync(set_), "sync");
    syncing_ = true;
    asleep_ = draw(2) == 0 && !wanted(state_.hold);
    state_.asleep_syncs.fetch_add(asleep_ ? 1 : 0, std::memory_order_relaxed);
}

void Vmm::judge()
{
    const std::vector<bool> spared = being_discarded();
    const auto loss = guest_.journal.loss(guest_.destination.data(), wanted_, seen_,
                                          [&](std::uint64_t page) { return static_cast<bool>(spared[page]); });
    if (loss)
        throw Lost(fmt::format("lost: guest {} ({}), page {}, device {}: write {} was complete before the sync, the "
                               "copy has {}",
                               guest_.index, layout_.name, loss->page, loss->device, loss->expected, loss->found));
}

// Until there is something to do. Half of the syncs are waited for as a VMM may: asleep until a ring calls, whatever
// becomes of the service meanwhile. A change of maps that is still under way is waited for as well.
void Vmm::wait()
{
    struct dirtyring_stalled stalled {
    };
    const bool armed = dirtyring_set_arm(set_) && dirtyring_command_arm(vm_);
    state_.stalled_pid = dirtyring_stalled(vm_, &stalled) ? static_cast<std::uint64_t>(stalled.pid) : 0;
    if (!armed)
        return;
    pollfd fds[] = {{dirtyring_set_fd(set_), POLLIN, 0},
                    {deaf() && changes_ == 0 ? -1 : dirtyring_command_fd(vm_), POLLIN, 0},
                    {guest_.bell.get(), POLLIN, 0},
                    {deaf() ? -1 : dirtyring_socket(vm_), POLLRDHUP, 0}};
    timespec timeout = migrate::until(now_ns() + 5 * ms);
    if (!syncing_)
        timeout = migrate::until(next_sync_);
    ::ppoll(fds, std::size(fds), deaf() ? nullptr : &timeout, nullptr);
    if (std::uint64_t rung = 0; fds[2].revents != 0) [[maybe_unused]]
        const ssize_t got = ::read(guest_.bell.get(), &rung, sizeof rung);
    if (fds[3].revents != 0)
        check(dirtyring_reconnect(vm_), "reconnect");
}

void run_vmm(Shared &shared, Guest &guest, std::uint64_t seed)
{
    Vmm(shared, guest, seed).run();
}

} // namespace dirtyring::chaos
