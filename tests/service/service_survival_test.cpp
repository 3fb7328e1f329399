// dirtyringd --supervise through the C API: what a killed worker leaves half done at the edges of a guest, and what its
// successor makes of it.
#include "tests/service/service_peers.hpp"
#include "tests/service/supervised.hpp"

#include <algorithm>
#include <atomic>
#include <memory>
#include <poll.h>
#include <thread>
#include <unistd.h>

namespace dirtyring::test {
namespace {

constexpr std::uint64_t mib = 1ull << 20;
constexpr std::uint64_t gib = 1ull << 30;

// ---- tables of a GiB ------------------------------------------------------------------------------------------------

enum class Last { mapped, split };

// All but one of the lowest tables of a GiB are linked, the worker dies, the last one is linked, and they become a
// large page. How many of 512 DMA writes, one through each table, fault or are not reported.
unsigned missing_of_512(Rule rule, Last last)
{
    Supervised daemon(
        {}, [&] { break_rule(rule); }, DIRTYRINGD_BREAKABLE_PATH);
    const Fd file = memory_file(gib);
    dirtyring_vm *v = nullptr;
    check(dirtyring_connect(daemon.socket().c_str(), &v));
    const Library vm(v);
    dirtyring_hwpt attributes{};
    attributes.space = DR_SPACE_OA;
    attributes.aperture_lg2 = 34;
    attributes.leaf_lg2_max = last == Last::split ? 21 : 12;
    std::uint32_t ioas = 0;
    std::uint32_t hwpt = 0;
    check(dirtyring_memory_add(v, 0, gib, file.get(), 0));
    check(dirtyring_ioas_alloc(v, &ioas));
    check(dirtyring_hwpt_alloc(v, ioas, &attributes, &hwpt));
    check(dirtyring_map(v, ioas, 0, gib - 2 * mib, 0, read_write));
    if (last == Last::split)
        check(dirtyring_split(v, hwpt, 0, gib - 2 * mib, 12));
    check(dirtyring_enable(v, hwpt));
    dirtyring_set *s = nullptr;
    check(dirtyring_set_open(v, hwpt, &s));
    const Set set(s);
    const Device device = attach(daemon.socket(), dirtyring_token(v), hwpt);
    daemon.kill_worker();
    check(dirtyring_map(v, ioas, gib - 2 * mib, 2 * mib, gib - 2 * mib, read_write));
    if (last == Last::split)
        check(dirtyring_split(v, hwpt, 0, gib, 12));
    std::vector<std::uint64_t> entries;
    const auto drain = [&] {
        dirtyring_batch batch{};
        while (dirtyring_set_peek(s, &batch)) {
            entries.insert(entries.end(), batch.entries, batch.entries + batch.count);
            dirtyring_set_release(s, &batch);
        }
    };
    // The page is made at leisure, and nobody tells when.
    unsigned missing = 0;
    for (unsigned round = 0; missing == 0 && round < (rule == Rule::none ? 5 : 100); ++round) {
        std::this_thread::sleep_for(50ms);
        drain();
        entries.clear();
        const std::uint64_t value = round + 1;
        std::set<std::uint64_t> written;
        for (std::uint64_t at = (7 + round) * page; at < gib; at += 2 * mib) {
            if (dirtyring_dma_write(dirtyring_device_dma(device.get(), 0), at, &value, sizeof value, nullptr) == 0)
                written.insert(at);
            drain();
        }
        check(dirtyring_set_sync(s));
        EXPECT_TRUE(comes_true([&] {
            drain();
            return check(dirtyring_set_synced(s)) == 1;
        }));
        const std::set<std::uint64_t> reported = pages_of(entries);
        missing = 512 - static_cast<unsigned>(std::ranges::count_if(
                            written, [&](std::uint64_t at) { return reported.contains(at / page); }));
    }
    return missing;
}

TEST(ServiceSurvival, TablesOfAGiBStayWhenTheLastIsMapped)
{
    EXPECT_EQ(missing_of_512(Rule::none, Last::mapped), 0u);
    EXPECT_GT(missing_of_512(Rule::present_forgotten, Last::mapped), 0u);
}

TEST(ServiceSurvival, TablesOfAGiBStayWhenTheLastIsSplit)
{
    EXPECT_EQ(missing_of_512(Rule::none, Last::split), 0u);
}

// ---- rings of an hwpt that is destroyed -----------------------------------------------------------------------------

// A consumer of each ring sleeps; the worker dies within DESTROY, at the point. How many rings have no end, or a
// consumer that nobody called.
unsigned without_end_in(const std::string &died, Rule rule, const std::string &point)
{
    constexpr std::uint32_t shards = 4;
    Supervised daemon(
        {},
        [&] {
            break_rule(rule);
            die_once_at(point, died);
        },
        DIRTYRINGD_BREAKABLE_PATH);
    dirtyring_vm *v = nullptr;
    check(dirtyring_connect(daemon.socket().c_str(), &v));
    const Library vm(v);
    std::uint32_t ioas = 0;
    std::uint32_t hwpt = 0;
    dirtyring_hwpt attributes{};
    attributes.aperture_lg2 = 40;
    attributes.shards = shards;
    check(dirtyring_ioas_alloc(v, &ioas));
    check(dirtyring_hwpt_alloc(v, ioas, &attributes, &hwpt));
    dirtyring_ring *rings[shards];
    for (std::uint32_t i = 0; i < shards; ++i) {
        check(dirtyring_ring_open(v, hwpt, i, &rings[i]));
        EXPECT_EQ(dirtyring_ring_arm(rings[i]), 1);
    }
    check(dirtyring_destroy(v, hwpt));
    EXPECT_EQ(::access(died.c_str(), F_OK), 0) << "nobody died";
    daemon.wait_for_life(2);
    unsigned missing = 0;
    for (dirtyring_ring *ring : rings) {
        pollfd call{dirtyring_ring_fd(ring), POLLIN, 0};
        const bool called = ::poll(&call, 1, rule == Rule::none ? 10'000 : 500) == 1;
        const std::uint64_t *entries = nullptr;
        const std::uint32_t n = dirtyring_ring_peek(ring, &entries);
        const auto ends =
            std::count_if(entries, entries + n, [](std::uint64_t e) { return dr_marker_kind(e) == DR_MARKER_END; });
        missing += !called || n == 0 || dr_marker_kind(entries[n - 1]) != DR_MARKER_END || ends != 1 ? 1 : 0;
        dirtyring_ring_close(ring);
    }
    return missing;
}

unsigned without_end(Rule rule, const std::string &point)
{
    const TemporaryDirectory directory;
    const std::string died = directory.path() + "/died";
    const unsigned missing = without_end_in(died, rule, point);
    ::unlink(died.c_str());
    return missing;
}

class ServiceDeathInDestroy : public testing::TestWithParam<const char *>
{
};
INSTANTIATE_TEST_SUITE_P(Points, ServiceDeathInDestroy,
                         testing::Values("destroy_noted:1", "ring_ended:1", "ring_ended:3", "ring_ended:4",
                                         "object_forgotten:1"),
                         [](const auto &tested) {
                             std::string name = tested.param;
                             std::erase_if(name, [](char c) { return c == '_' || c == ':'; });
                             return name;
                         });

TEST_P(ServiceDeathInDestroy, RingsEndAndConsumersAreCalled)
{
    EXPECT_EQ(without_end(Rule::none, GetParam()), 0u);
}

TEST(ServiceSurvival, RingsOfADestroyThatDiedStaySilentWithoutTheRule)
{
    EXPECT_GT(without_end(Rule::destroy_not_ended, "destroy_noted:1"), 0u);
}

// ---- a front-end that dies before its kick --------------------------------------------------------------------------

dr_guest_create lingering()
{
    dr_guest_create request = new_guest(256);
    request.linger_ms = 60'000;
    return request;
}

dirtyring_vm *successor_of(const Daemon &daemon, const RawGuest &guest)
{
    dirtyring_vm *vm = nullptr;
    check(dirtyring_take(daemon.socket().c_str(), guest.created.secret, &vm));
    return vm;
}

struct Leaver {
    void operator()(dirtyring_vm *vm) const { dirtyring_leave(vm); }
};

std::chrono::milliseconds patience_of(Rule rule)
{
    return rule == Rule::none ? 10s : 1s;
}

// It has stored the head of its submissions, and dies; its successor submits a command. True: that is completed.
bool commands_of_a_successor_are_taken(Rule rule)
{
    Daemon daemon(
        {}, [=] { break_rule(rule); }, DIRTYRINGD_BREAKABLE_PATH);
    TrackedGuest guest(daemon, lingering());
    // The service has fallen asleep and asked for a kick.
    EXPECT_TRUE(comes_true([&] {
        return std::atomic_ref(guest.submission_consumer().armed).load(std::memory_order_seq_cst) != DR_DISARMED;
    }));
    guest.submissions->put(0, sync_command(guest.hwpt, 5));
    guest.submissions->stage(1);
    EXPECT_TRUE(guest.submissions->publish());
    guest.close();
    const std::unique_ptr<dirtyring_vm, Leaver> vm(successor_of(daemon, guest));
    check(dirtyring_queue_sync(vm.get(), guest.hwpt, 6, 77));
    check(dirtyring_submit(vm.get()));
    return comes_true(
        [&] {
            dr_completion completions[8];
            const std::uint32_t n = dirtyring_reap(vm.get(), completions, 8);
            return std::any_of(completions, completions + n, [](const auto &c) { return c.user_data == 77; });
        },
        patience_of(rule));
}

TEST(ServiceSurvival, CommandsOfASuccessorAreTaken)
{
    EXPECT_TRUE(commands_of_a_successor_are_taken(Rule::none));
    EXPECT_FALSE(commands_of_a_successor_are_taken(Rule::takeover_wakes_nobody));
}

// It has released all of a ring that waits for that, and dies. True: what is written then is reported.
bool dirt_of_a_successor_is_reported(Rule rule)
{
    Daemon daemon(
        {}, [=] { break_rule(rule); }, DIRTYRINGD_BREAKABLE_PATH);
    TrackedGuest guest(daemon, lingering());
    const RawRing ring = guest.ring(guest.hwpt);
    const Device device = guest.attach();
    dma_write(device, 0);
    auto &producer = *ring.producer_map.as<dr_ring_producer>();
    const auto load = [](std::uint64_t &word) { return std::atomic_ref(word).load(std::memory_order_seq_cst); };
    EXPECT_TRUE(comes_true([&] { return load(producer.head) > 0 && load(producer.want_kick) == 1; }));
    const std::uint64_t head = load(producer.head);
    std::atomic_ref(ring.consumer_map.as<dr_ring_consumer>()->tail).store(head, std::memory_order_seq_cst);
    guest.close();
    const std::unique_ptr<dirtyring_vm, Leaver> vm(successor_of(daemon, guest));
    dma_write(device, page);
    return comes_true([&] { return load(producer.head) > head; }, patience_of(rule));
}

TEST(ServiceSurvival, DirtOfASuccessorIsReported)
{
    EXPECT_TRUE(dirt_of_a_successor_is_reported(Rule::none));
    EXPECT_FALSE(dirt_of_a_successor_is_reported(Rule::takeover_wakes_nobody));
}

} // namespace
} // namespace dirtyring::test
