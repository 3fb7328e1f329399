// dirtyringd --supervise whose worker is killed: who had something in the service has it again, once.
#include "iommu/rules.hpp"
#include "tests/service/service_peers.hpp"
#include "tests/service/supervised.hpp"

#include <linux/kcmp.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <thread>

namespace dirtyring::test {
namespace {

using testing::HasSubstr;

// Peers that repeat a request when the service dies before it replies.
class RawGuestThatRepeats : public Peer
{
  public:
    explicit RawGuestThatRepeats(const Daemon &daemon) : Peer(daemon), daemon_(daemon)
    {
        hello();
        enter();
    }
    template <class T> Reply ask(dr_request request, const T &payload, const std::vector<int> &fds = {})
    {
        const std::uint32_t number = next_sequence();
        for (;;) {
            Reply reply = call_bytes_as(number, request, payload_of(payload), fds);
            if (!reply.closed)
                return reply;
            creation_.flags = DR_GUEST_TAKE;
            if (!enter() && request == DR_GUEST_DESTROY)
                return reply;
        }
    }
    dr_guest info{};

  private:
    // False: there is no such guest.
    bool enter()
    {
        for (;; reconnect(daemon_)) {
            const Reply reply = call(DR_GUEST_CREATE, creation_);
            if (reply.closed)
                continue;
            if (reply.error() == 0)
                info = reply.as<dr_guest>();
            return reply.error() == 0;
        }
    }

    const Daemon &daemon_;
    dr_guest_create creation_ = new_guest(64);
};

class DeviceThatRepeats : public Peer
{
  public:
    DeviceThatRepeats(const Daemon &daemon, const dr_device_attach &request)
        : Peer(daemon), daemon_(daemon), request_(request)
    {
        hello();
        enter();
    }
    template <class T> void ask(dr_request request, const T &payload)
    {
        while (call(request, payload).closed)
            enter();
    }

  private:
    void enter()
    {
        Reply reply;
        while ((reply = call(DR_DEVICE_ATTACH, request_)).closed)
            reconnect(daemon_);
        expect_done(reply);
    }

    const Daemon &daemon_;
    dr_device_attach request_;
};

ino_t inode(const Fd &fd)
{
    struct stat status {
    };
    need(::fstat(fd.get(), &status), "fstat");
    return status.st_ino;
}

dr_guest_create lingering(std::uint32_t ms)
{
    dr_guest_create request = new_guest(64);
    request.linger_ms = ms;
    return request;
}

// What it had is there: a page is written through a device that attaches now, and reported.
void expect_tracks(TrackedGuest &guest, const RawRing &ring, const Device &device, std::uint64_t p)
{
    static std::uint64_t cookie = 0;
    dma_write(device, p * page);
    guest.submit(sync_command(guest.hwpt, ++cookie));
    std::set<std::uint64_t> reported;
    const std::uint64_t marker = dr_marker(DR_MARKER_SYNC, cookie);
    EXPECT_TRUE(comes_true([&] {
        const auto entries = ring.take();
        reported.merge(pages_of(entries));
        return std::count(entries.begin(), entries.end(), marker) > 0;
    })) << "a sync hangs";
    EXPECT_EQ(guest.next_completion().result, 0);
    EXPECT_THAT(reported, testing::Contains(p));
}

// ---- a front-end ----------------------------------------------------------------------------------------------------

TEST(ServiceRestart, AFrontEndHasItsGuestAgain)
{
    Supervised daemon;
    TrackedGuest guest(daemon);
    const RawRing ring = guest.ring(guest.hwpt);
    expect_tracks(guest, ring, guest.attach(), 3);
    const std::uint64_t session = ring.producer().session;
    const Bytes token = bytes_of(guest.info.token);

    daemon.kill_worker();
    EXPECT_TRUE(guest.hung_up());
    guest.take_again(daemon);
    EXPECT_EQ(bytes_of(guest.info.token), token);
    EXPECT_EQ(guest.info.command_entries, 64u);
    const RawRing again = guest.ring(guest.hwpt);
    EXPECT_EQ(inode(again.producer_fd), inode(ring.producer_fd));
    EXPECT_EQ(inode(again.consumer_fd), inode(ring.consumer_fd));
    EXPECT_EQ(ring.producer().session, session + 1);
    EXPECT_EQ(guest.run(map_command(guest.ioas, 0, page, 0)), -EEXIST) << "its maps are there";
    EXPECT_EQ(guest.run(map_command(guest.ioas, 1ull << 30, page, 0)), 0);
    expect_tracks(guest, ring, guest.attach(), 5);
    EXPECT_THAT(daemon.said(), HasSubstr("took up 1 guests, 1 hwpts, 0 devices"));
}

TEST(ServiceRestart, ManyTimesOver)
{
    Supervised daemon({"--walkers", "2"});
    TrackedGuest guest(daemon, [](auto &r) { r.shards = 4; });
    const RawRing ring = guest.ring(guest.hwpt);
    for (std::uint64_t i = 1; i <= 3; ++i) {
        daemon.kill_worker();
        guest.take_again(daemon);
        EXPECT_EQ(ring.producer().session, i);
    }
    guest.close();
    daemon.expect_empty_store();
}

// Each request once more after the worker has died, as a front-end does that got no reply.
TEST(ServiceRestart, ARequestThatWasDoneIsNotDoneAgain)
{
    Supervised daemon;
    RawGuest guest(daemon);
    const auto again = [&](dr_request request, auto payload, const std::vector<int> &fds = {}) {
        const std::uint32_t sequence = guest.sequence() + 1;
        const Reply first = guest.call(request, payload, fds);
        expect_done(first);
        daemon.kill_worker();
        guest.take_again(daemon);
        EXPECT_EQ(guest.info.sequence, sequence);
        Reply second = guest.call_bytes_as(sequence, request, payload_of(payload), fds);
        expect_done(second);
        EXPECT_EQ(first.payload, second.payload);
        return second;
    };
    const Fd memory = memory_file(2 * page);
    again(DR_MEMORY_ADD, dr_memory_region{0, 0, 0, page, 0}, {memory.get()});
    const auto ioas = again(DR_IOAS_ALLOC, dr_empty{}).as<dr_object>().id;
    const auto hwpt = again(DR_HWPT_ALLOC, RawGuest::hwpt_request(ioas)).as<dr_hwpt>().id;
    const auto other = guest.get<dr_object>(DR_IOAS_ALLOC, dr_empty{}).id;
    EXPECT_EQ(std::set({ioas, hwpt, other}).size(), 3u);
    expect_refused(guest.call(DR_HWPT_ALLOC, RawGuest::hwpt_request(ioas)), EBUSY);
    expect_refused(guest.call(DR_MEMORY_ADD, dr_memory_region{0, 0, 0, page, 0}, {memory.get()}), EEXIST);

    again(DR_DESTROY, dr_object{0, hwpt});
    expect_refused(guest.call(DR_DESTROY, dr_object{0, hwpt}), ENOENT);
    again(DR_DESTROY, dr_object{0, other});
    EXPECT_EQ(guest.run(map_command(ioas, 0, page, 0)), -ENOSPC) << "an ioas without hwpt";
    guest.close();
    daemon.expect_empty_store();
}

TEST(ServiceRestart, TheSameMemfdForTwoRegionsIsKeptTwice)
{
    Supervised daemon;
    RawGuest guest(daemon);
    const Fd memory = memory_file(2 * page);
    guest.get<dr_empty>(DR_MEMORY_ADD, dr_memory_region{0, 0, 0, page, 0}, {memory.get()});
    guest.get<dr_empty>(DR_MEMORY_ADD, dr_memory_region{0, 0, page, page, page}, {memory.get()});
    daemon.kill_worker(); // nothing is on its way to the supervisor any more
    const std::vector<int> held = daemon.numbers("guest-memory");
    ASSERT_EQ(held.size(), 2u);
    const auto supervisor = daemon.process().pid();
    EXPECT_GT(::syscall(SYS_kcmp, supervisor, supervisor, KCMP_FILE, held[0], held[1]), 0)
        << "one open file description: systemd would keep but one";
    guest.take_again(daemon);
    EXPECT_THAT(daemon.said(), Not(HasSubstr("is dropped")));
}

TEST(ServiceRestart, OnlyWhoHasTheSecretTakesAGuest)
{
    Supervised daemon;
    TrackedGuest guest(daemon);
    daemon.kill_worker();
    Peer other(daemon);
    other.hello();
    dr_guest_create wrong = guest.created;
    wrong.secret[3] ^= 1;
    wrong.flags = DR_GUEST_TAKE;
    expect_refused(other.call(DR_GUEST_CREATE, wrong), ENOENT);
    std::memcpy(wrong.secret, guest.info.token, sizeof wrong.secret);
    expect_refused(other.call(DR_GUEST_CREATE, wrong), ENOENT);
    guest.take_again(daemon);
}

// What one of its rings was left with makes no sense; the other one tells its consumer.
TEST(ServiceRestart, AGuestThatCannotBeTakenUpIsAllDirty)
{
    Supervised daemon;
    TrackedGuest guest(daemon, [](dr_hwpt_alloc &request) { request.shards = 2; });
    const std::array rings{guest.ring(guest.hwpt, 0), guest.ring(guest.hwpt, 1)};
    daemon.kill_worker(); // the supervisor has everything
    guest.take_again(daemon);
    std::uint64_t calls = 0;
    (void)!::read(rings[1].call.get(), &calls, sizeof calls);
    daemon.kill_worker_and([&] {
        unsigned broken = 0;
        for (const int number : daemon.numbers("dirtyring-producer")) {
            const Fd region(need(
                ::open((daemon.process().proc("fd/") + std::to_string(number)).c_str(), O_RDWR | O_CLOEXEC), "a ring"));
            Mapping map;
            ASSERT_EQ(map.map(region.get(), DR_PAGE, PROT_READ | PROT_WRITE), 0);
            auto *producer = map.as<dr_ring_producer>();
            if (producer->header.start != 0)
                continue;
            producer->staged = producer->head + producer->header.capacity + 1;
            ++broken;
        }
        ASSERT_EQ(broken, 1u);
    });
    EXPECT_THAT(daemon.said(), HasSubstr("guest 1 is dropped, all it had is dirty in 2 rings: ring 0 of its hwpt"));
    for (const RawRing &ring : rings)
        EXPECT_THAT(ring.take(), testing::Contains(dr_marker(DR_MARKER_ALL_DIRTY, 0)));
    EXPECT_EQ(::read(rings[1].call.get(), &calls, sizeof calls), 8) << "nobody was called";
    guest.reconnect(daemon);
    dr_guest_create again = guest.created;
    again.flags = DR_GUEST_TAKE;
    expect_refused(guest.call(DR_GUEST_CREATE, again), ENOENT);
    daemon.expect_empty_store();
}

TEST(ServiceRestart, AGuestWhoseVmmDiesWhileNoWorkerLivesIsFreed)
{
    Supervised daemon;
    int ends[2];
    need(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), "socketpair");
    const Fd ours(ends[0]);
    const pid_t vmm = need(::fork(), "fork");
    if (vmm == 0) {
        ::prctl(PR_SET_PDEATHSIG, SIGKILL);
        const TrackedGuest guest(daemon);
        (void)!::write(ends[1], "x", 1);
        ::pause();
        ::_exit(0);
    }
    char word = 0;
    EXPECT_EQ(::read(ours.get(), &word, 1), 1);
    ::close(ends[1]);
    daemon.kill_worker();
    EXPECT_TRUE(daemon.holds_something());
    daemon.kill_worker_and([&] {
        ::kill(vmm, SIGKILL);
        ::waitpid(vmm, nullptr, 0);
    });
    EXPECT_EQ(count(daemon.said(), "took up 1 guests"), 2u) << daemon.said();
    daemon.expect_empty_store();
}

// ---- successors without a death -------------------------------------------------------------------------------------

TEST(ServiceTakeOver, TheOldFrontEndLosesItsConnectionAndNothingElse)
{
    Supervised daemon;
    TrackedGuest guest(daemon);
    const RawRing ring = guest.ring(guest.hwpt);
    Peer successor(daemon);
    successor.hello();
    dr_guest_create request = guest.created;
    request.flags = DR_GUEST_TAKE;
    const auto info = successor.get<dr_guest>(DR_GUEST_CREATE, request);
    EXPECT_EQ(bytes_of(info.token), bytes_of(guest.info.token));
    EXPECT_TRUE(guest.hung_up());
    expect_tracks(guest, ring, guest.attach(), 1);
    daemon.kill_worker();
    EXPECT_TRUE(successor.hung_up());
    guest.take_again(daemon);
    expect_tracks(guest, ring, guest.attach(), 2);
}

TEST(ServiceTakeOver, WhoWasReplacedIsNotTakenForOneWhoseConnectionBroke)
{
    Supervised daemon;
    TrackedGuest guest(daemon, lingering(60'000));
    const auto comes_again = [&] {
        Peer peer(daemon);
        peer.hello();
        dr_guest_create request = guest.created;
        request.flags = DR_GUEST_AGAIN;
        return peer.call(DR_GUEST_CREATE, request).error();
    };
    EXPECT_EQ(comes_again(), 0);
    const pid_t successor = ::fork();
    if (successor == 0) {
        Peer peer(daemon);
        peer.hello();
        dr_guest_create request = guest.created;
        request.flags = DR_GUEST_TAKE;
        static_cast<void>(peer.call(DR_GUEST_CREATE, request));
        ::_exit(testing::Test::HasFailure() ? 1 : 0);
    }
    int status = 1;
    ASSERT_EQ(::waitpid(successor, &status, 0), successor);
    ASSERT_EQ(status, 0);
    EXPECT_EQ(comes_again(), EBUSY);
}

TEST(ServiceTakeOver, ASuccessorInTimeFindsTheGuestOneTooLateDoesNot)
{
    Supervised daemon;
    TrackedGuest guest(daemon, lingering(60'000));
    const RawRing ring = guest.ring(guest.hwpt);
    guest.close();
    EXPECT_TRUE(comes_true([&] { return count(daemon.said(), "no front-end") == 1; }));
    guest.created.linger_ms = 1;
    guest.take_again(daemon);
    expect_tracks(guest, ring, guest.attach(), 1);

    guest.close();
    EXPECT_TRUE(comes_true([&] { return count(daemon.said(), "is gone") == 1; })) << daemon.said();
    Peer late(daemon);
    late.hello();
    expect_refused(late.call(DR_GUEST_CREATE, guest.created), ENOENT);
    daemon.expect_empty_store();
}

TEST(ServiceTakeOver, AGuestThatLingersLingersOnAfterARestart)
{
    Supervised daemon;
    TrackedGuest guest(daemon, lingering(60'000));
    guest.close();
    EXPECT_TRUE(comes_true([&] { return count(daemon.said(), "no front-end") == 1; }));
    daemon.kill_worker();
    EXPECT_EQ(count(daemon.said(), "no front-end"), 2u) << "though the process that had it lives";
    guest.take_again(daemon);
    guest.get<dr_empty>(DR_GUEST_DESTROY, dr_empty{});
    daemon.expect_empty_store();
}

TEST(ServiceGuestDestroy, FreesAGuestThatWouldLinger)
{
    Supervised daemon;
    TrackedGuest guest(daemon, lingering(60'000));
    const Device device = guest.attach();
    EXPECT_TRUE(daemon.holds_something());
    guest.get<dr_empty>(DR_GUEST_DESTROY, dr_empty{});
    daemon.expect_empty_store();
    expect_refused(guest.call(DR_IOAS_ALLOC, dr_empty{}), EPROTO);
    guest.created.flags = DR_GUEST_TAKE;
    expect_refused(guest.call(DR_GUEST_CREATE, guest.created), ENOENT);
    guest.created.flags = 0;
    expect_done(guest.call(DR_GUEST_CREATE, guest.created));
}

// ---- devices --------------------------------------------------------------------------------------------------------

TEST(ServiceRestart, ADeviceKeepsItsCellsAndDetaches)
{
    Supervised daemon;
    RawDevice device(daemon);
    const dr_device_attach request = device.request();
    std::vector<Fd> fds;
    const auto first = device.get<dr_device>(DR_DEVICE_ATTACH, request, {}, &fds);
    daemon.kill_worker();
    EXPECT_TRUE(device.hung_up());
    device.reconnect(daemon);
    std::vector<Fd> again;
    const auto second = device.get<dr_device>(DR_DEVICE_ATTACH, request, {}, &again);
    EXPECT_EQ(bytes_of(first), bytes_of(second));
    ASSERT_EQ(fds.size(), again.size());
    for (const std::size_t i : {0u, 1u, 2u, 4u}) // all but the doorbell: eventfds have one inode
        EXPECT_EQ(inode(fds[i]), inode(again[i])) << i;
    device.guest.take_again(daemon);
    expect_refused(device.guest.call(DR_DESTROY, dr_object{0, device.guest.hwpt}), EBUSY);
    device.get<dr_empty>(DR_DEVICE_DETACH, dr_empty{});
    expect_done(device.guest.call(DR_DESTROY, dr_object{0, device.guest.hwpt}));
    device.guest.close();
    daemon.expect_empty_store();
}

TEST(ServiceDeviceAgain, TheSameKeyIsTheSameDeviceOfTheSameProcess)
{
    Supervised daemon;
    RawDevice device(daemon);
    dr_device_attach request = device.request();
    const auto first = device.get<dr_device>(DR_DEVICE_ATTACH, request);
    Peer again(daemon);
    again.hello();
    EXPECT_EQ(again.get<dr_device>(DR_DEVICE_ATTACH, request).id, first.id);
    EXPECT_TRUE(device.hung_up()) << "one connection speaks for a device";
    Peer third(daemon);
    third.hello();
    dr_device_attach other = request;
    other.threads = 2;
    expect_refused(third.call(DR_DEVICE_ATTACH, other), EINVAL);
    ++request.key;
    EXPECT_NE(third.get<dr_device>(DR_DEVICE_ATTACH, request).id, first.id);

    const pid_t stranger = need(::fork(), "fork");
    if (stranger == 0) {
        --request.key;
        Peer peer(daemon);
        peer.hello();
        ::_exit(peer.call(DR_DEVICE_ATTACH, request).error());
    }
    int status = 0;
    need(::waitpid(stranger, &status, 0), "waitpid");
    EXPECT_EQ(WEXITSTATUS(status), EBUSY);
}

TEST(ServiceRestart, ADeviceThatDiesWhileNoWorkerLivesIsBuried)
{
    Supervised daemon;
    TrackedGuest guest(daemon);
    const RawRing ring = guest.ring(guest.hwpt);
    DeviceProcess device(daemon, guest.info.token, guest.hwpt, {7 * page});
    device.wait_inside();
    daemon.kill_worker_and([&] { device.kill(); });
    guest.take_again(daemon);
    std::set<std::uint64_t> reported;
    guest.submit(sync_command(guest.hwpt, 1));
    EXPECT_TRUE(comes_true([&] {
        const auto entries = ring.take();
        reported.merge(pages_of(entries));
        return std::count(entries.begin(), entries.end(), dr_marker(DR_MARKER_SYNC, 1)) > 0;
    })) << "the dead one is waited for";
    EXPECT_THAT(reported, testing::Contains(7u));
    EXPECT_TRUE(comes_true([&] { return guest.call(DR_DESTROY, dr_object{0, guest.hwpt}).error() == 0; }));
    guest.close();
    daemon.expect_empty_store();
}

TEST(ServiceStatus, NamesADeviceThatHoldsTheGuestUpUntilItGoesOn)
{
    Supervised daemon;
    dr_guest_create create = new_guest(64);
    create.stall_ms = 20;
    TrackedGuest guest(daemon, create);
    const auto &status = *guest.service_map.as<dr_guest_status>(DR_GUEST_STATUS_OFFSET);
    const auto since = [&] {
        return std::atomic_ref(const_cast<std::uint64_t &>(status.since)).load(std::memory_order_acquire);
    };
    DeviceProcess device(daemon, guest.info.token, guest.hwpt, {page});
    device.wait_inside();
    EXPECT_EQ(since(), 0u);
    guest.submit(sync_command(guest.hwpt, 1));
    EXPECT_TRUE(comes_true([&] { return since() != 0; }));
    EXPECT_EQ(status.pid, device.pid());
    pollfd call{guest.call_event.get(), POLLIN, 0};
    EXPECT_EQ(::poll(&call, 1, 10'000), 1) << "the guest is called";
    EXPECT_THAT(daemon.said(), HasSubstr(std::to_string(device.pid())));

    device.leave_section();
    EXPECT_TRUE(comes_true([&] { return since() == 0; }));
    EXPECT_EQ(guest.next_completion().result, 0);
}

TEST(ServiceStatus, IsClearedWhenTheDeviceIsKilled)
{
    Supervised daemon;
    dr_guest_create create = new_guest(64);
    create.stall_ms = 20;
    TrackedGuest guest(daemon, create);
    const auto &status = *guest.service_map.as<dr_guest_status>(DR_GUEST_STATUS_OFFSET);
    const auto since = [&] {
        return std::atomic_ref(const_cast<std::uint64_t &>(status.since)).load(std::memory_order_acquire);
    };
    DeviceProcess device(daemon, guest.info.token, guest.hwpt, {page});
    device.wait_inside();
    guest.submit(sync_command(guest.hwpt, 1));
    EXPECT_TRUE(comes_true([&] { return since() != 0; }));
    daemon.kill_worker();
    EXPECT_TRUE(comes_true([&] { return since() != 0; })) << "a worker after it finds out again";
    device.kill();
    EXPECT_TRUE(comes_true([&] { return since() == 0; }));
    EXPECT_EQ(guest.next_completion().result, 0);
}

// ---- deaths in the middle -------------------------------------------------------------------------------------------

class ServiceDeath : public testing::TestWithParam<const char *>
{
};
INSTANTIATE_TEST_SUITE_P(Points, ServiceDeath,
                         testing::Values("object_stored:1", "object_stored:2", "object_stored:3", "object_stored:4",
                                         "object_recorded:1", "object_recorded:2", "object_recorded:3",
                                         "object_recorded:4", "object_recorded:5", "object_forgotten:1",
                                         "object_forgotten:2", "object_forgotten:3", "object_forgotten:4"),
                         [](const auto &tested) {
                             std::string name = tested.param;
                             std::replace_if(
                                 name.begin(), name.end(), [](char c) { return c == '_' || c == ':'; }, 'X');
                             return name;
                         });

// A front-end and a device that repeat what got no reply come through, and nothing is there twice.
TEST_P(ServiceDeath, IsOverlooked)
{
    TemporaryDirectory directory;
    const std::string once = directory.path() + "/died";
    {
        Supervised daemon(
            {}, [&] { die_once_at(GetParam(), once); }, DIRTYRINGD_BREAKABLE_PATH);
        RawGuestThatRepeats guest(daemon);
        const Fd memory = memory_file(page);
        guest.ask(DR_MEMORY_ADD, dr_memory_region{0, 0, 0, page, 0}, {memory.get()});
        const auto ioas = guest.ask(DR_IOAS_ALLOC, dr_empty{}).as<dr_object>().id;
        const auto hwpt = guest.ask(DR_HWPT_ALLOC, RawGuest::hwpt_request(ioas)).as<dr_hwpt>().id;
        DeviceThatRepeats device(daemon, new_device(hwpt, guest.info.token));
        device.ask(DR_DEVICE_DETACH, dr_empty{});
        guest.ask(DR_DESTROY, dr_object{0, hwpt});
        guest.ask(DR_DESTROY, dr_object{0, ioas});
        EXPECT_EQ(guest.ask(DR_DESTROY, dr_object{0, ioas}).error(), ENOENT);
        guest.ask(DR_GUEST_DESTROY, dr_empty{});
        EXPECT_TRUE(comes_true([&] { return ::access(once.c_str(), F_OK) == 0; })) << "nobody died";
        daemon.wait_for_life(2);
        daemon.expect_empty_store();
    }
    ::unlink(once.c_str());
}

class ServiceDeathInRestart : public testing::TestWithParam<const char *>
{
};
INSTANTIATE_TEST_SUITE_P(Points, ServiceDeathInRestart,
                         testing::Values("restart_begun", "restart_locked", "restart_rebuilt"),
                         [](const auto &tested) { return std::string(tested.param + std::strlen("restart_")); });

TEST_P(ServiceDeathInRestart, IsOverlooked)
{
    TemporaryDirectory directory;
    const std::string once = directory.path() + "/died";
    {
        Supervised daemon(
            {}, [&] { die_once_at(GetParam(), once); }, DIRTYRINGD_BREAKABLE_PATH);
        TrackedGuest guest(daemon);
        const RawRing ring = guest.ring(guest.hwpt);
        daemon.kill_worker();
        EXPECT_EQ(::access(once.c_str(), F_OK), 0) << "nobody died";
        guest.take_again(daemon);
        expect_tracks(guest, ring, guest.attach(), 4);
        guest.close();
        daemon.expect_empty_store();
    }
    ::unlink(once.c_str());
}

// ---- capabilities ---------------------------------------------------------------------------------------------------

void optional(dr_hwpt_alloc &request)
{
    request.flags = DR_HWPT_DIRTY_OPTIONAL;
}

dr_device_attach unable(const TrackedGuest &guest)
{
    dr_device_attach request = new_device(guest.hwpt, guest.info.token);
    request.flags = 0;
    return request;
}

TEST(ServiceRestart, ADeviceThatCannotBeTrackedIsStillInTheWay)
{
    Supervised daemon;
    TrackedGuest guest(daemon, optional);
    const auto enable = [&] { return guest.run(command(DR_OP_ENABLE, guest.hwpt)); };
    const auto status = [&] { return guest.get<dr_hwpt_status>(DR_HWPT_STATUS, dr_object{0, guest.hwpt}); };
    const dr_device_attach request = unable(guest);
    DeviceThatRepeats device(daemon, request);
    daemon.kill_worker();
    guest.take_again(daemon);
    EXPECT_EQ(enable(), -ENODEV);
    const auto info = guest.get<dr_device_info>(DR_DEVICE_INFO, dr_object{0, 0});
    EXPECT_STREQ(info.name, request.name);
    EXPECT_EQ(info.formats, request.formats);
    EXPECT_EQ(status().in_the_way, info.id);
    device.ask(DR_DEVICE_DETACH, dr_empty{});
    EXPECT_EQ(enable(), 0);

    daemon.kill_worker();
    guest.take_again(daemon);
    EXPECT_EQ(status().flags, DR_TRACKING_SUPPORTED | DR_TRACKING_ENABLED);
    EXPECT_EQ(enable(), -EALREADY);
    Peer late(daemon);
    late.hello();
    expect_refused(late.call(DR_DEVICE_ATTACH, unable(guest)), EINVAL);
}

// The worker dies somewhere in the race of an ENABLE and an attach. Both ask again, and one of them wins.
TEST(ServiceRestart, OneOfEnableAndAttachWinsTheRaceThatADeathInterrupts)
{
    Supervised daemon;
    std::mt19937_64 random(1);
    for (int round = 0; round < 40; ++round) {
        std::this_thread::sleep_for(25ms); // or it would be an early death
        TrackedGuest guest(daemon, optional);
        const dr_device_attach request = unable(guest);
        Reply reply;
        Peer device(daemon);
        device.hello();
        std::thread attaching([&] {
            while ((reply = device.call(DR_DEVICE_ATTACH, request)).closed)
                device.reconnect(daemon);
        });
        guest.submit(command(DR_OP_ENABLE, guest.hwpt));
        std::this_thread::sleep_for(std::chrono::microseconds(random() % 1000));
        daemon.kill_worker();
        guest.take_again(daemon);
        const int enabled = guest.next_completion().result;
        attaching.join();
        const auto told = guest.get<dr_hwpt_status>(DR_HWPT_STATUS, dr_object{0, guest.hwpt});
        EXPECT_NE(enabled == 0, reply.error() == 0) << "ENABLE " << enabled << ", attach " << reply.error();
        EXPECT_EQ(told.flags, enabled == 0 ? DR_TRACKING_SUPPORTED | DR_TRACKING_ENABLED : 0);
        EXPECT_EQ(told.devices, enabled == 0 ? 0u : 1u);
    }
}

// ---- one worker -----------------------------------------------------------------------------------------------------

// Started with the record of the guest that `daemon` has.
class SecondWorker
{
  public:
    SecondWorker(const Supervised &daemon, const char *program, Rule rule)
    {
        const std::string held =
            daemon.process().proc("fd/") + std::to_string(daemon.numbers("dirtyring-private").at(0));
        const Fd record(need(::open(held.c_str(), O_RDWR | O_CLOEXEC), held));
        process.emplace(std::vector<std::string>{program, "--socket-path", directory_.path() + "/socket"}, [&] {
            ::dup2(record.get(), 3);
            break_rule(rule);
            ::setenv("LISTEN_FDS", "1", 1);
            ::setenv("LISTEN_FDNAMES", "P1", 1);
            ::setenv("LISTEN_PID", std::to_string(::getpid()).c_str(), 1);
        });
    }

  private:
    TemporaryDirectory directory_;

  public:
    std::optional<Process> process;
};

TEST(ServiceRestart, AWorkerRefusesAGuestThatAnotherOneHas)
{
    Supervised daemon;
    TrackedGuest guest(daemon);
    daemon.kill_worker();
    SecondWorker second(daemon, DIRTYRINGD_PATH, Rule::none);
    EXPECT_EQ(second.process->exit_code(), 1);
    EXPECT_THAT(second.process->said(),
                HasSubstr("process " + std::to_string(daemon.worker()) + " still serves guest 1"));
    guest.take_again(daemon);
    EXPECT_EQ(guest.run(map_command(guest.ioas, 0, page, 0)), -EEXIST);
}

TEST(ServiceRestart, AWorkerThatDoesNotLookAtTheLockDoesNot)
{
    Supervised daemon;
    TrackedGuest guest(daemon);
    daemon.kill_worker();
    SecondWorker second(daemon, DIRTYRINGD_BREAKABLE_PATH, Rule::no_lock);
    EXPECT_TRUE(comes_true([&] { return second.process->said().find("ready") != std::string::npos; }));
    second.process->signal(SIGTERM);
    EXPECT_EQ(second.process->exit_code(), 0);
}

} // namespace
} // namespace dirtyring::test
