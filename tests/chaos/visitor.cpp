// Guests that come and go, so that objects are made and freed while the service dies.
#include "tests/chaos/children.hpp"

#include <random>
#include <set>
#include <thread>

namespace dirtyring::chaos {
namespace {

constexpr std::uint64_t pages = 16;

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
        shared.visits().fetch_add(1, std::memory_order_relaxed);
        std::this_thread::sleep_for(std::chrono::milliseconds(random() % 20));
    }
}

} // namespace dirtyring::chaos
