// libdirtyring against a service that does what each test tells it to.
#include "client/dirtyring_device.h"
#include "iommu/format_amdv1.hpp"
#include "iommu/geometry.hpp"
#include "ring/consumer.hpp"
#include "ring/producer.hpp"
#include "ring/region.hpp"
#include "ring/socket.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <poll.h>
#include <string>
#include <sys/eventfd.h>
#include <sys/un.h>
#include <thread>
#include <vector>

namespace {

using dirtyring::ring::Consumer;
using dirtyring::ring::Fd;
using dirtyring::ring::FdList;
using dirtyring::ring::Pages;
using dirtyring::ring::Producer;
using dirtyring::ring::Region;
using testing::ElementsAre;
using testing::HasSubstr;
using namespace std::chrono_literals;

constexpr std::uint32_t command_entries = 256;
constexpr std::uint64_t page = 4096;

Fd event()
{
    return Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
}

Fd copy_of(const Fd &fd)
{
    return Fd(::fcntl(fd.get(), F_DUPFD_CLOEXEC, 0));
}

void signal(const Fd &fd)
{
    const std::uint64_t one = 1;
    ASSERT_EQ(::write(fd.get(), &one, sizeof one), static_cast<ssize_t>(sizeof one));
}

bool readable(int fd, std::chrono::milliseconds within = 0ms)
{
    pollfd waiting{fd, POLLIN, 0};
    return ::poll(&waiting, 1, static_cast<int>(within.count())) == 1;
}

bool take_event(const Fd &fd)
{
    std::uint64_t count = 0;
    return ::read(fd.get(), &count, sizeof count) == sizeof count;
}

void make_ring(dr_ring_producer *region, dr_ring_kind kind, std::uint64_t capacity, std::uint32_t entry_size)
{
    dr_ring_header header{};
    header.kind = kind;
    header.capacity = capacity;
    header.entry_size = entry_size;
    dirtyring::ring::make_producer_region(region, header);
}

// A ring as the service has it.
struct DirtyRing {
    explicit DirtyRing(std::uint64_t capacity)
    {
        EXPECT_EQ(producer.make("producer", dirtyring::ring::producer_region_size(capacity, 8), Pages::present), 0);
        EXPECT_EQ(consumer.make("consumer", DR_PAGE, Pages::present), 0);
        make_ring(producer.map.as<dr_ring_producer>(), DR_RING_DIRTY, capacity, 8);
        entries.emplace(producer.map.as<dr_ring_producer>(), consumer.map.as<dr_ring_consumer>());
    }

    void publish(std::initializer_list<std::uint64_t> values)
    {
        std::uint64_t n = 0;
        for (const std::uint64_t value : values)
            entries->put(n++, value);
        entries->stage(n);
        if (entries->publish())
            signal(call);
    }

    Region producer;
    Region consumer;
    Fd call = event();
    Fd kick = event();
    std::optional<Producer<std::uint64_t>> entries;
};

struct Reply {
    std::string payload; // of any reply struct; its size field is filled in
    std::vector<Fd> fds;
};

template <class T> Reply reply_of(T payload, std::vector<Fd> fds = {})
{
    payload.size = sizeof payload;
    return {std::string(reinterpret_cast<const char *>(&payload), sizeof payload), std::move(fds)};
}

struct Refuse {
    int error;
    std::string sentence;
};

class FakeService
{
  public:
    FakeService()
    {
        const std::size_t front_end_size =
            DR_PAGE + dirtyring::ring::producer_region_size(command_entries, sizeof(dr_command));
        const std::size_t service_size =
            DR_PAGE + dirtyring::ring::producer_region_size(command_entries, sizeof(dr_completion));
        EXPECT_EQ(front_end.make("front-end", front_end_size, Pages::present), 0);
        EXPECT_EQ(service.make("service", service_size, Pages::present), 0);
        make_ring(submission_region(), DR_RING_SUBMISSION, command_entries, sizeof(dr_command));
        make_ring(completion_region(), DR_RING_COMPLETION, command_entries, sizeof(dr_completion));
        submissions.emplace(service.map.as<dr_ring_consumer>(), submission_region(), command_entries);
        completions.emplace(completion_region(), front_end.map.as<dr_ring_consumer>());

        on[DR_HELLO] = [](auto &) { return reply_of(dr_hello{0, DR_PROTOCOL_VERSION, DR_FEATURES_ALL}); };
        on[DR_GUEST_CREATE] = [this](auto &) {
            dr_guest guest{};
            guest.command_entries = command_entries;
            std::memset(guest.token, 0x5a, sizeof guest.token);
            std::vector<Fd> fds;
            fds.push_back(copy_of(front_end.fd));
            Fd read_only;
            EXPECT_EQ(service.read_only(read_only), 0);
            fds.push_back(std::move(read_only));
            fds.push_back(copy_of(kick));
            fds.push_back(copy_of(call));
            return reply_of(guest, std::move(fds));
        };
        on[DR_RING_GET] = [this](const std::string &payload) {
            dr_ring_get request{};
            std::memcpy(&request, payload.data(), sizeof request);
            if (request.shard >= rings.size())
                throw Refuse{ENOENT, "no such shard"};
            DirtyRing &ring = rings[request.shard];
            std::vector<Fd> fds;
            Fd read_only;
            EXPECT_EQ(ring.producer.read_only(read_only), 0);
            fds.push_back(std::move(read_only));
            fds.push_back(copy_of(ring.consumer.fd));
            fds.push_back(copy_of(ring.call));
            fds.push_back(copy_of(ring.kick));
            return reply_of(dr_ring{0, static_cast<std::uint32_t>(rings.size())}, std::move(fds));
        };
    }

    ~FakeService()
    {
        hang_up();
        stop_answering();
    }

    // The client's end of a connection that is served in a thread.
    int connect()
    {
        int ends[2];
        EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
        serve(Fd(ends[1]));
        return ends[0];
    }

    void serve(Fd accepted)
    {
        socket = std::move(accepted);
        server = std::thread([this] {
            while (serve_one()) {
            }
            ::shutdown(socket.get(), SHUT_RDWR);
        });
    }

    void hang_up()
    {
        if (!server.joinable())
            return;
        ::shutdown(socket.get(), SHUT_RDWR);
        server.join();
    }

    dr_ring_producer *submission_region() { return front_end.map.as<dr_ring_producer>(DR_PAGE); }
    dr_ring_producer *completion_region() { return service.map.as<dr_ring_producer>(DR_PAGE); }

    std::vector<dr_command> take_commands()
    {
        const auto batch = submissions->peek();
        std::vector<dr_command> commands(batch.begin(), batch.end());
        EXPECT_FALSE(submissions->release(commands.size()));
        return commands;
    }

    void complete(const dr_command &command, int result, std::uint64_t done = 0, std::uint64_t epoch = 0)
    {
        completions->put(0, {command.user_data, result, 0, done, epoch});
        completions->stage(1);
        if (completions->publish())
            signal(call);
    }

    // From now on a thread answers commands as they are kicked in.
    void answer(std::function<void(const dr_command &)> answer_one)
    {
        worker = std::thread([this, answer_one = std::move(answer_one)] {
            while (!stopping) {
                for (const dr_command &command : take_commands())
                    answer_one(command);
                if (submissions->arm() && readable(kick.get(), 10s))
                    take_event(kick);
            }
        });
    }

    void stop_answering()
    {
        if (!worker.joinable())
            return;
        stopping = true;
        signal(kick);
        worker.join();
    }

    std::map<std::uint32_t, std::function<Reply(const std::string &)>> on; // handlers by request; may throw Refuse
    std::uint32_t sequence_offset = 0;                                     // added to that of replies
    std::vector<std::uint32_t> requests;                                   // served; read after hang_up()
    FdList received;
    Region front_end;
    Region service;
    Fd kick = event();
    Fd call = event();
    std::optional<Consumer<dr_command>> submissions;
    std::optional<Producer<dr_completion>> completions;
    std::deque<DirtyRing> rings;

  private:
    bool read_all(void *to, std::size_t size)
    {
        for (std::size_t done = 0; done < size;) {
            iovec piece{static_cast<char *>(to) + done, size - done};
            msghdr msg{};
            msg.msg_iov = &piece;
            msg.msg_iovlen = 1;
            received.prepare(msg);
            const ssize_t n = ::recvmsg(socket.get(), &msg, MSG_CMSG_CLOEXEC);
            if (n <= 0)
                return false;
            EXPECT_TRUE(received.take_from(msg));
            done += static_cast<std::size_t>(n);
        }
        return true;
    }

    bool serve_one()
    {
        dr_message_header header{};
        received.close_all();
        if (!read_all(&header, sizeof header))
            return false;
        std::string payload(header.size, '\0');
        if (!read_all(payload.data(), payload.size()))
            return false;
        requests.push_back(header.request);
        EXPECT_EQ(header.flags, DR_PROTOCOL_VERSION);
        header.flags |= DR_MESSAGE_REPLY;
        Reply reply;
        try {
            const auto handler = on.find(header.request);
            if (handler == on.end())
                throw Refuse{EOPNOTSUPP, "unknown request"};
            reply = handler->second(payload);
        } catch (const Refuse &refuse) {
            header.flags |= DR_MESSAGE_REFUSAL;
            dr_refusal refusal{};
            refusal.error = refuse.error;
            std::memcpy(refusal.sentence, refuse.sentence.data(),
                        std::min(refuse.sentence.size(), sizeof refusal.sentence));
            reply = reply_of(refusal);
        }
        header.size = static_cast<std::uint32_t>(reply.payload.size());
        header.sequence += sequence_offset;
        // In two pieces and with a pause, as a stream may bring it.
        FdList fds;
        for (Fd &fd : reply.fds)
            fds.add(std::move(fd));
        iovec piece{&header, sizeof header};
        msghdr msg{};
        msg.msg_iov = &piece;
        msg.msg_iovlen = 1;
        fds.attach_to(msg);
        if (::sendmsg(socket.get(), &msg, MSG_NOSIGNAL) < 0)
            return false;
        std::this_thread::yield();
        return ::send(socket.get(), reply.payload.data(), reply.payload.size(), MSG_NOSIGNAL) >= 0;
    }

    Fd socket;
    std::thread server;
    std::thread worker;
    std::atomic<bool> stopping = false;
};

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
    attr.reserved[3] = 1;
    EXPECT_EQ(dirtyring_hwpt_alloc(vm.get(), ioas, &attr, &hwpt), -EINVAL);
    EXPECT_EQ(dirtyring_destroy(vm.get(), hwpt), -EOPNOTSUPP);
    EXPECT_STREQ(dirtyring_error(), "unknown request");
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

// An hwpt with 1 GiB of IOVA space, of which one page is mapped writable and one read-only.
class ClientDevice : public testing::Test
{
  protected:
    static constexpr std::uint64_t iova = 5 * page;
    static constexpr std::uint64_t large_iova = 2ull << 20;

    void SetUp() override
    {
        ASSERT_NE(::mkdtemp(directory.data()), nullptr);
        path = directory + "/socket";
        listener = Fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        std::memcpy(address.sun_path, path.data(), path.size());
        ASSERT_EQ(::bind(listener.get(), reinterpret_cast<const sockaddr *>(&address), sizeof address), 0);
        ASSERT_EQ(::listen(listener.get(), 1), 0);

        geometry = dirtyring::iommu::make_geometry(DR_FORMAT_AMDV1, 30, 1);
        ASSERT_EQ(tables.make("tables", geometry.tables_size, Pages::sparse), 0);
        ASSERT_EQ(translation.make("translation", geometry.translation_size, Pages::present), 0);
        ASSERT_EQ(cells.make("cells", 2 * sizeof(dr_cell), Pages::present), 0);
        ASSERT_EQ(memory.make("memory", 4ull << 20, Pages::present), 0);
        std::memcpy(translation.map.data(), &geometry, sizeof geometry);
        control().tracking = 1;
        build_tables();

        service.on[DR_DEVICE_ATTACH] = [this](auto &) {
            dr_device device{};
            device.id = 8;
            device.shards = 1;
            device.regions = 1;
            device.region[0] = {0, memory.map.size(), 0};
            std::vector<Fd> fds;
            fds.push_back(copy_of(tables.fd));
            Fd read_only;
            EXPECT_EQ(translation.read_only(read_only), 0);
            fds.push_back(std::move(read_only));
            fds.push_back(copy_of(cells.fd));
            fds.push_back(copy_of(doorbell));
            fds.push_back(copy_of(memory.fd));
            return reply_of(device, std::move(fds));
        };
        service.on[DR_DEVICE_DETACH] = [](auto &) { return reply_of(dr_empty{}); };
    }

    void TearDown() override
    {
        ::unlink(path.c_str());
        ::rmdir(directory.c_str());
    }

    int try_attach()
    {
        std::thread acceptor([this] { service.serve(Fd(::accept(listener.get(), nullptr, nullptr))); });
        const std::uint8_t token[DR_TOKEN_BYTES] = {};
        dirtyring_attach attach{};
        attach.token = token;
        attach.hwpt = 1;
        attach.threads = 2;
        const int error = dirtyring_device_attach(path.c_str(), &attach, &device);
        acceptor.join();
        return error;
    }

    void attach() { ASSERT_EQ(try_attach(), 0) << dirtyring_error(); }

    dr_shard_control &control() { return *translation.map.as<dr_shard_control>(geometry.shard_controls); }
    std::uint64_t &entry(std::uint64_t table, std::uint64_t index)
    {
        return *tables.map.as<std::uint64_t>(geometry.table_pages + table * page + index * 8);
    }
    bool is_dirty(std::uint64_t at) { return dirtyring::iommu::AmdV1::dirty(entry(first + 1, at / page)); }

    void build_tables()
    {
        using dirtyring::iommu::AmdV1;
        first = dirtyring::iommu::first_table(geometry, 0) + 1;
        entry(geometry.root, 0) = AmdV1::table(first, 1);
        entry(first, 0) = AmdV1::table(first + 1, 0);
        entry(first, 1) = AmdV1::leaf(2ull << 20, 1, {true, true});
        entry(first + 1, iova / page) = AmdV1::leaf(page, 0, {true, true});
        entry(first + 1, iova / page + 1) = AmdV1::leaf(2 * page, 0, {true, false});
        entry(first + 1, iova / page + 2) = AmdV1::leaf(1ull << 40, 0, {true, true});
    }

    std::string directory = "/tmp/dirtyring-test-XXXXXX";
    std::string path;
    Fd listener;
    dr_translation_header geometry{};
    std::uint64_t first = 0; // table below the root
    Region tables;
    Region translation;
    Region cells;
    Region memory;
    Fd doorbell = event();
    FakeService service;
    dirtyring_device *device = nullptr;
};

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
