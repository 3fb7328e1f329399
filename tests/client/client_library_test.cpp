// libdirtyring against a service that does what each test tells it to.
#include "tests/client/fake_service.hpp"

#include <chrono>
#include <memory>
#include <thread>

namespace dirtyring::test {
namespace {

using Vm = std::unique_ptr<dirtyring_vm, decltype(&dirtyring_close)>;
using Set = std::unique_ptr<dirtyring_set, decltype(&dirtyring_set_close)>;

class ClientLibrary : public testing::Test
{
  protected:
    int try_connect()
    {
        dirtyring_vm *raw = reinterpret_cast<dirtyring_vm *>(1);
        const int error = dirtyring_connect_fd(service.connect(), &raw);
        if (error == 0)
            vm.reset(raw);
        else
            EXPECT_EQ(raw, nullptr);
        return error;
    }

    void connect() { ASSERT_EQ(try_connect(), 0) << dirtyring_error(); }

    Set open_set()
    {
        dirtyring_set *raw = nullptr;
        EXPECT_EQ(dirtyring_set_open(vm.get(), 1, &raw), 0) << dirtyring_error();
        return {raw, dirtyring_set_close};
    }

    std::vector<std::uint64_t> reaped()
    {
        dr_completion completions[command_entries];
        const std::uint32_t n = dirtyring_reap(vm.get(), completions, command_entries);
        std::vector<std::uint64_t> values;
        for (std::uint32_t i = 0; i < n; ++i)
            values.push_back(completions[i].user_data);
        return values;
    }

    FakeService service;
    Vm vm{nullptr, dirtyring_close};
};

// ---- set-up

TEST_F(ClientLibrary, RefusesAServiceOfAnotherVersion)
{
    service.on[DR_HELLO] = [](auto &) { return reply_of(dr_hello{0, 2, 0}); };
    EXPECT_EQ(try_connect(), -EPROTONOSUPPORT);
    EXPECT_THAT(dirtyring_error(), HasSubstr("version 2"));
}

TEST_F(ClientLibrary, HandsARefusalOn)
{
    service.on[DR_GUEST_CREATE] = [](auto &) -> Reply { throw Refuse{EMFILE, "no descriptors are left for a guest"}; };
    EXPECT_EQ(try_connect(), -EMFILE);
    EXPECT_STREQ(dirtyring_error(), "no descriptors are left for a guest");
}

TEST_F(ClientLibrary, EndsAnUnterminatedSentence)
{
    service.on[DR_GUEST_CREATE] = [](auto &) -> Reply { throw Refuse{EMFILE, std::string(500, 'x')}; };
    EXPECT_EQ(try_connect(), -EMFILE);
    EXPECT_EQ(dirtyring_error(), std::string(DR_SENTENCE_BYTES, 'x'));
}

TEST_F(ClientLibrary, RefusesARefusalWithoutAnErrno)
{
    service.on[DR_GUEST_CREATE] = [](auto &) -> Reply { throw Refuse{0, "fine"}; };
    EXPECT_EQ(try_connect(), -EPROTO);
}

TEST_F(ClientLibrary, RefusesAReplyToAnotherRequest)
{
    service.sequence_offset = 1;
    EXPECT_EQ(try_connect(), -EPROTO);
    EXPECT_THAT(dirtyring_error(), HasSubstr("number 2"));
}

TEST_F(ClientLibrary, RefusesAShortReply)
{
    service.on[DR_HELLO] = [](auto &) { return reply_of(dr_empty{}); };
    EXPECT_EQ(try_connect(), -EPROTO);
}

TEST_F(ClientLibrary, IgnoresWhatANewerServiceAdds)
{
    struct Longer : dr_hello {
        std::uint64_t more;
    };
    service.on[DR_HELLO] = [](auto &) { return reply_of(Longer{{0, DR_PROTOCOL_VERSION, DR_FEATURES_ALL}, 7}); };
    EXPECT_EQ(try_connect(), 0) << dirtyring_error();
}

TEST_F(ClientLibrary, SaysThatTheServiceHungUp)
{
    connect();
    service.hang_up();
    std::uint32_t ioas = 0;
    EXPECT_EQ(dirtyring_ioas_alloc(vm.get(), &ioas), -ESHUTDOWN);
}

TEST_F(ClientLibrary, ChecksDescriptors)
{
    service.on[DR_HELLO] = [](auto &) {
        std::vector<Fd> fds;
        fds.push_back(event());
        return reply_of(dr_hello{0, DR_PROTOCOL_VERSION, DR_FEATURES_ALL}, std::move(fds));
    };
    EXPECT_EQ(try_connect(), -EPROTO);
    EXPECT_THAT(dirtyring_error(), HasSubstr("1 descriptors, expected 0"));
}

TEST_F(ClientLibrary, ChecksTheCommandRing)
{
    struct Wrong {
        const char *sentence;
        std::function<void(dr_ring_header &)> make;
    };
    const Wrong cases[] = {
        {"magic 0x1", [](dr_ring_header &h) { h.magic = 1; }},
        {"version 9", [](dr_ring_header &h) { h.version = 9; }},
        {"kind 1", [](dr_ring_header &h) { h.kind = DR_RING_DIRTY; }},
        {"with 16 bytes", [](dr_ring_header &h) { h.entry_size = 16; }},
        {"255 entries", [](dr_ring_header &h) { h.capacity = 255; }},
        {"1048576 entries", [](dr_ring_header &h) { h.capacity = 1 << 20; }},
        {"asked for a command ring of 256", [](dr_ring_header &h) { h.capacity = 128; }},
    };
    for (const Wrong &wrong : cases) {
        for (const bool ours : {true, false}) {
            FakeService fake;
            wrong.make((ours ? fake.submission_region() : fake.completion_region())->header);
            dirtyring_vm *raw = nullptr;
            EXPECT_EQ(dirtyring_connect_fd(fake.connect(), &raw), -EPROTO);
            EXPECT_THAT(dirtyring_error(), HasSubstr(wrong.sentence));
        }
    }
}

TEST_F(ClientLibrary, ChecksTheSizeOfARegion)
{
    Region small;
    ASSERT_EQ(small.make("small", DR_PAGE, Pages::present), 0);
    service.on[DR_GUEST_CREATE] = [&](auto &) {
        std::vector<Fd> fds(4);
        for (Fd &fd : fds)
            fd = copy_of(small.fd);
        return reply_of(dr_guest{}, std::move(fds));
    };
    EXPECT_EQ(try_connect(), -EPROTO);
    EXPECT_THAT(dirtyring_error(), HasSubstr("4096 bytes, expected at least 8192"));
}

TEST_F(ClientLibrary, SaysWhyItCannotConnect)
{
    dirtyring_vm *raw = nullptr;
    EXPECT_EQ(dirtyring_connect("/nonexistent/socket", &raw), -ENOENT);
    EXPECT_THAT(dirtyring_error(), HasSubstr("/nonexistent/socket"));
    EXPECT_EQ(dirtyring_connect(std::string(200, 'x').c_str(), &raw), -ENAMETOOLONG);
}

TEST_F(ClientLibrary, SetsUpAGuest)
{
    dr_hwpt_alloc asked{};
    bool memory_came = false;
    service.on[DR_MEMORY_ADD] = [&](auto &) {
        memory_came = service.received.count() == 1;
        return reply_of(dr_empty{});
    };
    service.on[DR_IOAS_ALLOC] = [](auto &) { return reply_of(dr_object{0, 3}); };
    service.on[DR_HWPT_ALLOC] = [&](const std::string &payload) {
        std::memcpy(&asked, payload.data(), sizeof asked);
        return reply_of(dr_hwpt{0, 4, 1, 39});
    };
    connect();
    EXPECT_THAT(std::string(reinterpret_cast<const char *>(dirtyring_token(vm.get())), DR_TOKEN_BYTES),
                std::string(DR_TOKEN_BYTES, 0x5a));
    EXPECT_EQ(dirtyring_memory_add(vm.get(), 0, page, service.front_end.fd.get(), 0), 0);
    EXPECT_TRUE(memory_came);
    EXPECT_EQ(dirtyring_memory_add(vm.get(), 0, page, -1, 0), -EBADF);
    std::uint32_t ioas = 0;
    EXPECT_EQ(dirtyring_ioas_alloc(vm.get(), &ioas), 0);
    EXPECT_EQ(ioas, 3u);
    dirtyring_hwpt attr{};
    std::uint32_t hwpt = 0;
    EXPECT_EQ(dirtyring_hwpt_alloc(vm.get(), ioas, &attr, &hwpt), 0);
    EXPECT_EQ(hwpt, 4u);
    EXPECT_EQ(asked.ioas, 3u);
    EXPECT_EQ(asked.aperture_lg2, 39u);
    EXPECT_EQ(asked.flags, DR_HWPT_DIRTY_TRACKING);
    EXPECT_EQ(asked.ring_entries, 4096u);
    EXPECT_EQ(asked.format, static_cast<unsigned>(DR_FORMAT_AMDV1));
    EXPECT_EQ(asked.levels, 0u);
    attr.format = DR_FORMAT_VTDSS;
    attr.levels = 5;
    attr.always_on = 1;
    EXPECT_EQ(dirtyring_hwpt_alloc(vm.get(), ioas, &attr, &hwpt), 0);
    EXPECT_EQ(asked.format, static_cast<unsigned>(DR_FORMAT_VTDSS));
    EXPECT_EQ(asked.levels, 5u);
    EXPECT_EQ(asked.flags, DR_HWPT_DIRTY_TRACKING | DR_HWPT_ALWAYS_ON);
    attr = {};
    attr.optional = 1;
    EXPECT_EQ(dirtyring_hwpt_alloc(vm.get(), ioas, &attr, &hwpt), 0);
    EXPECT_EQ(asked.flags, DR_HWPT_DIRTY_OPTIONAL);
    attr.untracked = 1;
    EXPECT_EQ(dirtyring_hwpt_alloc(vm.get(), ioas, &attr, &hwpt), -EINVAL);
    attr = {};
    attr.reserved = 1;
    EXPECT_EQ(dirtyring_hwpt_alloc(vm.get(), ioas, &attr, &hwpt), -EINVAL);
    EXPECT_EQ(dirtyring_destroy(vm.get(), hwpt), -EOPNOTSUPP);
    EXPECT_STREQ(dirtyring_error(), "unknown request");
}

TEST_F(ClientLibrary, AsksWhatDevicesCanDo)
{
    dr_object asked{};
    service.on[DR_DEVICE_INFO] = [&](const std::string &payload) {
        std::memcpy(&asked, payload.data(), sizeof asked);
        dr_device_info told{0, 7, 4, 99, DR_DEVICE_COHERENT, 6, {}};
        std::memset(told.name, 'n', sizeof told.name); // without an end
        return reply_of(told);
    };
    service.on[DR_HWPT_STATUS] = [&](const std::string &payload) {
        std::memcpy(&asked, payload.data(), sizeof asked);
        return reply_of(dr_hwpt_status{0, DR_FORMAT_VTDSS, DR_TRACKING_ENABLED, 3, 7});
    };
    connect();
    struct dirtyring_device_info info {
    };
    EXPECT_EQ(dirtyring_device_info(vm.get(), 5, &info), 0);
    EXPECT_EQ(asked.id, 5u);
    EXPECT_EQ(info.id, 7u);
    EXPECT_EQ(info.hwpt, 4u);
    EXPECT_EQ(info.pid, 99);
    EXPECT_EQ(info.flags, DR_DEVICE_COHERENT);
    EXPECT_EQ(info.formats, 6u);
    EXPECT_EQ(std::string(info.name), std::string(DR_NAME_BYTES - 1, 'n'));
    struct dirtyring_hwpt_status status {
    };
    EXPECT_EQ(dirtyring_hwpt_status(vm.get(), 4, &status), 0);
    EXPECT_EQ(asked.id, 4u);
    EXPECT_EQ(status.format, static_cast<unsigned>(DR_FORMAT_VTDSS));
    EXPECT_EQ(status.supported, 0u);
    EXPECT_EQ(status.enabled, 1u);
    EXPECT_EQ(status.devices, 3u);
    EXPECT_EQ(status.in_the_way, 7u);
}

// ---- commands

TEST_F(ClientLibrary, MapsOneByOne)
{
    connect();
    std::vector<dr_command> seen;
    service.answer([&](const dr_command &command) {
        seen.push_back(command);
        service.complete(command, command.iova == 0 ? 0 : -EEXIST);
    });
    EXPECT_EQ(dirtyring_map(vm.get(), 3, 0, 2 * page, 7 * page, DIRTYRING_READ | DIRTYRING_WRITE), 0);
    EXPECT_EQ(dirtyring_map(vm.get(), 3, page, page, 0, DIRTYRING_READ), -EEXIST);
    EXPECT_STREQ(dirtyring_error(), "map of iova 0x1000, length 0x1000 in ioas 3: something is mapped there");
    service.stop_answering();
    ASSERT_EQ(seen.size(), 2u);
    EXPECT_EQ(seen[0].opcode, static_cast<std::uint32_t>(DR_OP_MAP));
    EXPECT_EQ(seen[0].flags, static_cast<std::uint32_t>(DR_MAP_READ | DR_MAP_WRITE));
    EXPECT_EQ(seen[0].object, 3u);
    EXPECT_EQ(seen[0].length, 2 * page);
    EXPECT_EQ(seen[0].oa, 7 * page);
}

TEST_F(ClientLibrary, SleepsUntilALateCompletion)
{
    connect();
    service.answer([&](const dr_command &command) {
        std::this_thread::sleep_for(5ms);
        service.complete(command, 0);
    });
    for (int i = 0; i < 10; ++i)
        EXPECT_EQ(dirtyring_enable(vm.get(), 1), 0) << dirtyring_error();
}

TEST_F(ClientLibrary, TellsHowFarAnUnmapCame)
{
    connect();
    service.answer([&](const dr_command &command) { service.complete(command, -EAGAIN, page, 9); });
    dirtyring_unmapped result{};
    EXPECT_EQ(dirtyring_unmap(vm.get(), 3, 0, 4 * page, DIRTYRING_HARVEST_NOW, &result), -EAGAIN);
    EXPECT_EQ(result.done, page);
    EXPECT_EQ(result.epoch, 9u);
    EXPECT_EQ(dirtyring_unmap(vm.get(), 3, 0, UINT64_MAX, DIRTYRING_HARVEST_NOW, nullptr), -EAGAIN);
}

TEST_F(ClientLibrary, RefusesAnUnmapThatWentTooFar)
{
    connect();
    service.answer([&](const dr_command &command) { service.complete(command, 0, 2 * page); });
    EXPECT_EQ(dirtyring_unmap(vm.get(), 3, 0, page, DIRTYRING_HARVEST_NOW, nullptr), -EPROTO);
}

TEST_F(ClientLibrary, GivesUpWhenTheServiceGoes)
{
    connect();
    std::thread killer([this] {
        std::this_thread::sleep_for(20ms);
        service.hang_up();
    });
    EXPECT_EQ(dirtyring_enable(vm.get(), 1), -ESHUTDOWN);
    killer.join();
    EXPECT_EQ(dirtyring_enable(vm.get(), 1), -ESHUTDOWN);
    EXPECT_EQ(dirtyring_queue_map(vm.get(), 1, 0, page, 0, DIRTYRING_READ, 1), -ESHUTDOWN);
    EXPECT_EQ(dirtyring_submit(vm.get()), -ESHUTDOWN);
}

TEST_F(ClientLibrary, PipelinesWithAnyUserData)
{
    connect();
    for (const std::uint64_t user_data : {UINT64_MAX, std::uint64_t{0}, std::uint64_t{5}, std::uint64_t{5}})
        EXPECT_EQ(dirtyring_queue_map(vm.get(), 1, 0, page, 0, DIRTYRING_READ, user_data), 0);
    EXPECT_TRUE(service.take_commands().empty());
    EXPECT_EQ(dirtyring_submit(vm.get()), 0);
    const auto commands = service.take_commands();
    ASSERT_EQ(commands.size(), 4u);
    EXPECT_THAT(reaped(), ElementsAre());
    for (const std::size_t i : {2u, 0u, 3u, 1u})
        service.complete(commands[i], 0);
    EXPECT_THAT(reaped(), ElementsAre(5u, UINT64_MAX, 5u, 0u));
}

TEST_F(ClientLibrary, KeepsPipelinedCompletionsThatAWaitMeets)
{
    connect();
    EXPECT_EQ(dirtyring_queue_map(vm.get(), 1, 0, page, 0, DIRTYRING_READ, 11), 0);
    EXPECT_EQ(dirtyring_queue_unmap(vm.get(), 1, 0, page, DIRTYRING_HARVEST_NOW, 12), 0);
    service.answer([&](const dr_command &command) { service.complete(command, 0); });
    EXPECT_EQ(dirtyring_enable(vm.get(), 1), 0); // submits what was queued before it
    EXPECT_FALSE(dirtyring_command_arm(vm.get()));
    EXPECT_THAT(reaped(), ElementsAre(11u, 12u));
    EXPECT_TRUE(dirtyring_command_arm(vm.get()));
}

TEST_F(ClientLibrary, SaysWhenItIsFull)
{
    connect();
    for (std::uint64_t i = 0; i < command_entries; ++i)
        EXPECT_EQ(dirtyring_queue_map(vm.get(), 1, 0, page, 0, DIRTYRING_READ, i), 0);
    EXPECT_EQ(dirtyring_queue_map(vm.get(), 1, 0, page, 0, DIRTYRING_READ, 0), -EAGAIN);
    EXPECT_EQ(dirtyring_enable(vm.get(), 1), -EBUSY);
    EXPECT_EQ(dirtyring_submit(vm.get()), 0);
    for (const dr_command &command : service.take_commands())
        service.complete(command, 0);
    EXPECT_EQ(dirtyring_enable(vm.get(), 1), -EBUSY); // they have not been reaped
    EXPECT_EQ(reaped().size(), command_entries);
    EXPECT_EQ(dirtyring_queue_map(vm.get(), 1, 0, page, 0, DIRTYRING_READ, 0), 0);
}

TEST_F(ClientLibrary, WakesTheUserWhoseCallAWaitSpent)
{
    connect();
    ASSERT_EQ(dirtyring_queue_map(vm.get(), 1, 0, page, 0, DIRTYRING_READ, 11), 0);
    ASSERT_EQ(dirtyring_submit(vm.get()), 0);
    ASSERT_TRUE(dirtyring_command_arm(vm.get()));
    EXPECT_FALSE(readable(dirtyring_command_fd(vm.get())));
    service.answer([&](const dr_command &command) {
        std::this_thread::sleep_for(5ms);
        service.complete(command, 0);
    });
    EXPECT_EQ(dirtyring_enable(vm.get(), 1), 0);
    EXPECT_TRUE(readable(dirtyring_command_fd(vm.get())));
    EXPECT_THAT(reaped(), ElementsAre(11u));
    EXPECT_TRUE(dirtyring_command_arm(vm.get()));
    EXPECT_FALSE(readable(dirtyring_command_fd(vm.get())));
}

TEST_F(ClientLibrary, CallsWhenArmed)
{
    connect();
    ASSERT_EQ(dirtyring_queue_map(vm.get(), 1, 0, page, 0, DIRTYRING_READ, 11), 0);
    ASSERT_EQ(dirtyring_submit(vm.get()), 0);
    ASSERT_TRUE(dirtyring_command_arm(vm.get()));
    service.complete(service.take_commands().at(0), 0);
    EXPECT_TRUE(readable(dirtyring_command_fd(vm.get())));
    EXPECT_THAT(reaped(), ElementsAre(11u));
}

TEST_F(ClientLibrary, BreaksOffOnACompletionOfNothing)
{
    connect();
    for (const std::uint64_t slot : {std::uint64_t{0}, UINT64_MAX}) {
        dr_command nobody{};
        nobody.user_data = slot;
        service.complete(nobody, 0);
    }
    EXPECT_EQ(dirtyring_enable(vm.get(), 1), -EPROTO);
    EXPECT_THAT(dirtyring_error(), HasSubstr("broke the rules"));
    EXPECT_TRUE(readable(dirtyring_socket(vm.get())));
}

TEST_F(ClientLibrary, BreaksOffOnAHeadBeyondTheRing)
{
    connect();
    std::atomic_ref(service.completion_region()->head).store(command_entries + 1);
    EXPECT_EQ(dirtyring_enable(vm.get(), 1), -EPROTO);
}

// ---- rings

class ClientRings : public ClientLibrary
{
  protected:
    void SetUp() override
    {
        for (int i = 0; i < 2; ++i)
            service.rings.emplace_back(8);
        connect();
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

    std::uint64_t start_sync(const Set &set)
    {
        EXPECT_EQ(dirtyring_set_sync(set.get()), 0) << dirtyring_error();
        const auto commands = service.take_commands();
        EXPECT_EQ(commands.size(), 1u);
        sync = commands.at(0);
        EXPECT_EQ(sync.opcode, static_cast<std::uint32_t>(DR_OP_SYNC));
        return dr_marker(DR_MARKER_SYNC, sync.cookie);
    }

    dr_command sync{};
};

TEST_F(ClientRings, ChecksTheHeader)
{
    service.rings[1].producer.map.as<dr_ring_producer>()->header.kind = DR_RING_COMPLETION;
    dirtyring_set *raw = nullptr;
    EXPECT_EQ(dirtyring_set_open(vm.get(), 1, &raw), -EPROTO);
    EXPECT_EQ(raw, nullptr);
    EXPECT_THAT(dirtyring_error(), HasSubstr("expected a ring of kind 1"));
}

TEST_F(ClientRings, OneRing)
{
    dirtyring_ring *ring = nullptr;
    EXPECT_EQ(dirtyring_ring_open(vm.get(), 1, 2, &ring), -ENOENT);
    ASSERT_EQ(dirtyring_ring_open(vm.get(), 1, 1, &ring), 0);
    const std::uint64_t *entries = nullptr;
    EXPECT_EQ(dirtyring_ring_peek(ring, &entries), 0u);
    EXPECT_TRUE(dirtyring_ring_arm(ring));
    EXPECT_FALSE(readable(dirtyring_ring_fd(ring)));
    service.rings[1].publish({dr_run(1, false, 1), dr_run(2, true, 3)});
    EXPECT_TRUE(readable(dirtyring_ring_fd(ring)));
    EXPECT_FALSE(dirtyring_ring_arm(ring));
    EXPECT_FALSE(readable(dirtyring_ring_fd(ring)));
    ASSERT_EQ(dirtyring_ring_peek(ring, &entries), 2u);
    EXPECT_EQ(entries[1], dr_run(2, true, 3));
    dirtyring_ring_release(ring, 1);
    EXPECT_FALSE(take_event(service.rings[1].kick));
    service.rings[1].entries->want_kick(true);
    dirtyring_ring_release(ring, 1);
    EXPECT_TRUE(take_event(service.rings[1].kick));
    EXPECT_TRUE(service.rings[1].entries->released());
    dirtyring_ring_close(ring);
}

TEST_F(ClientRings, ASetTakesItsRingsInTurn)
{
    const Set set = open_set();
    service.rings[1].publish({dr_run(10, false, 1)});
    EXPECT_THAT(next(set), ElementsAre(dr_run(10, false, 1)));
    service.rings[0].publish({dr_run(1, false, 1), dr_run(2, false, 1)});
    service.rings[1].publish({dr_run(11, false, 1)});
    EXPECT_EQ(next(set).size(), 2u);
    EXPECT_THAT(next(set), ElementsAre(dr_run(11, false, 1)));
    EXPECT_THAT(next(set), ElementsAre());
}

TEST_F(ClientRings, ASetIsWokenByAnyRing)
{
    const Set set = open_set();
    for (int i = 0; i < 4; ++i) {
        ASSERT_TRUE(dirtyring_set_arm(set.get()));
        ASSERT_FALSE(readable(dirtyring_set_fd(set.get())));
        service.rings[i % 2].publish({dr_run(1, false, 1)});
        EXPECT_TRUE(readable(dirtyring_set_fd(set.get())));
        EXPECT_FALSE(dirtyring_set_arm(set.get()));
        EXPECT_EQ(next(set).size(), 1u);
    }
}

TEST_F(ClientRings, ASetWaitsUntilARingCalls)
{
    const Set set = open_set();
    EXPECT_EQ(dirtyring_set_wait(set.get(), 0), 0);
    for (int i = 0; i < 4; ++i) {
        service.rings[i % 2].publish({dr_run(1, false, 1)});
        EXPECT_EQ(dirtyring_set_wait(set.get(), -1), 1) << "there already";
        EXPECT_EQ(next(set).size(), 1u);
        EXPECT_EQ(dirtyring_set_wait(set.get(), -1), 1) << "it has called, too";
        EXPECT_EQ(dirtyring_set_wait(set.get(), 1), 0) << "once";
    }
    std::thread later([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
        service.rings[1].publish({dr_run(2, false, 1)});
    });
    EXPECT_EQ(dirtyring_set_wait(set.get(), -1), 1);
    EXPECT_THAT(next(set), ElementsAre(dr_run(2, false, 1)));
    later.join();
}

TEST_F(ClientRings, SyncsWhenEveryMarkerIsReleased)
{
    const Set set = open_set();
    EXPECT_EQ(dirtyring_set_synced(set.get()), 0); // none was started
    std::uint64_t first_cookie = 0;
    for (int round = 0; round < 3; ++round) {
        const std::uint64_t marker = start_sync(set);
        EXPECT_NE(std::exchange(first_cookie, sync.cookie), sync.cookie);
        EXPECT_EQ(dirtyring_set_sync(set.get()), -EBUSY);
        service.rings[0].publish({dr_run(1, false, 1), marker});
        service.rings[1].publish({dr_marker(DR_MARKER_SYNC, 7), marker});
        service.complete(sync, 0);
        EXPECT_EQ(dirtyring_set_synced(set.get()), 0);
        EXPECT_EQ(next(set).size(), 2u);
        EXPECT_EQ(dirtyring_set_synced(set.get()), 0);

        dirtyring_batch batch{};
        ASSERT_TRUE(dirtyring_set_peek(set.get(), &batch));
        ASSERT_EQ(batch.count, 2u);
        batch.count = 1; // the other sync's marker alone
        dirtyring_set_release(set.get(), &batch);
        EXPECT_EQ(dirtyring_set_synced(set.get()), 0);
        ++batch.entries;
        dirtyring_set_release(set.get(), &batch);
        EXPECT_EQ(dirtyring_set_synced(set.get()), 1);
        EXPECT_EQ(dirtyring_set_synced(set.get()), 1);
    }
}

TEST_F(ClientRings, ASyncStartsOnceThereIsRoom)
{
    const Set set = open_set();
    const auto finish_sync = [&] {
        const std::uint64_t marker = start_sync(set);
        for (DirtyRing &ring : service.rings)
            ring.publish({marker});
        service.complete(sync, 0);
        EXPECT_THAT(next(set), ElementsAre(marker));
        EXPECT_THAT(next(set), ElementsAre(marker));
        EXPECT_EQ(dirtyring_set_synced(set.get()), 1);
        EXPECT_THAT(reaped(), ElementsAre()); // takes the completion, and so frees its place
    };
    finish_sync();
    for (std::uint64_t i = 0; i < command_entries; ++i)
        EXPECT_EQ(dirtyring_queue_map(vm.get(), 1, i * page, page, 0, DIRTYRING_READ, i), 0);
    EXPECT_EQ(dirtyring_submit(vm.get()), 0);
    EXPECT_EQ(dirtyring_set_sync(set.get()), -EBUSY);
    EXPECT_EQ(dirtyring_set_synced(set.get()), -EBUSY); // not what the sync before came to
    service.rings[0].publish({dr_run(1, false, 1)});
    EXPECT_THAT(next(set), ElementsAre(dr_run(1, false, 1)));
    for (auto taken = service.take_commands(); !taken.empty(); taken = service.take_commands())
        for (const dr_command &command : taken)
            service.complete(command, 0);
    EXPECT_EQ(dirtyring_set_sync(set.get()), -EBUSY); // they have not been reaped
    EXPECT_EQ(reaped().size(), command_entries);
    finish_sync();
}

TEST_F(ClientRings, ASyncTakesNoCompletionOfTheUsers)
{
    const Set set = open_set();
    EXPECT_EQ(dirtyring_queue_sync(vm.get(), 1, 1ull << 43, 0), -EINVAL);
    ASSERT_EQ(dirtyring_queue_sync(vm.get(), 1, 42, 0), 0);
    ASSERT_EQ(dirtyring_set_sync(set.get()), 0);
    const auto commands = service.take_commands();
    ASSERT_EQ(commands.size(), 2u);
    EXPECT_EQ(commands[0].cookie, 42u);
    for (const dr_command &command : commands)
        service.complete(command, 0);
    EXPECT_EQ(dirtyring_set_synced(set.get()), 0);
    EXPECT_THAT(reaped(), ElementsAre(0u));
}

TEST_F(ClientRings, ASyncFails)
{
    const Set set = open_set();
    start_sync(set);
    service.complete(sync, -EOPNOTSUPP);
    EXPECT_EQ(dirtyring_set_synced(set.get()), -EOPNOTSUPP);
    EXPECT_THAT(dirtyring_error(), HasSubstr("no dirty tracking"));

    start_sync(set);
    service.rings[1].publish({dr_marker(DR_MARKER_END, 0)});
    EXPECT_EQ(next(set).size(), 1u);
    EXPECT_EQ(dirtyring_set_synced(set.get()), -ECANCELED);
    service.complete(sync, -ECANCELED); // of a sync that is over: nobody gets it
    EXPECT_THAT(reaped(), ElementsAre());

    start_sync(set);
    service.hang_up();
    EXPECT_EQ(dirtyring_set_synced(set.get()), -ECANCELED); // ring 1 is still over
    EXPECT_EQ(dirtyring_set_sync(set.get()), 0);
}

TEST_F(ClientRings, ASyncFailsWhenTheServiceGoes)
{
    const Set set = open_set();
    start_sync(set);
    service.hang_up();
    EXPECT_EQ(dirtyring_set_synced(set.get()), -ESHUTDOWN);
    EXPECT_EQ(dirtyring_set_sync(set.get()), -ESHUTDOWN);
}

TEST_F(ClientRings, ClosingASetForgetsItsSync)
{
    Set set = open_set();
    start_sync(set);
    set.reset();
    service.complete(sync, 0);
    for (std::uint64_t i = 0; i < command_entries; ++i) {
        EXPECT_THAT(reaped(), ElementsAre());
        EXPECT_EQ(dirtyring_queue_map(vm.get(), 1, 0, page, 0, DIRTYRING_READ, i), 0);
    }
}

// Each thread collects the other's completions; neither may sleep through its own.
TEST_F(ClientRings, SyncsBesideAThreadThatMaps)
{
    const Set set = open_set();
    service.answer([this](const dr_command &command) {
        std::this_thread::sleep_for(70us); // longer than a waiting call spins
        if (command.opcode == DR_OP_SYNC) {
            for (DirtyRing &ring : service.rings)
                ring.publish({dr_marker(DR_MARKER_SYNC, command.cookie)});
        }
        service.complete(command, 0);
    });
    std::atomic<bool> done = false;
    std::thread mapper([&] {
        for (std::uint64_t i = 0; !done; ++i)
            ASSERT_EQ(dirtyring_map(vm.get(), 1, i * page, page, 0, DIRTYRING_READ), 0) << dirtyring_error();
    });
    for (int i = 0; i < 300; ++i) {
        ASSERT_EQ(dirtyring_set_sync(set.get()), 0) << dirtyring_error();
        while (dirtyring_set_synced(set.get()) == 0) {
            while (!next(set).empty()) {
            }
        }
        ASSERT_EQ(dirtyring_set_synced(set.get()), 1) << dirtyring_error();
    }
    done = true;
    mapper.join();
}

TEST_F(ClientRings, SleepsUntilSynced)
{
    const Set set = open_set();
    service.answer([this](const dr_command &command) {
        service.complete(command, 0);
        for (DirtyRing &ring : service.rings) {
            std::this_thread::sleep_for(100us);
            ring.publish({dr_marker(DR_MARKER_SYNC, command.cookie)});
        }
    });
    for (int i = 0; i < 50; ++i) {
        ASSERT_EQ(dirtyring_set_sync(set.get()), 0) << dirtyring_error();
        while (dirtyring_set_synced(set.get()) == 0) {
            while (!next(set).empty()) {
            }
            if (dirtyring_set_synced(set.get()) == 0 && dirtyring_set_arm(set.get())) {
                ASSERT_TRUE(readable(dirtyring_set_fd(set.get()), 10s));
            }
        }
        ASSERT_EQ(dirtyring_set_synced(set.get()), 1) << dirtyring_error();
    }
}

// ---- devices

TEST_F(ClientDevice, WritesAndReads)
{
    attach();
    dirtyring_dma *dma = dirtyring_device_dma(device, 1);
    ASSERT_NE(dma, nullptr);
    EXPECT_EQ(dirtyring_device_dma(device, 2), nullptr);
    char got[4] = {};
    EXPECT_EQ(dirtyring_dma_read(dma, iova, got, sizeof got, nullptr), 0);
    EXPECT_FALSE(is_dirty(iova));
    EXPECT_EQ(dirtyring_dma_write(dma, iova + 8, "abc", 4, nullptr), 0) << dirtyring_error();
    EXPECT_STREQ(memory.map.as<char>(page + 8), "abc");
    EXPECT_TRUE(is_dirty(iova));
    EXPECT_EQ(dirtyring_dma_read(dma, iova + 8, got, sizeof got, nullptr), 0);
    EXPECT_STREQ(got, "abc");
    EXPECT_EQ(cells.map.as<dr_cell>()[0].count, 0u);
    EXPECT_EQ(cells.map.as<dr_cell>()[1].count, 6u);
    EXPECT_EQ(dirtyring_device_detach(device), 0);
}

TEST_F(ClientDevice, SplitsWhatIsLong)
{
    attach();
    const std::string data(200 * 1024, 'd');
    dirtyring_dma *dma = dirtyring_device_dma(device, 0);
    EXPECT_EQ(dirtyring_dma_write(dma, large_iova + 1, data.data(), data.size(), nullptr), 0) << dirtyring_error();
    EXPECT_EQ(std::memcmp(memory.map.data() + large_iova + 1, data.data(), data.size()), 0);
    EXPECT_EQ(cells.map.as<dr_cell>()->count, 2u * 4);
    dirtyring_dma_begin(dma);
    EXPECT_EQ(dirtyring_dma_write(dma, large_iova, data.data(), data.size(), nullptr), 0);
    EXPECT_EQ(dirtyring_device_detach(device), -EBUSY);
    EXPECT_EQ(cells.map.as<dr_cell>()->count, 9u);
    dirtyring_dma_end(dma);
    EXPECT_EQ(cells.map.as<dr_cell>()->count, 10u);
    EXPECT_EQ(dirtyring_device_detach(device), 0);
}

TEST_F(ClientDevice, RingsASleepingWalker)
{
    attach();
    dirtyring_dma *dma = dirtyring_device_dma(device, 0);
    control().asleep = 1;
    EXPECT_EQ(dirtyring_dma_write(dma, iova, "a", 1, nullptr), 0);
    EXPECT_TRUE(take_event(doorbell));
    EXPECT_EQ(dirtyring_dma_write(dma, iova, "b", 1, nullptr), 0); // its table bit is set already
    EXPECT_FALSE(take_event(doorbell));
    EXPECT_EQ(dirtyring_device_detach(device), 0);
}

TEST_F(ClientDevice, TellsWhyItFaults)
{
    attach();
    dirtyring_dma *dma = dirtyring_device_dma(device, 0);
    const std::string data(2 * page, 'd');
    dirtyring_fault fault{};
    EXPECT_EQ(dirtyring_dma_write(dma, iova, data.data(), data.size(), &fault), -EFAULT);
    EXPECT_STREQ(dirtyring_error(), "DMA write at iova 0x6000: the map forbids writing");
    EXPECT_EQ(fault.reason, static_cast<std::uint32_t>(DIRTYRING_FAULT_WRITE));
    EXPECT_EQ(fault.iova, iova + page);
    EXPECT_EQ(fault.done, page);
    EXPECT_EQ(fault.write, 1u);
    EXPECT_EQ(dirtyring_dma_write(dma, 0, "a", 1, &fault), -EFAULT);
    EXPECT_EQ(fault.reason, static_cast<std::uint32_t>(DIRTYRING_FAULT_NOT_PRESENT));
    EXPECT_EQ(dirtyring_dma_write(dma, 1ull << 30, "a", 1, &fault), -EFAULT);
    EXPECT_EQ(fault.reason, static_cast<std::uint32_t>(DIRTYRING_FAULT_APERTURE));
    EXPECT_EQ(dirtyring_dma_write(dma, iova + 2 * page, "a", 1, &fault), -EFAULT);
    EXPECT_EQ(fault.reason, static_cast<std::uint32_t>(DIRTYRING_FAULT_MEMORY));
    // Where a long DMA stops, behind whole sections of its own.
    const std::string longer(3ull << 20, 'd');
    EXPECT_EQ(dirtyring_dma_write(dma, large_iova, longer.data(), longer.size(), &fault), -EFAULT);
    EXPECT_EQ(fault.done, 2ull << 20);
    EXPECT_EQ(cells.map.as<dr_cell>()->count % 2, 0u);
    EXPECT_EQ(dirtyring_device_detach(device), 0);
}

TEST_F(ClientDevice, ChecksTheTranslationAndDetaches)
{
    translation.map.as<dr_translation_header>()->tables *= 2;
    EXPECT_EQ(try_attach(), -EPROTO);
    EXPECT_EQ(device, nullptr);
    EXPECT_THAT(dirtyring_error(), HasSubstr("translation"));
    service.hang_up();
    EXPECT_THAT(service.requests, ElementsAre(DR_HELLO, DR_DEVICE_ATTACH, DR_DEVICE_DETACH));
}

TEST_F(ClientDevice, ChecksTheMemory)
{
    const auto attach_reply = service.on[DR_DEVICE_ATTACH];
    service.on[DR_DEVICE_ATTACH] = [&](const std::string &payload) {
        Reply reply = attach_reply(payload);
        dr_device changed;
        std::memcpy(&changed, reply.payload.data(), sizeof changed);
        changed.region[0].length += page;
        return reply_of(changed, std::move(reply.fds));
    };
    EXPECT_EQ(try_attach(), -EPROTO);
    EXPECT_THAT(dirtyring_error(), HasSubstr("ends behind its file"));
}

TEST_F(ClientDevice, ChecksTheNumberOfShards)
{
    service.on[DR_DEVICE_ATTACH] = [](auto &) {
        dr_device device{};
        device.shards = DR_SHARDS_MAX + 1;
        return reply_of(device);
    };
    EXPECT_EQ(try_attach(), -EPROTO);
}

TEST_F(ClientDevice, DetachesFromAServiceThatIsGone)
{
    attach();
    service.hang_up();
    EXPECT_EQ(dirtyring_device_detach(device), 0);
    EXPECT_EQ(dirtyring_device_detach(nullptr), 0);
}

TEST_F(ClientDevice, StaysWhenTheServiceRefusesToDetach)
{
    bool refuse = true;
    service.on[DR_DEVICE_DETACH] = [&](auto &) {
        if (std::exchange(refuse, false))
            throw Refuse{EBUSY, "a thread is inside"};
        return reply_of(dr_empty{});
    };
    attach();
    EXPECT_EQ(dirtyring_device_detach(device), -EBUSY);
    EXPECT_EQ(dirtyring_device_detach(device), 0);
}

} // namespace
} // namespace dirtyring::test
