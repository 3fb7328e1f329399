// Guests that come and go, so that objects are made and freed while the service dies, hwpts with several rings among
// them.
#include "tests/chaos/children.hpp"

#include <memory>
#include <poll.h>
#include <random>
#include <set>
#include <thread>
#include <vector>

namespace dirtyring::chaos {
namespace {

constexpr std::uint64_t pages = 16;

template <auto close> struct Closer {
    template <class T> void operator()(T *handle) const { close(handle); }
};
using Library = std::unique_ptr<dirtyring_vm, Closer<dirtyring_close>>;
using Ring = std::unique_ptr<dirtyring_ring, Closer<dirtyring_ring_close>>;

void take_all(RingSet &rings, std::set<std::uint64_t> &written)
{
    while (const auto batch = rings.peek()) {
        for (std::uint32_t i = 0; i < batch->count; ++i) {
            const std::uint64_t entry = batch->entries[i];
            for (std::uint64_t at = 0; !dr_is_marker(entry) && at < dr_run_length(entry); at += page_size)
                written.erase((dr_run_address(entry) + at) / page_size);
        }
        rings.release(*batch);
    }
}

// Every page in `written` is reported by the next sync.
void expect_reported(RingSet &rings, std::set<std::uint64_t> written)
{
    must(rings.sync(), "sync of a visitor");
    for (;;) {
        take_all(rings, written);
        if (must(rings.synced(), "sync of a visitor"))
            break;
        rings.wait();
    }
    if (!written.empty())
        throw Lost(
            fmt::format("lost: page {} of a visitor, written before its sync and not reported", *written.begin()));
}

// An hwpt that is destroyed while somebody sleeps at one of its rings: all of them end, and the sleeper is called,
// whoever dies meanwhile. The ioas has no other.
void make_and_destroy(const Shared &shared, dirtyring_vm *vm, std::uint32_t ioas, std::set<std::uint32_t> &ids,
                      std::mt19937_64 &random)
{
    dirtyring_hwpt attributes{};
    attributes.shards = 1u << random() % 6;
    attributes.ring_entries = 16;
    std::uint32_t hwpt = 0;
    check(dirtyring_hwpt_alloc(vm, ioas, &attributes, &hwpt), "hwpt of a visitor");
    if (!ids.insert(hwpt).second)
        throw migrate::Failure(fmt::format("hwpt {} of a visitor has the number of one before", hwpt));
    std::vector<Ring> rings(attributes.shards);
    for (std::uint32_t i = 0; i < rings.size(); ++i) {
        dirtyring_ring *ring = nullptr;
        check(dirtyring_ring_open(vm, hwpt, i, &ring), "ring of a visitor");
        rings[i].reset(ring);
    }
    const std::size_t asleep = random() % rings.size();
    if (!dirtyring_ring_arm(rings[asleep].get()))
        throw migrate::Failure("there is something in a visitor's ring before anything was done");
    check(dirtyring_destroy(vm, hwpt), "destroy of a visitor");

    pollfd call{dirtyring_ring_fd(rings[asleep].get()), POLLIN, 0};
    if (::poll(&call, 1, static_cast<int>(shared.options.patience_ns() / 1'000'000)) != 1)
        throw Hang(fmt::format("a hang: hwpt {} of a visitor is gone, and nobody calls who sleeps at ring {} of {}",
                               hwpt, asleep, rings.size()));
    for (std::size_t i = 0; i < rings.size(); ++i) {
        const std::uint64_t *entries = nullptr;
        const std::uint32_t count = dirtyring_ring_peek(rings[i].get(), &entries);
        if (count != 1 || dr_marker_kind(entries[0]) != DR_MARKER_END)
            throw Hang(fmt::format("a hang: hwpt {} of a visitor is gone, and ring {} of {} has no end", hwpt, i,
                                   rings.size()));
    }
    if (const int again = dirtyring_destroy(vm, hwpt); again != -ENOENT)
        throw migrate::Failure(fmt::format("hwpt {} of a visitor was destroyed and is there: {}", hwpt, again));
}

void make_and_destroy(const Shared &shared, std::mt19937_64 &random)
{
    dirtyring_vm *connected = nullptr;
    check(dirtyring_connect(shared.socket_path.c_str(), &connected), "a visitor cannot connect");
    const Library vm(connected);
    std::set<std::uint32_t> ids;
    for (int objects = 0; objects < 2; ++objects) {
        std::uint32_t ioas = 0;
        check(dirtyring_ioas_alloc(vm.get(), &ioas), "ioas of a visitor");
        if (!ids.insert(ioas).second)
            throw migrate::Failure(fmt::format("ioas {} of a visitor has the number of an object before", ioas));
        for (std::uint64_t hwpts = 1 + random() % 4; hwpts > 0; --hwpts) {
            make_and_destroy(shared, vm.get(), ioas, ids, random);
            shared.destroyed().fetch_add(1, std::memory_order_relaxed);
        }
        check(dirtyring_destroy(vm.get(), ioas), "destroy of a visitor");
    }
}

void visit(const Shared &shared, std::mt19937_64 &random)
{
    dirtyring::Guest guest = must(dirtyring::Guest::connect(shared.socket_path), "a visitor cannot connect");
    ring::Region memory;
    if (memory.make("visitor-memory", pages * page_size, ring::Pages::present) != 0)
        throw migrate::system_failure("memfd");
    must(guest.memory_add(0, pages * page_size, memory.fd.get()), "memory of a visitor");
    const std::uint32_t ioas = must(guest.ioas_alloc(), "ioas of a visitor");
    dirtyring_hwpt attributes{};
    attributes.space = DR_SPACE_OA;
    attributes.ring_entries = 16;
    const std::uint32_t hwpt = must(guest.hwpt_alloc(ioas, attributes), "hwpt of a visitor");
    must(guest.map(ioas, 0, pages * page_size, 0, DIRTYRING_READ | DIRTYRING_WRITE), "map of a visitor");
    must(guest.enable(hwpt), "enable of a visitor");
    RingSet rings = must(guest.open_rings(hwpt), "rings of a visitor");
    dirtyring_attach attach{};
    attach.token = guest.token();
    attach.hwpt = hwpt;
    const Device device = must(Device::attach(shared.socket_path, attach), "device of a visitor");
    for (int round = 0; round < 2; ++round) {
        std::set<std::uint64_t> written;
        for (int i = 0; i < 4; ++i) {
            const std::uint64_t page = random() % pages;
            check(dirtyring_dma_write(device.dma(0), page * page_size, &page, sizeof page, nullptr), "a visitor's DMA");
            written.insert(page);
        }
        expect_reported(rings, std::move(written));
    }
}

} // namespace

void run_visitor(Shared &shared, std::uint64_t seed)
{
    std::mt19937_64 random(seed);
    while (shared.over().load(std::memory_order_relaxed) == 0) {
        visit(shared, random);
        make_and_destroy(shared, random);
        shared.visits().fetch_add(1, std::memory_order_relaxed);
        std::this_thread::sleep_for(std::chrono::milliseconds(random() % 20));
    }
}

} // namespace dirtyring::chaos
