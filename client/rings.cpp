#include "client/vm.hpp"

#include <bit>
#include <sys/epoll.h>

namespace dirtyring::client {

int check_ring(const Mapping &map, std::size_t offset, dr_ring_kind kind, std::uint32_t entry_size,
               dr_ring_header &header)
{
    auto *region = map.as<dr_ring_producer>(offset);
    const std::uint32_t version = std::atomic_ref(region->header.version).load(std::memory_order_acquire); // R6
    header = region->header;
    if (header.magic != DR_RING_MAGIC || version != DR_RING_VERSION)
        return fail(EPROTO, "not a ring of version %u: magic %#" PRIx64 ", version %u", DR_RING_VERSION, header.magic,
                    version);
    if (header.kind != static_cast<std::uint32_t>(kind) || header.entry_size != entry_size)
        return fail(EPROTO, "expected a ring of kind %d with entries of %u bytes, got kind %u with %u bytes",
                    static_cast<int>(kind), entry_size, header.kind, header.entry_size);
    if (!std::has_single_bit(header.capacity) || header.capacity > DR_CAPACITY_MAX ||
        ring::producer_region_size(header.capacity, entry_size) > map.size() - offset)
        return fail(EPROTO, "a ring of %" PRIu64 " entries of %u bytes in %zu bytes", header.capacity, entry_size,
                    map.size() - offset);
    return 0;
}

} // namespace dirtyring::client

using namespace dirtyring::client;

struct dirtyring_ring {
    dirtyring_ring(Mapping producer, Mapping consumer, Fd kick_event, Fd call_event, std::uint64_t capacity)
        : producer_map(std::move(producer)), consumer_map(std::move(consumer)), kick(std::move(kick_event)),
          call(std::move(call_event)),
          entries(consumer_map.as<dr_ring_consumer>(), producer_map.as<dr_ring_producer>(), capacity)
    {
    }

    Mapping producer_map;
    Mapping consumer_map;
    Fd kick;
    Fd call;
    dirtyring::ring::Consumer<std::uint64_t> entries;
};

struct dirtyring_set {
    dirtyring_set(dirtyring_vm *guest, std::uint32_t id) : vm(guest)
    {
        command.opcode = DR_OP_SYNC;
        command.object = id;
    }
    dirtyring_set(const dirtyring_set &) = delete;
    dirtyring_set &operator=(const dirtyring_set &) = delete;
    ~dirtyring_set();

    [[nodiscard]] std::uint64_t all_rings() const { return ~0ull >> (64 - count); }
    [[nodiscard]] bool arm();
    // Waits until a ring has called and forgets which. 1: one has; 0: the time is over; or -errno.
    int take_calls(int timeout_ms);
    void released_marker(std::uint64_t entry, std::uint32_t shard);
    int finish_sync(int result);

    dirtyring_vm *vm;
    Fd epoll; // of the rings' calls
    Owned<dirtyring_ring> rings[DR_SHARDS_MAX];
    std::uint32_t count = 0;
    std::uint32_t next = 0; // ring whose turn it is

    // The sync may be started by another thread than the one that peeks and releases.
    Mutex mutex;
    dr_command command{};
    bool syncing = false;
    std::uint32_t slot = 0;    // of the command, while syncing
    int sync_result = 0;       // otherwise: how the last one ended
    std::uint64_t missing = 0; // rings whose marker has not been released
    std::uint64_t ended = 0;   // rings to which nothing comes any more
};

static_assert(DR_SHARDS_MAX <= 64, "a bit for each ring");

bool dirtyring_set::arm()
{
    for (std::uint32_t shard = 0; shard < count; ++shard) {
        if (!rings[shard]->entries.arm())
            return false;
    }
    return true;
}

int dirtyring_set::take_calls(int timeout_ms)
{
    epoll_event called[DR_SHARDS_MAX];
    const int n = ::epoll_wait(epoll.get(), called, DR_SHARDS_MAX, timeout_ms);
    return n < 0 ? -errno : n > 0 ? 1 : 0;
}

using Lock = std::lock_guard<Mutex>;

// ---- one ring

static int open_ring(dirtyring_vm *vm, uint32_t hwpt, uint32_t shard, dirtyring_ring **ring, uint32_t &shards)
{
    *ring = nullptr;
    dr_ring_get request{};
    request.hwpt = hwpt;
    request.shard = shard;
    dr_ring reply{};
    FdList sent;
    FdList fds;
    if (const int error = vm->connection->call(DR_RING_GET, request, reply, sent, fds); error != 0)
        return error;
    if (const int error = expect_descriptors(fds, 4); error != 0)
        return error;
    Mapping producer;
    Mapping consumer;
    if (const int error =
            map_region(fds.take(0), sizeof(dr_ring_producer), PROT_READ, "ring's producer region", producer);
        error != 0)
        return error;
    if (const int error = map_region(fds.take(1), sizeof(dr_ring_consumer), PROT_READ | PROT_WRITE,
                                     "ring's consumer region", consumer);
        error != 0)
        return error;
    dr_ring_header header{};
    if (const int error = check_ring(producer, 0, DR_RING_DIRTY, sizeof(std::uint64_t), header); error != 0)
        return error;
    Fd call;
    if (const int error = take_call_event(fds.take(2), call); error != 0)
        return error;
    auto made =
        make<dirtyring_ring>(std::move(producer), std::move(consumer), fds.take(3), std::move(call), header.capacity);
    if (!made)
        return -ENOMEM;
    *ring = made.release();
    shards = reply.shards;
    return 0;
}

int dirtyring_ring_open(dirtyring_vm *vm, uint32_t hwpt, uint32_t shard, dirtyring_ring **ring)
{
    uint32_t shards = 0;
    return open_ring(vm, hwpt, shard, ring, shards);
}

void dirtyring_ring_close(dirtyring_ring *ring)
{
    Owned<dirtyring_ring>{ring};
}

uint32_t dirtyring_ring_peek(dirtyring_ring *ring, const uint64_t **entries)
{
    const auto batch = ring->entries.peek();
    *entries = batch.data();
    return static_cast<uint32_t>(batch.size());
}

void dirtyring_ring_release(dirtyring_ring *ring, uint32_t n)
{
    if (ring->entries.release(n))
        signal_event(ring->kick);
}

bool dirtyring_ring_arm(dirtyring_ring *ring)
{
    reset_event(ring->call);
    return ring->entries.arm();
}

int dirtyring_ring_fd(const dirtyring_ring *ring)
{
    return ring->call.get();
}

// ---- all rings of an hwpt

int dirtyring_set_open(dirtyring_vm *vm, uint32_t hwpt, dirtyring_set **out)
{
    *out = nullptr;
    auto set = make<dirtyring_set>(vm, hwpt);
    if (!set)
        return -ENOMEM;
    set->epoll = Fd(::epoll_create1(EPOLL_CLOEXEC));
    if (!set->epoll)
        return fail(errno, "epoll_create1: %s", std::strerror(errno));
    std::uint32_t shards = 1; // until the first ring has come
    for (std::uint32_t shard = 0; shard < shards; ++shard) {
        dirtyring_ring *ring = nullptr;
        if (const int error = open_ring(vm, hwpt, shard, &ring, shards); error != 0)
            return error;
        if (shards == 0 || shards > DR_SHARDS_MAX) {
            dirtyring_ring_close(ring);
            return fail(EPROTO, "the service speaks of %u shards, expected 1 to %u", shards, DR_SHARDS_MAX);
        }
        set->rings[shard].reset(ring);
        ++set->count;
        epoll_event event{};
        event.events = EPOLLIN | EPOLLET; // each call counts once, so nobody has to reset the eventfds
        if (::epoll_ctl(set->epoll.get(), EPOLL_CTL_ADD, dirtyring_ring_fd(ring), &event) != 0)
            return fail(errno, "epoll_ctl: %s", std::strerror(errno));
    }
    *out = set.release();
    return 0;
}

void dirtyring_set_close(dirtyring_set *set)
{
    Owned<dirtyring_set>{set};
}

bool dirtyring_set_peek(dirtyring_set *set, dirtyring_batch *batch)
{
    for (std::uint32_t i = 0; i < set->count; ++i) {
        const std::uint32_t shard = set->next;
        set->next = (shard + 1) % set->count;
        batch->count = dirtyring_ring_peek(set->rings[shard].get(), &batch->entries);
        batch->shard = shard;
        if (batch->count > 0)
            return true;
    }
    return false;
}

void dirtyring_set_release(dirtyring_set *set, const dirtyring_batch *batch)
{
    for (std::uint32_t i = 0; i < batch->count; ++i) {
        if (dr_is_marker(batch->entries[i]))
            set->released_marker(batch->entries[i], batch->shard);
    }
    dirtyring_ring_release(set->rings[batch->shard].get(), batch->count);
}

bool dirtyring_set_arm(dirtyring_set *set)
{
    static_cast<void>(set->take_calls(0)); // those so far
    return set->arm();
}

int dirtyring_set_fd(const dirtyring_set *set)
{
    return set->epoll.get();
}

int dirtyring_set_wait(dirtyring_set *set, int timeout_ms)
{
    return set->arm() ? set->take_calls(timeout_ms) : 1;
}

// ---- sync

dirtyring_set::~dirtyring_set()
{
    if (syncing)
        vm->commands.drop(slot);
}

void dirtyring_set::released_marker(std::uint64_t entry, std::uint32_t shard)
{
    const Lock lock(mutex);
    if (dr_marker_kind(entry) == DR_MARKER_END)
        ended |= 1ull << shard;
    else if (dr_marker_kind(entry) == DR_MARKER_SYNC && dr_marker_payload(entry) == command.cookie)
        missing &= ~(1ull << shard);
}

int dirtyring_set::finish_sync(int result)
{
    vm->commands.drop(slot);
    syncing = false;
    return sync_result = result;
}

int dirtyring_set_sync(dirtyring_set *set)
{
    const Lock lock(set->mutex);
    if (set->syncing)
        return fail(EBUSY, "a sync of this set is running");
    // Markers of earlier syncs, of this set or another, may still lie in the rings: each sync has a cookie of its own.
    set->command.cookie = set->vm->new_cookie();
    set->missing = set->all_rings();
    // A sync that could not start does not leave the word of the one before it.
    set->sync_result = set->vm->commands.start(set->command, set->slot);
    set->syncing = set->sync_result == 0;
    return set->sync_result;
}

int dirtyring_set_synced(dirtyring_set *set)
{
    const Lock lock(set->mutex);
    if (!set->syncing)
        return set->sync_result;
    if (set->missing == 0)
        return set->finish_sync(1);
    dr_completion completion{};
    if (set->vm->commands.poll(set->slot, completion)) {
        if (const int error = command_result(set->command, completion.result); error != 0)
            return set->finish_sync(error);
    }
    // The end of a ring wakes whoever sleeps on the set's fd; the completion that says the same may come later and
    // wakes nobody.
    if ((set->ended & set->missing) != 0)
        return set->finish_sync(command_result(set->command, -ECANCELED));
    for (std::uint32_t shard = 0; shard < set->count; ++shard) {
        if (set->rings[shard]->entries.peer_broke_rules())
            return set->finish_sync(fail(EPROTO, "the service broke the rules of ring %u", shard));
    }
    if (const int error = set->vm->commands.check_service(); error != 0)
        return set->finish_sync(error);
    return 0;
}
