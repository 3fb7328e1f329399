// dirtyringd and shared memory: who may write what, command rings and dirty rings of peers that break the rules.
#include "tests/service/service_peers.hpp"

#include <random>

namespace dirtyring::test {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsSupersetOf;

// ---- rights ---------------------------------------------------------------------------------------------------------

std::string name_of(const Fd &fd)
{
    char name[256] = {};
    const std::string link = "/proc/self/fd/" + std::to_string(fd.get());
    need(static_cast<int>(::readlink(link.c_str(), name, sizeof name - 1)), "readlink");
    return name;
}

std::vector<std::string> names_of(const std::vector<Fd> &fds)
{
    std::vector<std::string> names;
    for (const Fd &fd : fds)
        names.push_back(name_of(fd));
    return names;
}

void expect_read_only(const Fd &fd)
{
    SCOPED_TRACE(name_of(fd));
    EXPECT_EQ(::fcntl(fd.get(), F_GETFL) & O_ACCMODE, O_RDONLY);
    EXPECT_EQ(::mmap(nullptr, page, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0), MAP_FAILED);
    void *reading = ::mmap(nullptr, page, PROT_READ, MAP_SHARED, fd.get(), 0);
    ASSERT_NE(reading, MAP_FAILED);
    EXPECT_NE(::mprotect(reading, page, PROT_READ | PROT_WRITE), 0);
    ::munmap(reading, page);
    const char byte = 1;
    EXPECT_LT(::pwrite(fd.get(), &byte, 1, 0), 0);
    EXPECT_NE(::fallocate(fd.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, page), 0);
}

void expect_sealed(const Fd &fd)
{
    SCOPED_TRACE(name_of(fd));
    struct stat status {
    };
    ASSERT_EQ(::fstat(fd.get(), &status), 0);
    EXPECT_EQ(status.st_mode & 07777, 0600u);
    EXPECT_EQ(::fcntl(fd.get(), F_GET_SEALS), F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
    EXPECT_NE(::ftruncate(fd.get(), 0), 0);
    EXPECT_NE(::ftruncate(fd.get(), status.st_size + 4096), 0);
}

struct GuestDescriptors {
    explicit GuestDescriptors(const Daemon &daemon) : device(daemon)
    {
        Peer vmm(daemon);
        vmm.hello();
        vmm.get<dr_guest>(DR_GUEST_CREATE, new_guest(4), {}, &of_guest);
        device.guest.get<dr_ring>(DR_RING_GET, dr_ring_get{0, device.guest.hwpt, 0}, {}, &of_ring);
        device.get<dr_device>(DR_DEVICE_ATTACH, device.request(), {}, &of_device);
    }

    RawDevice device;
    std::vector<Fd> of_guest;
    std::vector<Fd> of_ring;
    std::vector<Fd> of_device;
};

TEST(ServiceRights, AVmmGetsNoTablesAndADeviceNoRing)
{
    Daemon daemon;
    const GuestDescriptors all(daemon);
    const auto memfd = [](const std::string &name) { return HasSubstr("memfd:" + name + " "); };
    const auto event = HasSubstr("[eventfd]");
    EXPECT_THAT(names_of(all.of_guest),
                ElementsAre(memfd("dirtyring-front-end"), memfd("dirtyring-service"), event, event));
    EXPECT_THAT(names_of(all.of_ring),
                ElementsAre(memfd("dirtyring-producer"), memfd("dirtyring-consumer"), event, event));
    EXPECT_THAT(names_of(all.of_device), ElementsAre(memfd("dirtyring-tables"), memfd("dirtyring-translation"),
                                                     memfd("dirtyring-cells"), event, memfd("guest-memory")));
}

TEST(ServiceRights, WhatTheServiceWritesAlonePeersCannot)
{
    Daemon daemon;
    const GuestDescriptors all(daemon);
    expect_read_only(all.of_guest[1]);
    expect_read_only(all.of_ring[0]);
    expect_read_only(all.of_device[1]);
}

TEST(ServiceRights, NoPeerResizesARegion)
{
    Daemon daemon;
    const GuestDescriptors all(daemon);
    for (const Fd *fd : {&all.of_guest[0], &all.of_guest[1], &all.of_ring[0], &all.of_ring[1], &all.of_device[0],
                         &all.of_device[1], &all.of_device[2]})
        expect_sealed(*fd);
}

// 0: another user could reopen it for writing; else the errno.
int reopened_by_nobody(const Fd &fd)
{
    const pid_t child = need(::fork(), "fork");
    if (child == 0) {
        constexpr unsigned nobody = 65534;
        if (::setresgid(nobody, nobody, nobody) != 0 || ::setresuid(nobody, nobody, nobody) != 0)
            ::_exit(255);
        ::prctl(PR_SET_DUMPABLE, 1); // so that /proc/self/fd is ours again
        const std::string path = "/proc/self/fd/" + std::to_string(fd.get());
        ::_exit(::open(path.c_str(), O_RDWR) >= 0 ? 0 : errno);
    }
    int status = 0;
    need(::waitpid(child, &status, 0), "waitpid");
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(ServiceRights, AnotherUserCannotReopenARegionForWriting)
{
    if (::geteuid() != 0)
        GTEST_SKIP() << "not root, so there is nobody else to be";
    Daemon daemon;
    const GuestDescriptors all(daemon);
    const Fd open_to_all = memory_file(page);
    ASSERT_EQ(::fchmod(open_to_all.get(), 0666), 0);
    ASSERT_EQ(reopened_by_nobody(open_to_all), 0) << "the test itself";
    for (const Fd *fd : {&all.of_guest[0], &all.of_guest[1], &all.of_ring[0], &all.of_ring[1], &all.of_device[0],
                         &all.of_device[1], &all.of_device[2]})
        EXPECT_EQ(reopened_by_nobody(*fd), EACCES) << name_of(*fd);
}

// ---- the command ring -----------------------------------------------------------------------------------------------

class ServiceCommand : public testing::Test
{
  protected:
    int map(std::uint64_t iova, std::uint64_t length, std::uint64_t oa, std::uint32_t flags = read_write)
    {
        return guest.run(map_command(guest.ioas, iova, length, oa, flags));
    }
    int unmap(std::uint64_t iova, std::uint64_t length, std::uint32_t flags = 0)
    {
        return guest.run(unmap_command(guest.ioas, iova, length, flags));
    }

    Daemon daemon;
    TrackedGuest guest{daemon};
    static constexpr std::uint64_t mapped = TrackedGuest::pages * page; // [0, mapped) at OA 0
    static constexpr std::uint64_t space = 1ull << 32;
};

TEST_F(ServiceCommand, WantsFieldsThatItKnows)
{
    for (const std::uint32_t opcode : {0u, 6u, UINT32_MAX}) {
        dr_command c = sync_command(guest.hwpt, 1);
        c.opcode = opcode;
        EXPECT_EQ(guest.run(c), -EINVAL) << "opcode " << opcode;
    }
    for (const dr_opcode opcode : {DR_OP_MAP, DR_OP_UNMAP, DR_OP_SYNC, DR_OP_ENABLE, DR_OP_DISABLE}) {
        for (const unsigned bit : {6u, 31u}) {
            dr_command c = map_command(guest.ioas, mapped, page, 0);
            c.opcode = opcode;
            c.flags = 1u << bit;
            EXPECT_EQ(guest.run(c), -EINVAL) << "opcode " << opcode << " flag " << bit;
        }
        dr_command c = map_command(guest.ioas, mapped, page, 0);
        c.opcode = opcode;
        c.leaf_lg2 = 12;
        EXPECT_EQ(guest.run(c), -EINVAL) << "opcode " << opcode;
        c.leaf_lg2 = 0;
        c.reserved = 1;
        EXPECT_EQ(guest.run(c), -EINVAL) << "opcode " << opcode;
    }
}

TEST_F(ServiceCommand, OnARangeWantsWholePages)
{
    EXPECT_EQ(map(mapped + 1, page, 0), -EINVAL);
    EXPECT_EQ(map(mapped, page + 1, 0), -EINVAL);
    EXPECT_EQ(map(mapped, page, 1), -EINVAL);
    EXPECT_EQ(map(mapped, 0, 0), -EINVAL);
    EXPECT_EQ(unmap(1, page), -EINVAL);
    EXPECT_EQ(unmap(0, page - 1), -EINVAL);
    EXPECT_EQ(unmap(0, 0), -EINVAL);
    EXPECT_EQ(unmap(0, mapped, DR_UNMAP_DEFERRED | DR_UNMAP_DISCARD), -EINVAL);
}

TEST_F(ServiceCommand, OnAnObjectThatIsNotThere)
{
    for (const std::uint32_t object : {0u, guest.hwpt, 999u}) {
        EXPECT_EQ(guest.run(map_command(object, mapped, page, 0)), -ENOENT);
        EXPECT_EQ(guest.run(unmap_command(object, 0, mapped)), -ENOENT);
    }
    for (const std::uint32_t object : {0u, guest.ioas, 999u}) {
        for (const dr_opcode opcode : {DR_OP_SYNC, DR_OP_ENABLE, DR_OP_DISABLE})
            EXPECT_EQ(guest.run(command(opcode, object)), -ENOENT);
    }
}

TEST_F(ServiceCommand, OutsideTheSpace)
{
    EXPECT_EQ(map(space, page, 0), -ERANGE);
    EXPECT_EQ(map(space - page, 2 * page, 0), -ERANGE);
    EXPECT_EQ(map(mapped, ~0ull << 12, 0), -ERANGE);
    EXPECT_EQ(map(~0ull << 12, page, 0), -ERANGE);
    EXPECT_EQ(unmap(space, page), -ERANGE);
    EXPECT_EQ(unmap(space - page, 2 * page), -ERANGE);
    EXPECT_EQ(unmap(space, UINT64_MAX), -ERANGE);
    EXPECT_EQ(map(space - page, page, 0), 0);
}

TEST_F(ServiceCommand, MapsWhereNothingIsMapped)
{
    EXPECT_EQ(map(0, page, 0), -EEXIST);
    EXPECT_EQ(map(mapped - page, 2 * page, 0), -EEXIST);
    EXPECT_EQ(map(mapped - page, page, mapped - page, read_write | DR_MAP_IDEMPOTENT), 0);
    EXPECT_EQ(map(0, page, page, read_write | DR_MAP_IDEMPOTENT), -EEXIST);
    EXPECT_EQ(map(0, page, 0, DR_MAP_READ | DR_MAP_IDEMPOTENT), -EEXIST);
    EXPECT_EQ(map(mapped - page, 2 * page, mapped - page, read_write | DR_MAP_IDEMPOTENT), -EFAULT);
}

TEST_F(ServiceCommand, MapsTheGuestsMemoryOnly)
{
    EXPECT_EQ(map(mapped, page, mapped), -EFAULT);
    EXPECT_EQ(map(mapped, 2 * page, mapped - page), -EFAULT);
    EXPECT_EQ(map(mapped, page, ~0ull << 12), -EFAULT);
    EXPECT_EQ(map(mapped, mapped + page, 0), -EFAULT);
}

// Memory may lie below 2^52, entries of SMMUv3 name addresses below 2^48.
TEST_F(ServiceCommand, MapsWhatTheFormatCanName)
{
    for (const dr_format format : {DR_FORMAT_AMDV1, DR_FORMAT_SMMUV3_S2}) {
        TrackedGuest high(daemon, [&](auto &r) { r.format = format; });
        constexpr std::uint64_t limit = 1ull << 48;
        high.add_memory(limit - page, 2 * page, memory_file(2 * page));
        EXPECT_EQ(high.run(map_command(high.ioas, mapped, page, limit - page)), 0);
        const int beyond = format == DR_FORMAT_AMDV1 ? 0 : -EFAULT;
        EXPECT_EQ(high.run(map_command(high.ioas, mapped + page, page, limit)), beyond);
    }
}

TEST_F(ServiceCommand, UnmapsWholeMaps)
{
    EXPECT_EQ(unmap(mapped, page), -ENOENT);
    EXPECT_EQ(unmap(mapped, page, DR_UNMAP_EMPTY_OK), 0);
    EXPECT_EQ(unmap(0, page), -ENOENT);
    EXPECT_EQ(unmap(page, mapped), -ENOENT);
    EXPECT_EQ(unmap(page, mapped, DR_UNMAP_EMPTY_OK), -ENOENT);
    EXPECT_EQ(unmap(0, UINT64_MAX), 0);
    EXPECT_EQ(guest.last.done, space);
    EXPECT_NE(guest.last.epoch, 0u);
}

TEST_F(ServiceCommand, MapsWantAnHwpt)
{
    const std::uint32_t bare = guest.get<dr_object>(DR_IOAS_ALLOC, dr_empty{}).id;
    EXPECT_EQ(guest.run(map_command(bare, 0, page, 0)), -ENOSPC);
    EXPECT_EQ(guest.run(unmap_command(bare, 0, page)), -ENOENT);
    EXPECT_EQ(guest.run(unmap_command(bare, 0, page, DR_UNMAP_EMPTY_OK)), 0);
}

TEST_F(ServiceCommand, TracksAlready)
{
    EXPECT_EQ(guest.run(command(DR_OP_ENABLE, guest.hwpt)), -EALREADY);
    EXPECT_EQ(guest.run(command(DR_OP_DISABLE, guest.hwpt)), 0);
    EXPECT_EQ(guest.run(command(DR_OP_DISABLE, guest.hwpt)), -EALREADY);
    EXPECT_EQ(guest.run(command(DR_OP_ENABLE, guest.hwpt)), 0);
}

TEST_F(ServiceCommand, WithoutDirtyTracking)
{
    TrackedGuest untracked(daemon, [](auto &r) { r.flags = 0; });
    EXPECT_EQ(untracked.run(command(DR_OP_ENABLE, untracked.hwpt)), -EOPNOTSUPP);
    EXPECT_EQ(untracked.run(sync_command(untracked.hwpt, 1)), -EOPNOTSUPP);
    EXPECT_EQ(untracked.run(unmap_command(untracked.ioas, 0, mapped)), 0);
}

TEST_F(ServiceCommand, CookiesHave44Bits)
{
    const RawRing ring = guest.ring(guest.hwpt);
    EXPECT_EQ(guest.run(sync_command(guest.hwpt, 1ull << DR_PAYLOAD_BITS)), -EINVAL);
    EXPECT_EQ(guest.run(sync_command(guest.hwpt, (1ull << DR_PAYLOAD_BITS) - 1)), 0);
    EXPECT_THAT(ring.take(), ElementsAre(dr_marker(DR_MARKER_SYNC, (1ull << DR_PAYLOAD_BITS) - 1)));
}

TEST_F(ServiceCommand, AnUnmapThatMeetsAFullRingSaysHowFarItCame)
{
    TrackedGuest small(daemon, [](auto &r) { r.ring_entries = DR_CAPACITY_MIN; });
    const RawRing ring = small.ring(small.hwpt);
    const Device device = small.attach();
    EXPECT_EQ(small.run(unmap_command(small.ioas, 0, mapped)), 0);
    (void)ring.take();
    for (std::uint64_t p = 0; p < 16; ++p) // pages apart: an entry each
        EXPECT_EQ(small.run(map_command(small.ioas, 2 * p * page, page, p * page)), 0);
    for (std::uint64_t p = 0; p < 16; ++p)
        dma_write(device, 2 * p * page);

    std::set<std::uint64_t> reported;
    std::uint64_t from = 0;
    int again = 0;
    int result = 0;
    do {
        result = small.run(unmap_command(small.ioas, from, 32 * page - from));
        from += small.last.done;
        for (const std::uint64_t entry : ring.take()) {
            if (!dr_is_marker(entry))
                reported.insert(dr_run_address(entry) / page / 2);
        }
    } while (result == -EAGAIN && ++again < 100);
    EXPECT_EQ(result, 0);
    EXPECT_GT(again, 0);
    EXPECT_EQ(from, 32 * page);
    EXPECT_EQ(reported.size(), 16u);
}

TEST_F(ServiceCommand, GarbageIsAnsweredAndHarmsNobody)
{
    Vm bystander(daemon);
    std::mt19937_64 random(2);
    for (int i = 0; i < 2000; ++i) {
        dr_command c{};
        auto *words = reinterpret_cast<std::uint64_t *>(&c);
        for (std::size_t w = 0; w < sizeof c / 8; ++w)
            words[w] = random();
        // Half of them differ from valid ones in a field or two.
        if (i % 2 != 0) {
            const dr_command noise = c;
            c = map_command(random() % 4, random() % 512 * page, random() % 64 * page, random() % 256 * page,
                            random() % 64);
            c.opcode = static_cast<std::uint32_t>(random() % 7);
            if (random() % 4 == 0)
                c.iova = noise.iova;
            if (random() % 4 == 0)
                c.length = noise.length;
        }
        EXPECT_LE(guest.run(c), 0);
    }
    bystander.expect_tracks();
}

// Capacity 4, so that it is soon full.
class ServiceCommandRing : public testing::Test
{
  protected:
    void submit_unknown(std::uint64_t user_data)
    {
        dr_command c{};
        c.user_data = user_data;
        guest.submit(c);
    }
    void expect_cpu_left()
    {
        const std::int64_t before = daemon.process().cpu_time();
        std::this_thread::sleep_for(2s);
        EXPECT_LT(daemon.process().cpu_time() - before, ::sysconf(_SC_CLK_TCK) / 5) << "the service spins";
    }

    Daemon daemon;
    Vm bystander{daemon};
    RawGuest guest{daemon, 4};
};

TEST_F(ServiceCommandRing, WhoseCompletionsNobodyTakesTakesNoMoreThanFit)
{
    for (std::uint64_t i = 0; i < 4; ++i)
        submit_unknown(i);
    EXPECT_TRUE(comes_true([&] { return guest.taken() == 4; }));
    for (std::uint64_t i = 4; i < 8; ++i)
        submit_unknown(i);
    walker_goes_round(daemon);
    EXPECT_EQ(guest.taken(), 4u);
    bystander.expect_tracks();
    for (std::uint64_t i = 0; i < 8; ++i) {
        const dr_completion completion = guest.next_completion();
        EXPECT_EQ(completion.user_data, i);
        EXPECT_EQ(completion.result, -EINVAL);
    }
}

TEST_F(ServiceCommandRing, WithAHeadBeyondItsCapacityIsDead)
{
    for (const std::uint64_t head : {5ull, 1ull << 63, ~0ull}) {
        RawGuest hostile(daemon, 4);
        std::atomic_ref(hostile.submission_region().head).store(head, std::memory_order_seq_cst);
        hostile.ring_bell();
        walker_goes_round(daemon);
        EXPECT_EQ(hostile.taken(), 0u);
        std::atomic_ref(hostile.submission_region().head).store(1, std::memory_order_seq_cst);
        hostile.ring_bell();
        walker_goes_round(daemon);
        EXPECT_EQ(hostile.taken(), 0u) << "no command is taken any more";
    }
    bystander.expect_tracks();
}

TEST_F(ServiceCommandRing, ThatIsDeadCostsNoTime)
{
    std::atomic_ref(guest.submission_region().head).store(1ull << 40, std::memory_order_seq_cst);
    guest.ring_bell();
    walker_goes_round(daemon);
    expect_cpu_left();
    bystander.expect_tracks();
}

TEST_F(ServiceCommandRing, WithAHeadThatGoesBackIsDeadToItsOwnGuestOnly)
{
    submit_unknown(1);
    guest.next_completion();
    std::atomic_ref(guest.submission_region().head).store(0, std::memory_order_seq_cst);
    guest.ring_bell();
    walker_goes_round(daemon);
    EXPECT_EQ(guest.taken(), 1u);
    bystander.expect_tracks();
}

TEST_F(ServiceCommandRing, WithATailThatLiesGetsNoMoreThanFits)
{
    for (std::uint64_t i = 0; i < 4; ++i)
        submit_unknown(i);
    EXPECT_TRUE(comes_true([&] { return guest.taken() == 4; }));
    auto tail = std::atomic_ref(guest.completion_consumer().tail);
    for (const std::uint64_t lie : {5ull, ~0ull, 1ull << 63}) {
        tail.store(lie, std::memory_order_seq_cst);
        submit_unknown(4);
        walker_goes_round(daemon);
        EXPECT_EQ(guest.taken(), 4u);
    }
    tail.store(2, std::memory_order_seq_cst);
    guest.ring_bell();
    EXPECT_TRUE(comes_true([&] { return guest.taken() == 6; }));
    tail.store(0, std::memory_order_seq_cst); // backwards: 2 stands
    guest.ring_bell();
    walker_goes_round(daemon);
    EXPECT_EQ(guest.taken(), 6u);
    bystander.expect_tracks();
}

TEST_F(ServiceCommandRing, WithHolesInItsMemoryHarmsItsOwnGuestOnly)
{
    submit_unknown(1);
    guest.next_completion();
    ASSERT_EQ(::fallocate(guest.front_end_fd.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 1 << 20), 0);
    guest.ring_bell();
    walker_goes_round(daemon);
    bystander.expect_tracks();
}

TEST_F(ServiceCommandRing, WithEventfdsThatBlockHoldsUpNobody)
{
    for (const Fd *fd : {&guest.kick, &guest.call_event})
        ::fcntl(fd->get(), F_SETFL, ::fcntl(fd->get(), F_GETFL) & ~O_NONBLOCK);
    ASSERT_EQ(::eventfd_write(guest.call_event.get(), UINT64_MAX - 1), 0);
    guest.completion_consumer().armed = 1;
    for (std::uint64_t i = 0; i < 4; ++i)
        guest.submissions->put(i, dr_command{});
    guest.submissions->stage(4);
    (void)guest.submissions->publish();
    ASSERT_EQ(::eventfd_write(guest.kick.get(), UINT64_MAX - 2), 0); // the kick, and all but one of what it can count
    EXPECT_TRUE(comes_true([&] { return guest.taken() == 4; }));
    bystander.expect_tracks();
}

// ---- the dirty ring -------------------------------------------------------------------------------------------------

class ServiceDirtyRing : public testing::Test
{
  protected:
    // Takes entries until the marker of a sync that begins now.
    std::set<std::uint64_t> sync()
    {
        static std::uint64_t cookie = 1000;
        guest.submit(sync_command(guest.hwpt, ++cookie));
        std::vector<std::uint64_t> all;
        EXPECT_TRUE(comes_true([&] {
            const auto more = ring.take();
            all.insert(all.end(), more.begin(), more.end());
            return std::find(all.begin(), all.end(), dr_marker(DR_MARKER_SYNC, cookie)) != all.end();
        }));
        EXPECT_EQ(guest.next_completion().result, 0);
        return pages_of(all);
    }
    void write_apart(std::uint64_t first, std::uint64_t step, std::set<std::uint64_t> &written)
    {
        for (std::uint64_t p = first; p < TrackedGuest::pages; p += step) {
            dma_write(device, p * page);
            written.insert(p);
        }
    }

    Daemon daemon;
    Vm bystander{daemon};
    TrackedGuest guest{daemon, [](auto &r) { r.ring_entries = 16; }};
    RawRing ring = guest.ring(guest.hwpt);
    Device device = guest.attach();
};

TEST_F(ServiceDirtyRing, WhoseTailLiesKeepsTheLastGoodOne)
{
    std::set<std::uint64_t> written;
    write_apart(0, 2, written);
    EXPECT_TRUE(comes_true([&] { return ring.head() > 0; }));
    const std::uint64_t good = ring.tail();
    for (const std::uint64_t lie : {good + 1000, good - 1, std::uint64_t{1} << 63, UINT64_MAX}) {
        ring.set_tail(lie);
        bystander.expect_tracks();
        EXPECT_LE(ring.head(), good + 16);
        ring.set_tail(good);
    }
    EXPECT_THAT(sync(), IsSupersetOf(written));
}

TEST_F(ServiceDirtyRing, WhoseTailGoesBackKeepsTheLastGoodOne)
{
    std::set<std::uint64_t> written;
    write_apart(0, 2, written);
    EXPECT_THAT(sync(), IsSupersetOf(written));
    const std::uint64_t good = ring.tail();
    ring.set_tail(good - 1);
    bystander.expect_tracks();
    ring.set_tail(good);
    write_apart(0, 2, written);
    EXPECT_THAT(sync(), IsSupersetOf(written));
}

TEST_F(ServiceDirtyRing, WhoseConsumerNeverReleasesGrowsNothingAndLosesNothing)
{
    std::set<std::uint64_t> written;
    const auto churn = [&] {
        for (int i = 0; i < 200; ++i) {
            write_apart(0, 2, written);
            write_apart(0, 3, written);
        }
        bystander.expect_tracks();
    };
    churn();
    const std::int64_t before = daemon.process().resident();
    for (int i = 0; i < 10; ++i)
        churn();
    if (!daemon.process().instrumented()) {
        EXPECT_LT(daemon.process().resident() - before, 1024) << "kB";
    }
    EXPECT_LE(ring.head(), 16u);
    EXPECT_THAT(sync(), IsSupersetOf(written));
}

TEST_F(ServiceDirtyRing, ThatIsFullCostsNoTime)
{
    std::set<std::uint64_t> written;
    write_apart(0, 2, written);
    guest.submit(sync_command(guest.hwpt, 1)); // waits for room
    bystander.expect_tracks();
    const std::int64_t before = daemon.process().cpu_time();
    std::this_thread::sleep_for(2s);
    EXPECT_LT(daemon.process().cpu_time() - before, ::sysconf(_SC_CLK_TCK) / 5);
}

TEST_F(ServiceDirtyRing, WhoseCallBlocksHoldsUpNobody)
{
    ::fcntl(ring.call.get(), F_SETFL, ::fcntl(ring.call.get(), F_GETFL) & ~O_NONBLOCK);
    ASSERT_EQ(::eventfd_write(ring.call.get(), UINT64_MAX - 1), 0);
    std::set<std::uint64_t> written;
    for (int i = 0; i < 4; ++i) {
        ring.consumer().armed = ring.head() + 1;
        write_apart(0, 2, written);
        EXPECT_THAT(sync(), IsSupersetOf(written));
    }
    bystander.expect_tracks();
}

} // namespace
} // namespace dirtyring::test
