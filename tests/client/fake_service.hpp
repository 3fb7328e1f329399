// A service for libdirtyring that does what each test tells it to, dying included, and an hwpt of its own for devices.
#pragma once

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
#include <optional>
#include <poll.h>
#include <string>
#include <sys/eventfd.h>
#include <sys/un.h>
#include <thread>
#include <vector>

namespace dirtyring::test {

using ring::Consumer;
using ring::Fd;
using ring::FdList;
using ring::Pages;
using ring::Producer;
using ring::Region;
using testing::ElementsAre;
using testing::HasSubstr;
using namespace std::chrono_literals;

constexpr std::uint32_t command_entries = 256;
constexpr std::uint64_t page = 4096;

inline Fd event()
{
    return Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
}

inline Fd copy_of(const Fd &fd)
{
    return Fd(::fcntl(fd.get(), F_DUPFD_CLOEXEC, 0));
}

inline void signal(const Fd &fd)
{
    const std::uint64_t one = 1;
    ASSERT_EQ(::write(fd.get(), &one, sizeof one), static_cast<ssize_t>(sizeof one));
}

inline bool readable(int fd, std::chrono::milliseconds within = 0ms)
{
    pollfd waiting{fd, POLLIN, 0};
    return ::poll(&waiting, 1, static_cast<int>(within.count())) == 1;
}

inline bool take_event(const Fd &fd)
{
    std::uint64_t count = 0;
    return ::read(fd.get(), &count, sizeof count) == sizeof count;
}

inline void make_ring(dr_ring_producer *region, dr_ring_kind kind, std::uint64_t capacity, std::uint32_t entry_size)
{
    dr_ring_header header{};
    header.kind = kind;
    header.capacity = capacity;
    header.entry_size = entry_size;
    ring::make_producer_region(region, header);
}

// A ring as the service has it.
struct DirtyRing {
    explicit DirtyRing(std::uint64_t capacity)
    {
        EXPECT_EQ(producer.make("producer", ring::producer_region_size(capacity, 8), Pages::present), 0);
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
    std::string behind = {}; // what comes unasked
};

template <class T> Reply reply_of(T payload, std::vector<Fd> fds = {})
{
    payload.size = sizeof payload;
    return {std::string(reinterpret_cast<const char *>(&payload), sizeof payload), std::move(fds)};
}

// When a worker dies.
enum class Death { before_reading, before_reply, in_reply };

struct Refuse {
    int error;
    std::string sentence;
};

class FakeService
{
  public:
    FakeService()
    {
        const std::size_t front_end_size = DR_PAGE + ring::producer_region_size(command_entries, sizeof(dr_command));
        const std::size_t service_size = DR_PAGE + ring::producer_region_size(command_entries, sizeof(dr_completion));
        EXPECT_EQ(front_end.make("front-end", front_end_size, Pages::present), 0);
        EXPECT_EQ(service.make("service", service_size, Pages::present), 0);
        make_ring(submission_region(), DR_RING_SUBMISSION, command_entries, sizeof(dr_command));
        make_ring(completion_region(), DR_RING_COMPLETION, command_entries, sizeof(dr_completion));
        submissions.emplace(service.map.as<dr_ring_consumer>(), submission_region(), command_entries);
        completions.emplace(completion_region(), front_end.map.as<dr_ring_consumer>());

        on[DR_HELLO] = [](auto &) { return reply_of(dr_hello{0, DR_PROTOCOL_VERSION, DR_FEATURES_ALL}); };
        on[DR_GUEST_CREATE] = [this](const std::string &payload) {
            dr_guest_create request{};
            std::memcpy(&request, payload.data(), sizeof request);
            const std::string secret(reinterpret_cast<const char *>(request.secret), sizeof request.secret);
            if (request.flags != 0 && (created.empty() || secret != this->secret))
                throw Refuse{ENOENT, "no guest has this secret"};
            this->secret = secret;
            created.push_back(request);
            dr_guest guest{};
            guest.sequence = done_sequence;
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
        on[DR_GUEST_DESTROY] = [](auto &) { return reply_of(dr_empty{}); };
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
        if (!path.empty()) {
            ::unlink(path.c_str());
            ::rmdir(directory.c_str());
        }
    }

    // The client's end of a connection that is served in a thread.
    int connect()
    {
        int ends[2];
        EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
        work(Fd(ends[1]));
        return ends[0];
    }

    // Serves whoever connects to `path`, one after the other: one worker after the other, as its clients see it.
    void listen()
    {
        ASSERT_NE(::mkdtemp(directory.data()), nullptr);
        path = directory + "/socket";
        listener = Fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        std::memcpy(address.sun_path, path.data(), path.size());
        ASSERT_EQ(::bind(listener.get(), reinterpret_cast<const sockaddr *>(&address), sizeof address), 0);
        ASSERT_EQ(::listen(listener.get(), 1), 0);
        restart();
    }

    // The worker dies; whoever keeps the listener does not.
    void die()
    {
        if (!server.joinable())
            return;
        signal(stop);
        server.join();
        take_event(stop);
    }

    void restart() { work({}); }

    // Dies for good.
    void hang_up()
    {
        die();
        listener = Fd();
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
    std::map<std::uint32_t, Death> deaths;                                 // at the next such request
    std::vector<std::uint32_t> requests;                                   // served; read after hang_up()
    std::vector<std::uint32_t> sequences;                                  // of those
    std::vector<dr_guest_create> created;                                  // or taken; read after hang_up()
    FdList received;
    Region front_end;
    Region service;
    Fd kick = event();
    Fd call = event();
    std::optional<Consumer<dr_command>> submissions;
    std::optional<Producer<dr_completion>> completions;
    std::deque<DirtyRing> rings;
    std::string path;
    Fd listener;

  private:
    static bool changes(std::uint32_t request)
    {
        return request == DR_MEMORY_ADD || request == DR_IOAS_ALLOC || request == DR_HWPT_ALLOC ||
               request == DR_DESTROY;
    }

    void work(Fd connected)
    {
        socket = std::move(connected);
        server = std::thread([this] {
            while (socket || accept()) {
                while (serve_one()) {
                }
                socket = Fd();
            }
        });
    }

    bool accept()
    {
        if (!listener || !stirs(listener))
            return false;
        socket = Fd(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
        return true;
    }

    // Sleeps until there is something. False: it is time to die.
    bool stirs(const Fd &fd)
    {
        pollfd fds[] = {{fd.get(), POLLIN, 0}, {stop.get(), POLLIN, 0}};
        ::poll(fds, 2, -1);
        return fds[1].revents == 0;
    }

    // Whether the worker dies at this moment of this request; it does so once.
    bool dies(std::uint32_t request, Death moment)
    {
        const auto death = deaths.find(request);
        if (death == deaths.end() || death->second != moment)
            return false;
        deaths.erase(death);
        return true;
    }

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
        if (!stirs(socket) || ::recv(socket.get(), &header, sizeof header, MSG_PEEK) != sizeof header ||
            dies(header.request, Death::before_reading) || !read_all(&header, sizeof header))
            return false;
        std::string payload(header.size, '\0');
        if (!read_all(payload.data(), payload.size()))
            return false;
        requests.push_back(header.request);
        sequences.push_back(header.sequence);
        EXPECT_EQ(header.flags, DR_PROTOCOL_VERSION);
        header.flags |= DR_MESSAGE_REPLY;
        Reply reply;
        try {
            const bool change = changes(header.request);
            const auto handler = on.find(header.request);
            if (handler == on.end())
                throw Refuse{EOPNOTSUPP, "unknown request"};
            if (change && header.sequence == done_sequence)
                reply.payload = done_reply;
            else
                reply = handler->second(payload);
            if (change) {
                done_sequence = header.sequence;
                done_reply = reply.payload;
            }
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
        if (dies(header.request, Death::before_reply))
            return false;
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
        const bool whole = !dies(header.request, Death::in_reply);
        const std::string rest = whole ? reply.payload + reply.behind : reply.payload.substr(reply.payload.size() / 2);
        return ::send(socket.get(), rest.data(), rest.size(), MSG_NOSIGNAL) >= 0 && whole;
    }

    std::string directory = "/tmp/dirtyring-test-XXXXXX";
    std::string secret;              // of the guest
    std::uint32_t done_sequence = 0; // of the last request that changed the guest
    std::string done_reply;
    Fd stop = event();
    Fd socket;
    std::thread server;
    std::thread worker;
    std::atomic<bool> stopping = false;
};

// ---- devices

// An hwpt with 1 GiB of IOVA space, of which one page is mapped writable and one read-only.
class ClientDevice : public testing::Test
{
  protected:
    explicit ClientDevice(std::uint32_t pins = 0) : pins(pins) {}

    static constexpr std::uint64_t iova = 5 * page;
    static constexpr std::uint64_t large_iova = 2ull << 20;
    static constexpr std::uint32_t threads = 2;

    void SetUp() override
    {
        service.listen();
        geometry = iommu::make_geometry(DR_FORMAT_AMDV1, 30, 1, 3);
        ASSERT_EQ(tables.make("tables", geometry.tables_size, Pages::sparse), 0);
        ASSERT_EQ(translation.make("translation", geometry.translation_size, Pages::present), 0);
        ASSERT_EQ(cells.make("cells", threads * (sizeof(dr_cell) + pins * sizeof(dr_pin)), Pages::present), 0);
        ASSERT_EQ(memory.make("memory", 4ull << 20, Pages::present), 0);
        std::memcpy(translation.map.data(), &geometry, sizeof geometry);
        control().context = iommu::AmdV1::context(true);
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

    int try_attach()
    {
        const std::uint8_t token[DR_TOKEN_BYTES] = {};
        dirtyring_attach attach{};
        attach.token = token;
        attach.hwpt = 1;
        attach.threads = threads;
        attach.pins = pins;
        return dirtyring_device_attach(service.path.c_str(), &attach, &device);
    }

    void attach() { ASSERT_EQ(try_attach(), 0) << dirtyring_error(); }

    dr_shard_control &control() { return *translation.map.as<dr_shard_control>(geometry.shard_controls); }
    std::uint64_t &entry(std::uint64_t table, std::uint64_t index)
    {
        return *tables.map.as<std::uint64_t>(geometry.table_pages + table * page + index * 8);
    }
    bool is_dirty(std::uint64_t at) { return iommu::AmdV1::dirty(entry(first + 1, at / page)); }

    void build_tables()
    {
        using iommu::AmdV1;
        first = iommu::first_table(geometry, 0) + 1;
        entry(geometry.root, 0) = AmdV1::table(first, 1);
        entry(first, 0) = AmdV1::table(first + 1, 0);
        entry(first, 1) = AmdV1::leaf(2ull << 20, 21, {true, true});
        entry(first + 1, iova / page) = AmdV1::leaf(page, 12, {true, true});
        entry(first + 1, iova / page + 1) = AmdV1::leaf(2 * page, 12, {true, false});
        entry(first + 1, iova / page + 2) = AmdV1::leaf(1ull << 40, 12, {true, true});
    }

    const std::uint32_t pins; // of each thread
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

} // namespace dirtyring::test
