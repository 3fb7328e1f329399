// libdirtyring and a service whose workers die: what was asked is answered once and done once, and what needs no worker
// goes on.
#include "tests/client/fake_service.hpp"

#include <array>
#include <memory>
#include <set>

namespace dirtyring::test {
namespace {

using testing::Each;
using testing::IsEmpty;
using testing::Not;
using testing::SizeIs;

using Vm = std::unique_ptr<dirtyring_vm, decltype(&dirtyring_close)>;
using Set = std::unique_ptr<dirtyring_set, decltype(&dirtyring_set_close)>;

std::uint64_t next_of(std::uint64_t &count)
{
    return ++count;
}

template <std::size_t n> std::string bytes(const std::uint8_t (&of)[n])
{
    return {reinterpret_cast<const char *>(of), n};
}

class ClientReconnect : public testing::Test
{
  protected:
    void SetUp() override
    {
        service.rings.emplace_back(8);
        service.listen();
    }

    void connect(const dirtyring_guest &attr = {})
    {
        dirtyring_vm *raw = nullptr;
        ASSERT_EQ(dirtyring_connect_guest(service.path.c_str(), &attr, &raw), 0) << dirtyring_error();
        vm.reset(raw);
    }

    // Another process, as it were, has the guest from now on.
    void succeed()
    {
        std::array<std::uint8_t, DR_TOKEN_BYTES> secret{};
        std::memcpy(secret.data(), dirtyring_secret(vm.get()), secret.size());
        dirtyring_leave(vm.release());
        dirtyring_vm *raw = nullptr;
        ASSERT_EQ(dirtyring_take(service.path.c_str(), secret.data(), &raw), 0) << dirtyring_error();
        vm.reset(raw);
    }

    Set open_set()
    {
        dirtyring_set *raw = nullptr;
        EXPECT_EQ(dirtyring_set_open(vm.get(), 1, &raw), 0) << dirtyring_error();
        return {raw, dirtyring_set_close};
    }

    int alloc()
    {
        std::uint32_t ioas = 0;
        return dirtyring_ioas_alloc(vm.get(), &ioas);
    }

    static std::vector<std::uint64_t> reaped(const Vm &of)
    {
        dr_completion completions[command_entries];
        const std::uint32_t n = dirtyring_reap(of.get(), completions, command_entries);
        std::vector<std::uint64_t> values;
        for (std::uint32_t i = 0; i < n; ++i)
            values.push_back(completions[i].user_data);
        return values;
    }

    // The entries of the next batch, which is released.
    static std::vector<std::uint64_t> next(const Set &set)
    {
        dirtyring_batch batch{};
        if (!dirtyring_set_peek(set.get(), &batch))
            return {};
        std::vector<std::uint64_t> entries(batch.entries, batch.entries + batch.count);
        dirtyring_set_release(set.get(), &batch);
        return entries;
    }

    // The next command, as soon as it is kicked in.
    dr_command await_command()
    {
        for (;;) {
            if (const auto commands = service.take_commands(); !commands.empty())
                return commands.at(0);
            if (!service.submissions->arm())
                continue;
            EXPECT_TRUE(readable(service.kick.get(), 10s));
            take_event(service.kick);
        }
    }

    [[nodiscard]] std::vector<std::uint32_t> sequences_of(std::uint32_t request) const
    {
        std::vector<std::uint32_t> found;
        for (std::size_t i = 0; i < service.requests.size(); ++i) {
            if (service.requests[i] == request)
                found.push_back(service.sequences[i]);
        }
        return found;
    }

    FakeService service;
    Vm vm{nullptr, dirtyring_close};
};

// ---- requests

struct Case {
    const char *name;
    std::uint32_t request;
    int (*ask)(dirtyring_vm *vm, const FakeService &service);
    bool repeats; // it changes nothing, so it may be done again
};

const Case cases[] = {
    {"memory_add", DR_MEMORY_ADD,
     [](dirtyring_vm *vm, const FakeService &service) {
         return dirtyring_memory_add(vm, 0, page, service.front_end.fd.get(), 0);
     },
     false},
    {"ioas_alloc", DR_IOAS_ALLOC,
     [](dirtyring_vm *vm, auto &) {
         std::uint32_t ioas = 0;
         const int error = dirtyring_ioas_alloc(vm, &ioas);
         EXPECT_EQ(ioas, 1u);
         return error;
     },
     false},
    {"hwpt_alloc", DR_HWPT_ALLOC,
     [](dirtyring_vm *vm, auto &) {
         std::uint32_t hwpt = 0;
         const dirtyring_hwpt attr{};
         const int error = dirtyring_hwpt_alloc(vm, 1, &attr, &hwpt);
         EXPECT_EQ(hwpt, 1u);
         return error;
     },
     false},
    {"destroy", DR_DESTROY, [](dirtyring_vm *vm, auto &) { return dirtyring_destroy(vm, 7); }, false},
    {"ring_get", DR_RING_GET,
     [](dirtyring_vm *vm, auto &) {
         dirtyring_ring *ring = nullptr;
         const int error = dirtyring_ring_open(vm, 1, 0, &ring);
         dirtyring_ring_close(ring);
         return error;
     },
     true},
};

const Death deaths[] = {Death::before_reading, Death::before_reply, Death::in_reply};
const char *const death_names[] = {"before_reading", "before_reply", "in_reply"};

class ClientRequests : public ClientReconnect, public testing::WithParamInterface<std::tuple<Case, Death>>
{
  protected:
    void SetUp() override
    {
        ClientReconnect::SetUp();
        service.on[DR_MEMORY_ADD] = [this](auto &) {
            EXPECT_EQ(service.received.count(), 1u);
            next_of(done);
            return reply_of(dr_empty{});
        };
        service.on[DR_DESTROY] = [this](auto &) {
            next_of(done);
            return reply_of(dr_empty{});
        };
        service.on[DR_IOAS_ALLOC] = [this](auto &) {
            return reply_of(dr_object{0, static_cast<std::uint32_t>(next_of(done))});
        };
        service.on[DR_HWPT_ALLOC] = [this](auto &) {
            return reply_of(dr_hwpt{0, static_cast<std::uint32_t>(next_of(done)), 1, 39});
        };
    }

    std::uint64_t done = 0;
};

TEST_P(ClientRequests, AreAnsweredOnceAndDoneOnce)
{
    const auto &[asked, death] = GetParam();
    connect();
    service.deaths[asked.request] = death;
    EXPECT_EQ(asked.ask(vm.get(), service), 0) << dirtyring_error();
    EXPECT_TRUE(service.deaths.empty());
    if (!asked.repeats) {
        EXPECT_EQ(done, 1u);
        done = 0;
        EXPECT_EQ(asked.ask(vm.get(), service), 0) << dirtyring_error();
        EXPECT_EQ(done, 1u) << "another request is another request";
    }
    vm.reset();
    service.hang_up();
    const auto sequences = sequences_of(asked.request);
    EXPECT_THAT(sequences, SizeIs((death == Death::before_reading ? 1 : 2) + (asked.repeats ? 0 : 1)));
    EXPECT_THAT(service.created, SizeIs(2));
    EXPECT_EQ(service.created[0].flags, 0u);
    EXPECT_EQ(service.created[1].flags, DR_GUEST_AGAIN);
    EXPECT_EQ(bytes(service.created[0].secret), bytes(service.created[1].secret));
}

// The worker that takes over dies too, while this side comes in.
TEST_P(ClientRequests, SurviveTwoDeaths)
{
    const auto &[asked, death] = GetParam();
    for (const std::uint32_t entering : {DR_HELLO, DR_GUEST_CREATE}) {
        connect();
        done = 0;
        service.deaths[asked.request] = Death::before_reply;
        service.deaths[entering] = death;
        EXPECT_EQ(asked.ask(vm.get(), service), 0) << dirtyring_error();
        EXPECT_TRUE(service.deaths.empty());
        if (!asked.repeats) {
            EXPECT_EQ(done, 1u);
        }
        vm.reset();
    }
}

INSTANTIATE_TEST_SUITE_P(Each, ClientRequests, testing::Combine(testing::ValuesIn(cases), testing::ValuesIn(deaths)),
                         [](const auto &tested) {
                             return std::string(std::get<0>(tested.param).name) + "_" +
                                    death_names[static_cast<int>(std::get<1>(tested.param))];
                         });

TEST_F(ClientReconnect, ConnectingSurvivesADeath)
{
    for (const std::uint32_t request : {DR_HELLO, DR_GUEST_CREATE}) {
        for (const Death death : deaths) {
            service.deaths[request] = death;
            connect();
            EXPECT_TRUE(service.deaths.empty());
            vm.reset();
        }
    }
}

TEST_F(ClientReconnect, SequencesGrowOverAllConnections)
{
    service.on[DR_IOAS_ALLOC] = [](auto &) { return reply_of(dr_object{0, 3}); };
    connect();
    for (int i = 0; i < 3; ++i) {
        ASSERT_EQ(alloc(), 0) << dirtyring_error();
        service.die();
        service.restart();
    }
    succeed();
    ASSERT_EQ(alloc(), 0);
    vm.reset();
    service.hang_up();
    const auto sequences = sequences_of(DR_IOAS_ALLOC);
    ASSERT_THAT(sequences, SizeIs(4));
    for (std::size_t i = 1; i < sequences.size(); ++i)
        EXPECT_GT(sequences[i], sequences[i - 1]);
}

TEST_F(ClientReconnect, GoneWhereNobodyListens)
{
    connect();
    service.hang_up();
    const auto before = std::chrono::steady_clock::now();
    EXPECT_EQ(alloc(), -ESHUTDOWN);
    EXPECT_THAT(dirtyring_error(), HasSubstr("Connection refused"));
    EXPECT_EQ(alloc(), -ESHUTDOWN);
    EXPECT_EQ(dirtyring_reconnect(vm.get()), -ESHUTDOWN);
    EXPECT_EQ(dirtyring_enable(vm.get(), 1), -ESHUTDOWN);
    EXPECT_EQ(dirtyring_queue_map(vm.get(), 1, 0, page, 0, DIRTYRING_READ, 1), -ESHUTDOWN);
    vm.reset();
    EXPECT_LT(std::chrono::steady_clock::now() - before, 1s);
}

TEST_F(ClientReconnect, GoneWithItsSocketFile)
{
    connect();
    service.die();
    ASSERT_EQ(::unlink(service.path.c_str()), 0);
    EXPECT_EQ(alloc(), -ESHUTDOWN);
    EXPECT_THAT(dirtyring_error(), HasSubstr("No such file"));
}

TEST_F(ClientReconnect, AServiceThatKnowsNoSuchGuestIsAnother)
{
    connect();
    service.die();
    const auto of_guests = service.on[DR_GUEST_CREATE];
    service.on[DR_GUEST_CREATE] = [](auto &) -> Reply { throw Refuse{ENOENT, "no guest has this secret"}; };
    service.restart();
    EXPECT_EQ(alloc(), -ESHUTDOWN);
    EXPECT_STREQ(dirtyring_error(), "no guest has this secret");
    EXPECT_TRUE(readable(dirtyring_socket(vm.get()))) << "whoever polls sees it hang up";
    service.die();
    service.on[DR_GUEST_CREATE] = of_guests;
    service.restart();
    EXPECT_EQ(alloc(), -ESHUTDOWN) << "for good";
    EXPECT_THAT(dirtyring_error(), HasSubstr("the service is gone"));
    vm.reset();
    service.hang_up();
    EXPECT_THAT(service.requests, ElementsAre(DR_HELLO, DR_GUEST_CREATE, DR_HELLO, DR_GUEST_CREATE));
}

TEST_F(ClientReconnect, AServiceShortOfDescriptorsIsAskedAgain)
{
    service.on[DR_IOAS_ALLOC] = [](auto &) { return reply_of(dr_object{0, 3}); };
    connect();
    service.die();
    const auto of_guests = service.on[DR_GUEST_CREATE];
    bool refuse = true;
    service.on[DR_GUEST_CREATE] = [&](const std::string &payload) {
        if (std::exchange(refuse, false))
            throw Refuse{EMFILE, "no descriptors are left"};
        return of_guests(payload);
    };
    service.restart();
    EXPECT_EQ(alloc(), 0) << dirtyring_error();
    EXPECT_FALSE(refuse);
}

TEST_F(ClientReconnect, TriesNothingAgainThatBreaksTheRules)
{
    service.on[DR_IOAS_ALLOC] = [](auto &) { return reply_of(dr_object{0, 3}); };
    connect();
    service.die();
    service.restart();
    ASSERT_EQ(alloc(), 0);
    service.sequence_offset = 1;
    EXPECT_EQ(alloc(), -EPROTO);
    service.sequence_offset = 0;
    EXPECT_EQ(alloc(), -ESHUTDOWN);
    vm.reset();
    service.hang_up();
    EXPECT_THAT(sequences_of(DR_IOAS_ALLOC), SizeIs(2));
    EXPECT_THAT(sequences_of(DR_HELLO), SizeIs(2));
}

TEST_F(ClientReconnect, WhatTheServiceSaysUnaskedBreaksTheRules)
{
    service.on[DR_IOAS_ALLOC] = [](auto &) {
        Reply reply = reply_of(dr_object{0, 3});
        reply.behind = "more";
        return reply;
    };
    connect();
    ASSERT_EQ(alloc(), 0);
    EXPECT_EQ(alloc(), -EPROTO);
    EXPECT_EQ(alloc(), -ESHUTDOWN);
}

TEST_F(ClientReconnect, AConnectionOfSomebodyElsesMakingEndsWithTheWorker)
{
    service.die();
    dirtyring_vm *raw = nullptr;
    ASSERT_EQ(dirtyring_connect_fd(service.connect(), &raw), 0) << dirtyring_error();
    vm.reset(raw);
    service.die();
    EXPECT_EQ(alloc(), -ESHUTDOWN);
    EXPECT_EQ(dirtyring_enable(vm.get(), 1), -ESHUTDOWN);
}

TEST_F(ClientReconnect, TheSocketKeepsItsNumber)
{
    connect();
    const int number = dirtyring_socket(vm.get());
    EXPECT_FALSE(readable(number));
    service.die();
    EXPECT_TRUE(readable(number));
    service.restart();
    EXPECT_EQ(dirtyring_reconnect(vm.get()), 0) << dirtyring_error();
    EXPECT_EQ(dirtyring_socket(vm.get()), number);
    EXPECT_FALSE(readable(number));
    EXPECT_NE(::fcntl(number, F_GETFD) & FD_CLOEXEC, 0);
    EXPECT_EQ(dirtyring_reconnect(vm.get()), 0) << "nothing has broken";
}

// ---- commands

TEST_F(ClientReconnect, AMapOnItsWaySurvives)
{
    connect();
    for (const bool taken : {false, true}) {
        std::thread mapper(
            [&] { EXPECT_EQ(dirtyring_map(vm.get(), 1, 0, page, 0, DIRTYRING_READ), 0) << dirtyring_error(); });
        dr_command command{};
        if (taken)
            command = await_command();
        service.die();
        take_event(service.kick); // the old worker's, who did not do what it was for
        service.restart();
        EXPECT_TRUE(readable(service.kick.get(), 10s)) << "the next worker is kicked";
        if (!taken)
            command = await_command();
        service.complete(command, 0);
        mapper.join();
        EXPECT_THAT(service.take_commands(), IsEmpty()) << "submitted once";
    }
}

TEST_F(ClientReconnect, AMapIsCompletedWhileNobodyServesTheSocket)
{
    connect();
    service.die();
    std::thread mapper(
        [&] { EXPECT_EQ(dirtyring_map(vm.get(), 1, 0, page, 0, DIRTYRING_READ), 0) << dirtyring_error(); });
    service.complete(await_command(), 0);
    mapper.join();
    service.restart();
}

TEST_F(ClientReconnect, AMapOnItsWayEndsWithTheService)
{
    connect();
    std::thread mapper([&] { EXPECT_EQ(dirtyring_map(vm.get(), 1, 0, page, 0, DIRTYRING_READ), -ESHUTDOWN); });
    await_command();
    service.die();
    // It knocks, and waits in the backlog.
    EXPECT_TRUE(readable(service.listener.get(), 10s));
    service.hang_up();
    mapper.join();
}

TEST_F(ClientReconnect, ARequestEndsWithTheServiceInWhoseBacklogItWaits)
{
    connect();
    service.die();
    std::thread asker([&] { EXPECT_EQ(alloc(), -ESHUTDOWN); });
    EXPECT_TRUE(readable(service.listener.get(), 10s));
    service.hang_up();
    asker.join();
}

// ---- rings

TEST_F(ClientReconnect, RingsGoOnWithoutAWorker)
{
    connect();
    const Set set = open_set();
    service.die();
    service.rings[0].publish({dr_run(1, false, 1)});
    EXPECT_THAT(next(set), ElementsAre(dr_run(1, false, 1)));
    EXPECT_TRUE(service.rings[0].entries->released());
    ASSERT_EQ(dirtyring_set_sync(set.get()), 0) << dirtyring_error();
    EXPECT_EQ(dirtyring_set_synced(set.get()), 0) << "nobody waits for the next worker";
    EXPECT_EQ(dirtyring_set_synced(set.get()), 0);
    const dr_command sync = await_command();
    service.rings[0].publish({dr_marker(DR_MARKER_SYNC, sync.cookie)});
    EXPECT_THAT(next(set), SizeIs(1));
    EXPECT_EQ(dirtyring_set_synced(set.get()), 1) << dirtyring_error();
    service.restart();
}

// Looking on is enough to come in again, in several steps.
TEST_F(ClientReconnect, ASyncBringsTheConnectionBack)
{
    connect();
    const Set set = open_set();
    ASSERT_EQ(dirtyring_set_sync(set.get()), 0);
    const dr_command sync = await_command();
    service.die();
    service.restart();
    while (!readable(service.kick.get(), 1ms))
        ASSERT_EQ(dirtyring_set_synced(set.get()), 0) << dirtyring_error();
    service.complete(sync, -ECANCELED);
    EXPECT_EQ(dirtyring_set_synced(set.get()), -ECANCELED);
    service.hang_up();
    EXPECT_THAT(service.created, SizeIs(2));
}

TEST_F(ClientReconnect, ASyncSeesThatTheServiceIsGone)
{
    connect();
    const Set set = open_set();
    ASSERT_EQ(dirtyring_set_sync(set.get()), 0);
    service.hang_up();
    EXPECT_EQ(dirtyring_set_synced(set.get()), -ESHUTDOWN);
    EXPECT_EQ(dirtyring_set_sync(set.get()), -ESHUTDOWN);
}

TEST_F(ClientReconnect, AFullBacklogIsNoEnd)
{
    service.on[DR_IOAS_ALLOC] = [](auto &) { return reply_of(dr_object{0, 3}); };
    connect();
    const Set set = open_set();
    ASSERT_EQ(dirtyring_set_sync(set.get()), 0);
    service.die();
    std::vector<Fd> crowd;
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, service.path.data(), service.path.size());
    do {
        crowd.emplace_back(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    } while (::connect(crowd.back().get(), reinterpret_cast<const sockaddr *>(&address), sizeof address) == 0);
    ASSERT_EQ(errno, EAGAIN);
    EXPECT_EQ(dirtyring_set_synced(set.get()), 0) << dirtyring_error();
    crowd.clear();
    service.restart();
    EXPECT_EQ(alloc(), 0) << dirtyring_error();
}

TEST_F(ClientReconnect, AMarkerMayComeTwice)
{
    connect();
    const Set set = open_set();
    std::uint64_t marker = 0;
    for (int i = 0; i < 3; ++i) {
        ASSERT_EQ(dirtyring_set_sync(set.get()), 0) << dirtyring_error();
        if (i > 0) {
            service.rings[0].publish({marker, dr_run(1, false, 1)});
            EXPECT_THAT(next(set), SizeIs(2));
            EXPECT_EQ(dirtyring_set_synced(set.get()), 0) << "that was the last one's";
        }
        marker = dr_marker(DR_MARKER_SYNC, await_command().cookie);
        service.rings[0].publish({marker, marker});
        EXPECT_THAT(next(set), Not(IsEmpty()));
        EXPECT_EQ(dirtyring_set_synced(set.get()), 1);
        while (!next(set).empty()) {
        }
    }
}

// Workers die all the time, one thread maps, one syncs, and both look after the connection.
TEST_F(ClientReconnect, TwoThreadsAndManyDeaths)
{
    connect();
    const Set set = open_set();
    service.answer([this](const dr_command &command) {
        if (command.opcode == DR_OP_SYNC)
            service.rings[0].publish({dr_marker(DR_MARKER_SYNC, command.cookie)});
        service.complete(command, 0);
    });
    service.on[DR_IOAS_ALLOC] = [](auto &) { return reply_of(dr_object{0, 3}); };
    std::atomic<bool> done = false;
    std::thread mapper([&] {
        for (std::uint64_t i = 0; !done; ++i) {
            ASSERT_EQ(dirtyring_map(vm.get(), 1, i * page, page, 0, DIRTYRING_READ), 0) << dirtyring_error();
            ASSERT_EQ(alloc(), 0) << dirtyring_error();
        }
    });
    std::thread syncer([&] {
        while (!done) {
            ASSERT_EQ(dirtyring_set_sync(set.get()), 0) << dirtyring_error();
            while (dirtyring_set_synced(set.get()) == 0) {
                while (!next(set).empty()) {
                }
            }
            ASSERT_EQ(dirtyring_set_synced(set.get()), 1) << dirtyring_error();
        }
    });
    for (int i = 0; i < 30; ++i) {
        service.die();
        service.restart();
        while (!readable(service.kick.get(), 1ms)) {
        }
    }
    done = true;
    mapper.join();
    syncer.join();
}

// ---- the guest's life

TEST_F(ClientReconnect, TellsTheServiceHowLongAGuestLingers)
{
    dirtyring_guest attr{};
    attr.linger_ms = 5000;
    attr.stall_ms = 70;
    std::memset(attr.secret, 0x11, sizeof attr.secret);
    connect(attr);
    EXPECT_EQ(std::memcmp(dirtyring_secret(vm.get()), attr.secret, sizeof attr.secret), 0);
    service.die();
    service.restart();
    EXPECT_EQ(dirtyring_reconnect(vm.get()), 0) << dirtyring_error();
    vm.reset();
    service.hang_up();
    ASSERT_THAT(service.created, SizeIs(2));
    for (const dr_guest_create &created : service.created) {
        EXPECT_EQ(created.linger_ms, 5000u);
        EXPECT_EQ(created.stall_ms, 70u);
        EXPECT_EQ(created.command_entries, command_entries);
        EXPECT_EQ(bytes(created.secret), bytes(attr.secret));
    }
    attr.reserved[1] = 1;
    dirtyring_vm *raw = nullptr;
    EXPECT_EQ(dirtyring_connect_guest(service.path.c_str(), &attr, &raw), -EINVAL);
}

TEST_F(ClientReconnect, DrawsASecret)
{
    for (int i = 0; i < 3; ++i) {
        connect();
        vm.reset();
    }
    service.hang_up();
    std::set<std::string> secrets{std::string(DR_TOKEN_BYTES, '\0')};
    for (const dr_guest_create &created : service.created)
        secrets.insert(bytes(created.secret));
    EXPECT_THAT(secrets, SizeIs(4));
}

TEST_F(ClientReconnect, ClosingFreesAndLeavingDoesNot)
{
    connect();
    vm.reset();
    connect();
    dirtyring_leave(vm.release());
    dirtyring_leave(nullptr);
    service.hang_up();
    EXPECT_THAT(service.requests, ElementsAre(DR_HELLO, DR_GUEST_CREATE, DR_GUEST_DESTROY, DR_HELLO, DR_GUEST_CREATE));
}

TEST_F(ClientReconnect, ClosingComesBackToFree)
{
    connect();
    service.die();
    service.restart();
    vm.reset();
    service.hang_up();
    EXPECT_EQ(service.requests.back(), static_cast<std::uint32_t>(DR_GUEST_DESTROY));
    EXPECT_THAT(service.created, SizeIs(2));
}

TEST_F(ClientReconnect, ASuccessorTakesTheGuestOver)
{
    connect();
    ASSERT_EQ(dirtyring_queue_map(vm.get(), 1, 0, page, 0, DIRTYRING_READ, 11), 0);
    ASSERT_EQ(dirtyring_submit(vm.get()), 0);
    const dr_command old = service.take_commands().at(0);
    ASSERT_EQ(dirtyring_queue_map(vm.get(), 1, page, page, 0, DIRTYRING_READ, 12), 0); // not submitted
    dirtyring_ring *ring = nullptr;
    ASSERT_EQ(dirtyring_ring_open(vm.get(), 1, 0, &ring), 0);
    service.rings[0].publish({dr_run(1, false, 1), dr_run(2, false, 1), dr_run(3, false, 1)});
    const std::uint64_t *entries = nullptr;
    ASSERT_EQ(dirtyring_ring_peek(ring, &entries), 3u);
    dirtyring_ring_release(ring, 2);
    dirtyring_ring_close(ring);

    succeed();
    ASSERT_EQ(dirtyring_queue_map(vm.get(), 1, 2 * page, page, 0, DIRTYRING_READ, 21), 0);
    ASSERT_EQ(dirtyring_submit(vm.get()), 0);
    const auto commands = service.take_commands();
    ASSERT_THAT(commands, SizeIs(1));
    EXPECT_EQ(commands[0].iova, 2 * page);
    service.complete(old, 0);
    EXPECT_THAT(reaped(vm), IsEmpty()) << "the predecessor's is nobody's";
    service.complete(commands[0], 0);
    EXPECT_THAT(reaped(vm), ElementsAre(21u));
    EXPECT_EQ(alloc(), -EOPNOTSUPP) << "nothing has broken";

    ASSERT_EQ(dirtyring_ring_open(vm.get(), 1, 0, &ring), 0);
    ASSERT_EQ(dirtyring_ring_peek(ring, &entries), 1u);
    EXPECT_EQ(entries[0], dr_run(3, false, 1));
    dirtyring_ring_close(ring);
}

TEST_F(ClientReconnect, ASuccessorTakesNoMarkerOfItsPredecessorForItsOwn)
{
    connect();
    std::set<std::uint64_t> cookies;
    for (int i = 0; i < 2; ++i) {
        {
            const Set set = open_set();
            ASSERT_EQ(dirtyring_set_sync(set.get()), 0);
            const std::uint64_t cookie = await_command().cookie;
            EXPECT_GE(cookie, 1ull << 43);
            EXPECT_LT(cookie, 1ull << 44);
            EXPECT_TRUE(cookies.insert(cookie).second);
        }
        succeed();
    }
}

TEST_F(ClientReconnect, TakesNoGuestThatIsNotThere)
{
    const std::uint8_t secret[DR_TOKEN_BYTES] = {1};
    dirtyring_vm *raw = reinterpret_cast<dirtyring_vm *>(1);
    EXPECT_EQ(dirtyring_take(service.path.c_str(), secret, &raw), -ENOENT);
    EXPECT_EQ(raw, nullptr);
    EXPECT_STREQ(dirtyring_error(), "no guest has this secret");
}

TEST_F(ClientReconnect, TellsWhoHoldsTheGuestUp)
{
    connect();
    struct dirtyring_stalled stalled {
    };
    EXPECT_FALSE(dirtyring_stalled(vm.get(), &stalled));
    auto *status = service.service.map.as<dr_guest_status>(DR_GUEST_STATUS_OFFSET);
    status->device = 8;
    status->pid = 1234;
    std::atomic_ref(status->since).store(77, std::memory_order_release);
    EXPECT_TRUE(dirtyring_stalled(vm.get(), &stalled));
    EXPECT_EQ(stalled.since_ns, 77u);
    EXPECT_EQ(stalled.device, 8u);
    EXPECT_EQ(stalled.pid, 1234);
    std::atomic_ref(status->since).store(0, std::memory_order_release);
    EXPECT_FALSE(dirtyring_stalled(vm.get(), &stalled));
}

// ---- devices

TEST_F(ClientDevice, DetachesOverADeadConnection)
{
    std::vector<std::uint64_t> keys;
    const auto reply = service.on[DR_DEVICE_ATTACH];
    service.on[DR_DEVICE_ATTACH] = [&](const std::string &payload) {
        dr_device_attach request{};
        std::memcpy(&request, payload.data(), sizeof request);
        keys.push_back(request.key);
        return reply(payload);
    };
    for (const Death death : deaths) {
        keys.clear();
        attach();
        service.die();
        EXPECT_EQ(dirtyring_dma_write(dirtyring_device_dma(device, 0), iova, "abc", 4, nullptr), 0);
        EXPECT_STREQ(memory.map.as<char>(page), "abc");
        service.deaths[DR_DEVICE_DETACH] = death;
        service.restart();
        EXPECT_EQ(dirtyring_device_detach(device), 0) << dirtyring_error();
        EXPECT_TRUE(service.deaths.empty());
        ASSERT_THAT(keys, SizeIs(3));
        EXPECT_NE(keys[0], 0u);
        EXPECT_THAT(keys, Each(keys[0]));
    }
    service.hang_up();
    EXPECT_EQ(service.requests.back(), static_cast<std::uint32_t>(DR_DEVICE_DETACH));
}

TEST_F(ClientDevice, DetachesFromAServiceThatIsAnother)
{
    attach();
    service.die();
    service.on[DR_DEVICE_ATTACH] = [](auto &) -> Reply { throw Refuse{EACCES, "no guest has this token"}; };
    service.restart();
    EXPECT_EQ(dirtyring_device_detach(device), 0);
}

} // namespace
} // namespace dirtyring::test
