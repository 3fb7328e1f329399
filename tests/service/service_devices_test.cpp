// dirtyringd and devices, and guests that come and go.
#include "tests/service/service_peers.hpp"

#include <random>

namespace dirtyring::test {
namespace {

using testing::IsSupersetOf;

// ---- devices --------------------------------------------------------------------------------------------------------

TEST(ServiceDevice, InsideASectionCannotDetach)
{
    Daemon daemon;
    RawDevice device(daemon);
    std::vector<Fd> fds;
    device.get<dr_device>(DR_DEVICE_ATTACH, device.request(), {}, &fds);
    Mapping cells;
    ASSERT_EQ(cells.map(fds[2].get(), page, PROT_READ | PROT_WRITE), 0);
    std::atomic_ref count(cells.as<dr_cell>()->count);
    count.store(1);
    expect_refused(device.call(DR_DEVICE_DETACH, dr_empty{}), EBUSY);
    expect_refused(device.guest.call(DR_DESTROY, dr_object{0, device.guest.hwpt}), EBUSY);
    count.store(2);
    expect_done(device.call(DR_DEVICE_DETACH, dr_empty{}));
    expect_refused(device.call(DR_DEVICE_DETACH, dr_empty{}), EPROTO);
    expect_done(device.call(DR_DEVICE_ATTACH, device.request()));
}

// A guest with a device in another process, inside a section in which it wrote some pages; and a bystander on the same
// walker.
class ServiceDeviceInside : public testing::Test
{
  protected:
    ServiceDeviceInside()
    {
        device.wait_inside();
        vm.start_sync();
    }
    // The bystander's syncs pass on the same walker meanwhile.
    void expect_sync_waits()
    {
        for (int i = 0; i < 3; ++i) {
            EXPECT_FALSE(vm.synced());
            bystander.expect_tracks();
        }
        EXPECT_FALSE(vm.synced());
    }
    void expect_sync_reports_what_was_written()
    {
        EXPECT_TRUE(comes_true([&] { return vm.synced(); })) << "the sync hangs";
        EXPECT_THAT(vm.reported, IsSupersetOf(written));
    }

    const std::set<std::uint64_t> written{0, 5, 17, 200};
    Daemon daemon;
    Vm vm{daemon};
    Vm bystander{daemon};
    DeviceProcess device{daemon, vm.token(), vm.hwpt, {vm.iova(0), vm.iova(5), vm.iova(17), vm.iova(200)}};
};

TEST_F(ServiceDeviceInside, IsWaitedForUntilItLeaves)
{
    expect_sync_waits();
    device.leave_section();
    expect_sync_reports_what_was_written();
}

TEST_F(ServiceDeviceInside, IsWaitedForUntilItIsKilled)
{
    expect_sync_waits();
    device.kill();
    expect_sync_reports_what_was_written();
}

TEST_F(ServiceDeviceInside, IsWaitedForWhileItIsStopped)
{
    device.stop();
    expect_sync_waits();
    device.kill();
    expect_sync_reports_what_was_written();
}

TEST_F(ServiceDeviceInside, IsWaitedForWhenItHasClosedItsSocket)
{
    device.close_socket();
    expect_sync_waits();
    device.leave_section();
    expect_sync_reports_what_was_written();
    EXPECT_EQ(dirtyring_destroy(vm.vm(), vm.hwpt), -EBUSY) << "its process still has the tables";
    device.kill();
    EXPECT_TRUE(comes_true([&] { return dirtyring_destroy(vm.vm(), vm.hwpt) == 0; }));
}

TEST_F(ServiceDeviceInside, MayDieWithItsGuest)
{
    vm.close();
    bystander.expect_tracks();
    device.kill();
    bystander.expect_tracks();
}

TEST_F(ServiceDeviceInside, ThatIsStoppedCostsLittleTime)
{
    device.stop();
    const std::int64_t before = daemon.process().cpu_time();
    std::this_thread::sleep_for(2s);
    EXPECT_LT(daemon.process().cpu_time() - before, ::sysconf(_SC_CLK_TCK));
}

TEST(ServiceDevice, KilledInASectionLeavesNoDescriptor)
{
    Daemon daemon;
    {
        Vm vm(daemon);
        for (int i = 0; i < 10; ++i) {
            DeviceProcess device(daemon, vm.token(), vm.hwpt, {vm.iova(1)});
            device.wait_inside();
        }
        vm.expect_tracks();
        vm.detach();
        EXPECT_TRUE(comes_true([&] { return dirtyring_destroy(vm.vm(), vm.hwpt) == 0; }));
    }
    daemon.expect_no_descriptor_left();
}

// The service hears of the death and then reads the DETACH, while the shards bury the device.
TEST(ServiceDevice, ThatDiedMayStillDetach)
{
    Daemon daemon;
    Vm bystander(daemon);
    TrackedGuest guest(daemon);
    for (int i = 0; i < 20; ++i) {
        int ends[2];
        need(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), "socketpair");
        const Peer here{Fd(ends[0])};
        const Peer there{Fd(ends[1])};
        const pid_t pid = need(::fork(), "fork");
        if (pid == 0) {
            ::prctl(PR_SET_PDEATHSIG, SIGKILL);
            Peer device(daemon);
            device.hello().get<dr_device>(DR_DEVICE_ATTACH, new_device(guest.hwpt, guest.info.token));
            there.send(Peer::message(0, {}), {device.socket()});
            ::pause();
        }
        const Reply lent = here.receive();
        ASSERT_EQ(lent.fds.size(), 1u);
        const Peer device{Fd(::dup(lent.fds[0].get()))};
        daemon.process().signal(SIGSTOP);
        ::kill(pid, SIGKILL);
        ::waitpid(pid, nullptr, 0);
        device.send(Peer::message(DR_DEVICE_DETACH, payload_of(dr_empty{})));
        daemon.process().signal(SIGCONT);
        expect_done(device.receive());
    }
    bystander.expect_tracks();
    EXPECT_TRUE(comes_true([&] { return guest.call(DR_DESTROY, dr_object{0, guest.hwpt}).error() == 0; }));
}

TEST(ServiceDevice, OutlivesItsGuest)
{
    Daemon daemon;
    Vm vm(daemon);
    Vm bystander(daemon);
    vm.expect_tracks();
    vm.close();
    pollfd hangup{dirtyring_device_socket(vm.device().get()), POLLRDHUP, 0};
    EXPECT_EQ(::poll(&hangup, 1, 10'000), 1);
    for (std::uint64_t p = 0; p < 256; ++p)
        vm.dirty(p); // the tables are still its own
    bystander.expect_tracks();
    EXPECT_EQ(dirtyring_device_detach(attach(daemon.socket(), bystander.token(), bystander.hwpt).release()), 0);
    vm.detach();
    bystander.expect_tracks();
}

TEST(ServiceDevice, ThatScribblesOverItsTablesHarmsItsOwnGuestOnly)
{
    Daemon daemon;
    Vm bystander(daemon);
    RawDevice device(daemon);
    std::vector<Fd> fds;
    device.get<dr_device>(DR_DEVICE_ATTACH, device.request(), {}, &fds);
    Mapping cells;
    Mapping tables;
    const dr_translation_header h = dirtyring::iommu::make_geometry(DR_FORMAT_AMDV1, 32, 1);
    ASSERT_EQ(cells.map(fds[2].get(), page, PROT_READ | PROT_WRITE), 0);
    ASSERT_EQ(tables.map(fds[0].get(), h.tables_size, PROT_READ | PROT_WRITE), 0);
    const RawRing ring = device.guest.ring(device.guest.hwpt);
    std::mt19937_64 random(3);
    // The first tables of some level, and some beyond.
    const auto known = [&] {
        using namespace dirtyring::iommu;
        return first_table(h, 0) + first_number(h.slice_lg2, static_cast<unsigned>(random() % 3));
    };
    for (int i = 0; i < 20'000; ++i) {
        *tables.as<std::uint64_t>(h.table_bits + (known() / 8 + random() % 8) / 8 * 8) = random();
        *tables.as<std::uint64_t>(h.line_words + (known() + random() % 8) * 8) = random();
        *tables.as<std::uint64_t>(h.table_pages + (known() + random() % 4) * page + random() % 512 * 8) = random();
        *tables.as<std::uint64_t>(h.table_pages + random() % 2 * page + random() % 512 * 8) = random();
        cells.as<dr_cell>()->count = random();
        if (i % 100 == 0) {
            ::eventfd_write(fds[3].get(), 1);
            device.guest.submit(i % 200 == 0 ? unmap_command(device.guest.ioas, 0, UINT64_MAX, DR_UNMAP_EMPTY_OK)
                                             : map_command(device.guest.ioas, 0, 256 * page, 0));
            cells.as<dr_cell>()->count = 0;
            device.guest.next_completion();
            (void)ring.take();
        }
        if (i % 4000 == 0)
            bystander.expect_tracks();
    }
    ASSERT_EQ(::fallocate(fds[0].get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 1 << 30), 0);
    ASSERT_EQ(::fallocate(fds[2].get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, page), 0);
    EXPECT_EQ(device.guest.run(unmap_command(device.guest.ioas, 0, UINT64_MAX, DR_UNMAP_EMPTY_OK)), 0);
    bystander.expect_tracks();
}

TEST(ServiceDevice, WritesWhereTheMapSaysOrNowhere)
{
    Daemon daemon;
    RawGuest guest(daemon);
    // Two pieces of memory whose addresses differ by bits that AMD v1 entries do not hold.
    constexpr std::uint64_t beyond = 1ull << 52;
    const Fd low = memory_file(page);
    const Fd high = memory_file(page);
    guest.add_memory(0, page, low);
    const Reply added = guest.call(DR_MEMORY_ADD, dr_memory_region{0, 0, beyond, page, 0}, {high.get()});
    if (added.error() != 0)
        return; // as good
    const auto ioas = guest.get<dr_object>(DR_IOAS_ALLOC, dr_empty{}).id;
    const auto hwpt = guest.get<dr_hwpt>(DR_HWPT_ALLOC, RawGuest::hwpt_request(ioas)).id;
    if (guest.run(map_command(ioas, 0, page, beyond)) != 0)
        return; // as good
    const Device device = attach(daemon.socket(), guest.info.token, hwpt);
    const std::uint64_t value = 1;
    (void)dirtyring_dma_write(dirtyring_device_dma(device.get(), 0), 0, &value, sizeof value, nullptr);
    std::uint64_t in_low = 0;
    ASSERT_EQ(::pread(low.get(), &in_low, sizeof in_low, 0), static_cast<ssize_t>(sizeof in_low));
    EXPECT_EQ(in_low, 0u) << "a write to OA 2^52 went to OA 0";
}

// ---- memory of tables -----------------------------------------------------------------------------------------------

// Bytes of tables that a process maps by large pages.
std::uint64_t large_tables(const std::string &process)
{
    std::ifstream maps("/proc/" + process + "/smaps");
    bool tables = false;
    std::uint64_t kilobytes = 0;
    for (std::string line; std::getline(maps, line);) {
        if (line.find(" /memfd:") != std::string::npos || line.find("-") < line.find(" "))
            tables = line.find("/memfd:dirtyring-tables") != std::string::npos;
        else if (tables && line.starts_with("ShmemPmdMapped:"))
            kilobytes += std::stoull(line.substr(line.find(':') + 1));
    }
    return kilobytes * 1024;
}

bool kernel_makes_large_pages()
{
    ring::Region region;
    return region.make("large", 2 * ring::large_page, ring::Pages::present) == 0 && region.make_large(0) == 0;
}

TEST(ServiceTables, OfAWholeGiBAreInOneLargePageForAll)
{
    if (!kernel_makes_large_pages())
        GTEST_SKIP() << "this kernel makes no large pages of shared memory (Linux 6.1 does)";
    constexpr std::uint64_t gib = 1ull << 30;
    Daemon daemon;
    RawGuest guest(daemon);
    const Fd memory = memory_file(gib);
    guest.add_memory(0, gib, memory);
    const std::uint32_t ioas = guest.get<dr_object>(DR_IOAS_ALLOC, dr_empty{}).id;
    const std::uint32_t hwpt = guest.get<dr_hwpt>(DR_HWPT_ALLOC, RawGuest::hwpt_request(ioas)).id;
    for (int i = 0; i < 2; ++i) {
        EXPECT_EQ(guest.run(map_command(ioas, gib, gib, 0)), 0);
        EXPECT_TRUE(
            comes_true([&] { return large_tables(std::to_string(daemon.process().pid())) == ring::large_page; }));
        const Device device = attach(daemon.socket(), guest.info.token, hwpt);
        for (std::uint64_t at = 0; at < gib; at += gib / 64)
            dma_write(device, gib + at);
        EXPECT_EQ(large_tables("self"), ring::large_page);
        EXPECT_EQ(guest.run(unmap_command(ioas, gib, gib)), 0);
        EXPECT_EQ(large_tables(std::to_string(daemon.process().pid())), 0u) << "its memory is given back";
    }
    EXPECT_EQ(guest.run(map_command(ioas, gib, gib - page, 0)), 0); // in all its tables, if not in all of the last one
    EXPECT_EQ(guest.run(map_command(ioas, 2 * gib, gib - 512 * page, 0)), 0);
    EXPECT_TRUE(comes_true([&] { return large_tables(std::to_string(daemon.process().pid())) == ring::large_page; }));
}

// ---- objects and guests that come and go ----------------------------------------------------------------------------

TEST(ServiceLife, OfAnHwptEndsWithWhatIsInFlight)
{
    Daemon daemon;
    TrackedGuest guest(daemon, [](auto &r) { r.ring_entries = DR_CAPACITY_MIN; });
    const RawRing ring = guest.ring(guest.hwpt);
    {
        const Device device = guest.attach();
        for (std::uint64_t p = 0; p < 64; p += 2)
            dma_write(device, p * page);
    }
    guest.submit(sync_command(guest.hwpt, 7)); // waits for room
    guest.submit(sync_command(guest.hwpt, 8));
    walker_goes_round(daemon);
    EXPECT_FALSE(guest.completed());
    guest.get<dr_empty>(DR_DESTROY, dr_object{0, guest.hwpt});
    EXPECT_EQ(guest.next_completion().result, -ECANCELED);
    EXPECT_EQ(guest.next_completion().result, -ECANCELED);
    const auto entries = ring.take();
    ASSERT_THAT(entries, Not(testing::IsEmpty()));
    EXPECT_EQ(entries.back(), dr_marker(DR_MARKER_END, 0));
    EXPECT_EQ(std::count_if(entries.begin(), entries.end(), dr_is_marker), 1);
}

TEST(ServiceLife, OfAnHwptLeavesItsIoasEmpty)
{
    Daemon daemon;
    TrackedGuest guest(daemon);
    for (int i = 0; i < 20; ++i) {
        const std::uint32_t old = guest.hwpt;
        guest.get<dr_empty>(DR_DESTROY, dr_object{0, old});
        EXPECT_EQ(guest.run(sync_command(old, 1)), -ENOENT);
        EXPECT_EQ(guest.run(map_command(guest.ioas, 0, page, 0)), -ENOSPC);
        guest.hwpt = guest.get<dr_hwpt>(DR_HWPT_ALLOC, RawGuest::hwpt_request(guest.ioas)).id;
        EXPECT_NE(guest.hwpt, old);
        EXPECT_EQ(guest.run(sync_command(old, 1)), -ENOENT);
        expect_refused(guest.call(DR_RING_GET, dr_ring_get{0, old, 0}), ENOENT);
        EXPECT_EQ(guest.run(map_command(guest.ioas, 0, TrackedGuest::pages * page, 0)), 0);
        EXPECT_EQ(guest.run(command(DR_OP_ENABLE, guest.hwpt)), 0);
        const RawRing ring = guest.ring(guest.hwpt);
        const Device device = guest.attach();
        dma_write(device, 3 * page);
        EXPECT_EQ(guest.run(sync_command(guest.hwpt, 1)), 0);
        EXPECT_THAT(pages_of(ring.take()), testing::Contains(3u));
    }
}

TEST(ServiceLife, OfAHundredGuestsLeavesNothing)
{
    Daemon daemon;
    const auto live = [&] {
        Vm vm(daemon, sharded(2), 16);
        vm.expect_tracks();
        if (vm.ioas % 2 == 0) // whichever goes first
            vm.detach();
        else
            vm.close();
    };
    for (int i = 0; i < 20; ++i)
        live();
    daemon.expect_no_descriptor_left();
    const std::int64_t before = daemon.process().resident();
    for (int i = 0; i < 100; ++i)
        live();
    daemon.expect_no_descriptor_left();
    if (!daemon.process().instrumented()) {
        EXPECT_LT(daemon.process().resident() - before, 1024) << "kB";
    }
}

// Big maps take many visits, so guests go while parts of them are done and others are not.
TEST(ServiceLife, OfGuestsEndsWhileTheirMapsAreHalfDone)
{
    Daemon daemon({"--walkers", "2"});
    Vm bystander(daemon);
    const Fd memory = memory_file(page);
    for (int i = 0; i < 200; ++i) {
        RawGuest guest(daemon);
        constexpr std::uint64_t slice = 1ull << 31;
        constexpr std::uint64_t large = 64ull << 20;
        guest.add_memory(0, 2 * slice, memory);
        const auto ioas = guest.get<dr_object>(DR_IOAS_ALLOC, dr_empty{}).id;
        dr_hwpt_alloc request = RawGuest::hwpt_request(ioas);
        request.shards = 2;
        guest.get<dr_hwpt>(DR_HWPT_ALLOC, request);
        // Much in one shard, one page in the other.
        const std::uint64_t start = i % 4 < 2 ? slice - large : slice - page;
        const std::uint64_t end = i % 4 < 2 ? slice + page : slice + large;
        guest.submit(map_command(ioas, start, end - start, start));
        if (i % 2 != 0)
            guest.get<dr_object>(DR_IOAS_ALLOC, dr_empty{}); // it has begun
    }
    bystander.expect_tracks();
    bystander.close();
    bystander.detach();
    daemon.expect_no_descriptor_left();
}

struct Walkers {
    unsigned walkers;
    unsigned shards;

    friend void PrintTo(const Walkers &w, std::ostream *out)
    {
        *out << w.walkers << " walkers, " << w.shards << " shards";
    }
};

class ServiceGuests : public testing::TestWithParam<Walkers>
{
};

INSTANTIATE_TEST_SUITE_P(Some, ServiceGuests,
                         testing::Values(Walkers{1, 1}, Walkers{1, 4}, Walkers{2, 1}, Walkers{2, 4}),
                         [](const auto &tested) {
                             return std::to_string(tested.param.walkers) + "Walkers" +
                                    std::to_string(tested.param.shards) + "Shards";
                         });

TEST_P(ServiceGuests, LiveSideBySide)
{
    Daemon daemon({"--walkers", std::to_string(GetParam().walkers)});
    std::vector<std::unique_ptr<Vm>> vms;
    for (int i = 0; i < 6; ++i)
        vms.push_back(std::make_unique<Vm>(daemon, sharded(GetParam().shards), 64));
    for (int round = 0; round < 20; ++round) {
        for (const auto &vm : vms) {
            if (!vm->device())
                vm->attach();
            vm->reported.clear();
            for (std::uint64_t p = static_cast<std::uint64_t>(round) % 7; p < 64; p += 7)
                vm->dirty(p);
            vm->start_sync();
        }
        for (const auto &vm : vms) {
            EXPECT_TRUE(comes_true([&] { return vm->synced(); }));
            std::set<std::uint64_t> written;
            for (std::uint64_t p = static_cast<std::uint64_t>(round) % 7; p < 64; p += 7)
                written.insert(p);
            EXPECT_THAT(vm->reported, IsSupersetOf(written));
        }
    }
}

// ---- an idle service ------------------------------------------------------------------------------------------------

void expect_idle(const Daemon &daemon)
{
    std::this_thread::sleep_for(100ms); // what was going on is over
    const std::int64_t before = daemon.process().cpu_time();
    std::this_thread::sleep_for(2s);
    EXPECT_LT(daemon.process().cpu_time() - before, ::sysconf(_SC_CLK_TCK) / 5) << "ticks in 2 s";
}

TEST(ServiceIdle, SleepsWithoutGuests)
{
    Daemon daemon;
    expect_idle(daemon);
}

TEST(ServiceIdle, SleepsWithTenIdleGuests)
{
    Daemon daemon({"--walkers", "2"});
    std::vector<std::unique_ptr<Vm>> vms;
    for (int i = 0; i < 10; ++i) {
        vms.push_back(std::make_unique<Vm>(daemon, sharded(2), 16));
        vms.back()->expect_tracks();
    }
    expect_idle(daemon);
    for (const auto &vm : vms)
        vm->expect_tracks();
}

} // namespace
} // namespace dirtyring::test
