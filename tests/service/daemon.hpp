// A dirtyringd of a test's own, and peers that speak to it: one byte by byte, one as a VMM with its command ring.
#pragma once

#include "ring/consumer.hpp"
#include "ring/control.h"
#include "ring/producer.hpp"
#include "ring/region.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <optional>
#include <poll.h>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace dirtyring::test {

using ring::Fd;
using ring::Mapping;
using Bytes = std::vector<std::byte>;

// Whoever has not answered by then hangs. Nothing is measured.
constexpr std::chrono::seconds hang{10};

template <class Condition> [[nodiscard]] bool comes_true(Condition condition, std::chrono::milliseconds limit = hang)
{
    const auto deadline = std::chrono::steady_clock::now() + limit;
    while (!condition()) {
        if (std::chrono::steady_clock::now() > deadline)
            return false;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return true;
}

// A test that cannot go on. gtest reports what() as a failure.
inline int need(int result, const std::string &what)
{
    if (result < 0)
        throw std::runtime_error(what + ": " + std::strerror(errno));
    return result;
}

inline Fd memory_file(std::uint64_t size)
{
    Fd fd(need(::memfd_create("guest-memory", MFD_CLOEXEC), "memfd_create"));
    need(::ftruncate(fd.get(), static_cast<off_t>(size)), "ftruncate");
    return fd;
}

// Empty again at the end, or the test fails.
class TemporaryDirectory
{
  public:
    TemporaryDirectory()
    {
        std::string path = (std::filesystem::temp_directory_path() / "service_test.XXXXXX").string();
        if (::mkdtemp(path.data()) == nullptr)
            throw std::runtime_error("mkdtemp");
        path_ = path;
    }
    TemporaryDirectory(const TemporaryDirectory &) = delete;
    TemporaryDirectory &operator=(const TemporaryDirectory &) = delete;
    ~TemporaryDirectory()
    {
        EXPECT_EQ(::rmdir(path_.c_str()), 0) << path_ << ": " << std::strerror(errno);
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }
    [[nodiscard]] const std::string &path() const { return path_; }

  private:
    std::string path_;
};

// Any program of ours with what it says on stderr and stdout. Killed when the test has not ended it.
class Process
{
  public:
    // `in_child` runs between fork and exec.
    Process(std::vector<std::string> words, const std::function<void()> &in_child = {})
        : said_(need(::memfd_create("stderr", MFD_CLOEXEC), "memfd_create")),
          printed_(need(::memfd_create("stdout", MFD_CLOEXEC), "memfd_create"))
    {
        // A supervisor and its worker share the file, and in a memfd not even its offset is theirs alone while they
        // write.
        need(::fcntl(said_.get(), F_SETFL, O_APPEND), "fcntl");
        std::vector<char *> arguments;
        for (std::string &word : words)
            arguments.push_back(word.data());
        arguments.push_back(nullptr);
        pid_ = need(::fork(), "fork");
        if (pid_ != 0)
            return;
        ::prctl(PR_SET_PDEATHSIG, SIGKILL);
        ::dup2(said_.get(), STDERR_FILENO);
        ::dup2(printed_.get(), STDOUT_FILENO);
        if (in_child)
            in_child();
        ::execv(arguments[0], arguments.data());
        ::_exit(127);
    }
    Process(const Process &) = delete;
    Process &operator=(const Process &) = delete;
    ~Process()
    {
        if (!status_) {
            ::kill(pid_, SIGKILL);
            ::waitpid(pid_, nullptr, 0);
        }
    }

    [[nodiscard]] pid_t pid() const { return pid_; }
    void signal(int number) const
    {
        if (!status_)
            ::kill(pid_, number);
    }

    [[nodiscard]] bool ended()
    {
        int status = 0;
        if (!status_ && ::waitpid(pid_, &status, WNOHANG) == pid_)
            status_ = status;
        return status_.has_value();
    }

    // Waits. Negative: the signal that ended it. Nothing: it hangs.
    std::optional<int> exit_code()
    {
        if (!comes_true([this] { return ended(); }))
            return std::nullopt;
        return WIFEXITED(*status_) ? WEXITSTATUS(*status_) : -WTERMSIG(*status_);
    }

    [[nodiscard]] std::string said() const { return text(said_); }
    [[nodiscard]] std::string printed() const { return text(printed_); }

    // ---- what /proc tells while it runs ----

    [[nodiscard]] std::string proc(const char *file) const { return "/proc/" + std::to_string(pid_) + "/" + file; }

    [[nodiscard]] std::size_t descriptors() const
    {
        return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(proc("fd")), {}));
    }

    // A number of /proc/PID/status by its name, with the colon.
    [[nodiscard]] std::int64_t status(std::string_view name) const
    {
        std::ifstream file(proc("status"));
        for (std::string word; file >> word;) {
            if (std::int64_t value = 0; word == name && file >> value)
                return value;
        }
        return -1;
    }
    // kB.
    [[nodiscard]] std::int64_t resident() const { return status("VmRSS:"); }

    // User and system time of all threads, in clock ticks.
    [[nodiscard]] std::int64_t cpu_time() const
    {
        std::ifstream file(proc("stat"));
        const std::string all{std::istreambuf_iterator<char>(file), {}};
        std::istringstream rest(all.substr(all.rfind(')') + 2));
        std::vector<std::string> fields{std::istream_iterator<std::string>(rest), {}};
        return std::stoll(fields.at(11)) + std::stoll(fields.at(12));
    }

    // A sanitizer holds back what is freed.
    [[nodiscard]] bool instrumented() const
    {
        std::ifstream file(proc("maps"));
        const std::string all{std::istreambuf_iterator<char>(file), {}};
        return all.find("libasan") != std::string::npos;
    }

  private:
    static std::string text(const Fd &fd)
    {
        std::string all(65536, '\0');
        const ssize_t n = ::pread(fd.get(), all.data(), all.size(), 0);
        all.resize(n > 0 ? static_cast<std::size_t>(n) : 0);
        return all;
    }

    Fd said_;
    Fd printed_;
    pid_t pid_ = -1;
    std::optional<int> status_;
};

// A service on a socket of its own, which has to end well when the test does.
class Daemon
{
  public:
    explicit Daemon(const std::vector<std::string> &options = {}, const std::function<void()> &in_child = {},
                    const char *program = DIRTYRINGD_PATH)
        : process_(words(program, options), in_child)
    {
        if (!comes_true([this] { return process_.ended() || process_.said().find("ready") != std::string::npos; }) ||
            process_.ended())
            throw std::runtime_error("the service does not start: " + process_.said());
        idle_descriptors_ = process_.descriptors();
    }
    ~Daemon() { stop(); }

    void stop()
    {
        if (std::exchange(stopped_, true))
            return;
        process_.signal(SIGTERM);
        EXPECT_EQ(process_.exit_code(), 0) << process_.said();
        EXPECT_FALSE(std::filesystem::exists(socket())) << "the service left its socket";
    }

    [[nodiscard]] std::string socket() const { return directory_.path() + "/socket"; }
    [[nodiscard]] const Process &process() const { return process_; }
    [[nodiscard]] Process &process() { return process_; }
    [[nodiscard]] std::string said() const { return process_.said(); }

    // Those of replies are closed after the peers have them, those that peers sent in the background.
    [[nodiscard]] std::size_t settled_descriptors() const
    {
        std::size_t last = 0;
        for (int same = 0; same < 20; std::this_thread::sleep_for(std::chrono::milliseconds(1))) {
            const std::size_t now = process_.descriptors();
            same = now == last ? same + 1 : 0;
            last = now;
        }
        return last;
    }
    void expect_descriptors(std::size_t expected) const
    {
        EXPECT_TRUE(comes_true([&] { return process_.descriptors() == expected; }))
            << process_.descriptors() << " descriptors, expected " << expected;
    }
    void expect_no_descriptor_left() const { expect_descriptors(idle_descriptors_); }

  private:
    std::vector<std::string> words(const char *program, const std::vector<std::string> &options) const
    {
        std::vector<std::string> all{program, "--socket-path", socket()};
        all.insert(all.end(), options.begin(), options.end());
        return all;
    }

    TemporaryDirectory directory_;
    Process process_;
    std::size_t idle_descriptors_ = 0;
    bool stopped_ = false;
};

template <class T> Bytes bytes_of(const T &value)
{
    const auto *first = reinterpret_cast<const std::byte *>(&value);
    return {first, first + sizeof value};
}

template <class T> Bytes payload_of(T value)
{
    value.size = sizeof value;
    return bytes_of(value);
}

// A new guest, of which nobody else has the secret.
inline dr_guest_create new_guest(std::uint32_t entries)
{
    dr_guest_create request{};
    request.command_entries = entries;
    need(static_cast<int>(::getrandom(request.secret, sizeof request.secret, 0)), "getrandom");
    return request;
}

// Of a device that no other is.
inline std::uint64_t new_key()
{
    std::uint64_t key = 0;
    need(static_cast<int>(::getrandom(&key, sizeof key, 0)), "getrandom");
    return key | 1;
}

// A request of a device that can do everything.
inline dr_device_attach new_device(std::uint32_t hwpt, const std::uint8_t *token)
{
    dr_device_attach request{};
    request.hwpt = hwpt;
    request.flags = DR_DEVICE_CAN_TRACK | DR_DEVICE_COHERENT;
    request.threads = 1;
    std::memcpy(request.token, token, sizeof request.token);
    request.formats = UINT32_MAX;
    request.key = new_key();
    std::strcpy(request.name, "a test's");
    return request;
}

struct Reply {
    bool closed = false; // instead, the service closed the connection
    dr_message_header header{};
    Bytes payload;
    std::vector<Fd> fds;

    template <class T> [[nodiscard]] T as() const
    {
        T value{};
        std::memcpy(&value, payload.data(), std::min(payload.size(), sizeof value));
        return value;
    }
    // 0: it was done.
    [[nodiscard]] int error() const { return (header.flags & DR_MESSAGE_REFUSAL) != 0 ? as<dr_refusal>().error : 0; }
    [[nodiscard]] std::string sentence() const
    {
        const auto refusal = as<dr_refusal>();
        return {refusal.sentence, ::strnlen(refusal.sentence, sizeof refusal.sentence)};
    }
};

inline Fd connected(const std::string &path)
{
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof address.sun_path - 1);
    Fd fd(need(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket"));
    need(::connect(fd.get(), reinterpret_cast<const sockaddr *>(&address), sizeof address), "connect " + path);
    return fd;
}

inline Fd listening_on(const std::string &path, int type = SOCK_STREAM)
{
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof address.sun_path - 1);
    Fd fd(need(::socket(AF_UNIX, type | SOCK_CLOEXEC, 0), "socket"));
    need(::bind(fd.get(), reinterpret_cast<const sockaddr *>(&address), sizeof address), "bind " + path);
    need(::listen(fd.get(), 8), "listen");
    return fd;
}

// Where a supervisor that is played by a test listens.
class NotifySocket
{
  public:
    explicit NotifySocket(const std::string &path) : path_(path)
    {
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        path.copy(address.sun_path, sizeof address.sun_path - 1);
        fd_ = Fd(need(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0), "socket"));
        need(::bind(fd_.get(), reinterpret_cast<sockaddr *>(&address), sizeof address), "bind");
    }
    NotifySocket(const NotifySocket &) = delete;
    NotifySocket &operator=(const NotifySocket &) = delete;
    ~NotifySocket() { ::unlink(path_.c_str()); }

    [[nodiscard]] std::string next()
    {
        pollfd waiting{fd_.get(), POLLIN, 0};
        if (::poll(&waiting, 1, 10'000) != 1)
            return "nothing";
        char text[256];
        alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
        iovec piece{text, sizeof text};
        msghdr message{};
        message.msg_iov = &piece;
        message.msg_iovlen = 1;
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        const ssize_t n = ::recvmsg(fd_.get(), &message, MSG_CMSG_CLOEXEC);
        fds_.clear();
        for (cmsghdr *c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
            int fd = -1;
            std::memcpy(&fd, CMSG_DATA(c), sizeof fd);
            fds_.emplace_back(fd);
        }
        return {text, static_cast<std::size_t>(std::max<ssize_t>(n, 0))};
    }
    // That came with the last message.
    [[nodiscard]] std::vector<Fd> &fds() { return fds_; }

  private:
    std::string path_;
    Fd fd_;
    std::vector<Fd> fds_;
};

// One connection, whatever it is made to say.
class Peer
{
  public:
    explicit Peer(Fd socket, std::chrono::seconds patience = hang) : socket_(std::move(socket))
    {
        const timeval limit{patience.count(), 0};
        ::setsockopt(socket_.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
        ::setsockopt(socket_.get(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    }
    explicit Peer(const Daemon &daemon) : Peer(connected(daemon.socket())) {}

    [[nodiscard]] int socket() const { return socket_.get(); }
    void close() { socket_ = Fd(); }
    // Of the last request.
    [[nodiscard]] std::uint32_t sequence() const { return sequence_; }
    [[nodiscard]] std::uint32_t next_sequence() { return ++sequence_; }
    // Goes on with another connection and the sequences of this one.
    void reconnect(const Daemon &daemon)
    {
        do { // the socket of one that has just died may still accept
            Peer fresh(daemon);
            socket_ = std::move(fresh.socket_);
        } while (call(DR_HELLO, dr_hello{0, DR_PROTOCOL_VERSION, DR_FEATURES_ALL}).closed);
    }

    // False: the service has closed the connection.
    bool send(const Bytes &bytes, const std::vector<int> &fds = {}) const
    {
        iovec piece{const_cast<std::byte *>(bytes.data()), bytes.size()};
        msghdr message{};
        message.msg_iov = &piece;
        message.msg_iovlen = 1;
        std::vector<std::byte> control(CMSG_SPACE(fds.size() * sizeof(int)));
        if (!fds.empty()) {
            message.msg_control = control.data();
            message.msg_controllen = control.size();
            cmsghdr *c = CMSG_FIRSTHDR(&message);
            c->cmsg_level = SOL_SOCKET;
            c->cmsg_type = SCM_RIGHTS;
            c->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
            std::memcpy(CMSG_DATA(c), fds.data(), fds.size() * sizeof(int));
        }
        return ::sendmsg(socket_.get(), &message, MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size());
    }

    static Bytes message(std::uint32_t request, const Bytes &payload, std::uint32_t sequence = 0)
    {
        const dr_message_header header{request, DR_PROTOCOL_VERSION, static_cast<std::uint32_t>(payload.size()),
                                       sequence};
        Bytes all(sizeof header + payload.size());
        std::memcpy(all.data(), &header, sizeof header);
        std::copy(payload.begin(), payload.end(), all.begin() + sizeof header);
        return all;
    }

    Reply receive() const
    {
        Reply reply;
        if (!receive(&reply.header, sizeof reply.header, reply)) {
            reply.closed = true;
            return reply;
        }
        reply.payload.resize(reply.header.size);
        reply.closed = !receive(reply.payload.data(), reply.payload.size(), reply);
        return reply;
    }

    Reply call_bytes(std::uint32_t request, const Bytes &payload, const std::vector<int> &fds = {})
    {
        return call_bytes_as(++sequence_, request, payload, fds);
    }
    Reply call_bytes_as(std::uint32_t sequence, std::uint32_t request, const Bytes &payload,
                        const std::vector<int> &fds = {})
    {
        send(message(request, payload, sequence), fds);
        Reply reply = receive();
        if (!reply.closed) {
            EXPECT_EQ(reply.header.request, request);
            EXPECT_EQ(reply.header.sequence, sequence);
            EXPECT_EQ(reply.header.flags & ~DR_MESSAGE_REFUSAL, DR_PROTOCOL_VERSION | DR_MESSAGE_REPLY);
        }
        return reply;
    }

    template <class T> Reply call(dr_request request, const T &payload, const std::vector<int> &fds = {})
    {
        return call_bytes(request, payload_of(payload), fds);
    }

    // As above, and done, or the test ends.
    template <class Out, class In>
    Out get(dr_request request, const In &payload, const std::vector<int> &fds = {}, std::vector<Fd> *got = nullptr)
    {
        Reply reply = call(request, payload, fds);
        if (reply.closed || reply.error() != 0)
            throw std::runtime_error("request " + std::to_string(request) +
                                     (reply.closed ? " closed the connection" : " refused: " + reply.sentence()));
        if (got != nullptr)
            *got = std::move(reply.fds);
        return reply.as<Out>();
    }

    Peer &hello()
    {
        get<dr_hello>(DR_HELLO, dr_hello{0, DR_PROTOCOL_VERSION, DR_FEATURES_ALL});
        return *this;
    }

    // True: the service hangs up; what it says before is thrown away.
    bool hung_up()
    {
        char ignored[4096];
        for (;;) {
            const ssize_t n = ::recv(socket_.get(), ignored, sizeof ignored, 0);
            if (n == 0 || (n < 0 && errno == ECONNRESET))
                return true;
            if (n < 0)
                return false;
        }
    }

  private:
    bool receive(void *to, std::size_t size, Reply &reply) const
    {
        for (std::size_t done = 0; done < size;) {
            iovec piece{static_cast<std::byte *>(to) + done, size - done};
            alignas(cmsghdr) char control[CMSG_SPACE(DR_MESSAGE_FDS_MAX * sizeof(int))];
            msghdr message{};
            message.msg_iov = &piece;
            message.msg_iovlen = 1;
            message.msg_control = control;
            message.msg_controllen = sizeof control;
            const ssize_t n = ::recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC);
            if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
                throw std::runtime_error("the service does not answer");
            if (n <= 0)
                return false;
            for (cmsghdr *c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
                for (std::size_t i = 0; i < (c->cmsg_len - CMSG_LEN(0)) / sizeof(int); ++i) {
                    int fd = -1;
                    std::memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
                    reply.fds.emplace_back(fd);
                }
            }
            done += static_cast<std::size_t>(n);
        }
        return true;
    }

    Fd socket_;
    std::uint32_t sequence_ = 0;
};

// A ring as its consumer gets it.
struct RawRing {
    Fd producer_fd;
    Fd consumer_fd;
    Fd call;
    Fd kick;
    Mapping producer_map;
    Mapping consumer_map;

    [[nodiscard]] dr_ring_producer &producer() const { return *producer_map.as<dr_ring_producer>(); }
    [[nodiscard]] dr_ring_consumer &consumer() const { return *consumer_map.as<dr_ring_consumer>(); }
    [[nodiscard]] std::uint64_t head() const
    {
        return std::atomic_ref(producer().head).load(std::memory_order_seq_cst);
    }
    [[nodiscard]] std::uint64_t tail() const { return consumer().tail; }
    void set_tail(std::uint64_t tail) const
    {
        std::atomic_ref(consumer().tail).store(tail, std::memory_order_seq_cst);
        ::eventfd_write(kick.get(), 1);
    }
    [[nodiscard]] std::uint64_t entry(std::uint64_t index) const
    {
        const auto *entries = reinterpret_cast<const std::uint64_t *>(&producer() + 1);
        return entries[index & (producer().header.capacity - 1)];
    }
    // Everything published, released.
    [[nodiscard]] std::vector<std::uint64_t> take() const
    {
        std::vector<std::uint64_t> all;
        const std::uint64_t upto = head();
        for (std::uint64_t i = tail(); i != upto; ++i)
            all.push_back(entry(i));
        set_tail(upto);
        return all;
    }
};

// A VMM without the library, with its command ring in its own hands.
class RawGuest : public Peer
{
  public:
    explicit RawGuest(const Daemon &daemon, std::uint32_t entries = 64) : RawGuest(daemon, new_guest(entries)) {}
    RawGuest(const Daemon &daemon, const dr_guest_create &request) : Peer(daemon), created(request)
    {
        hello();
        std::vector<Fd> fds;
        info = get<dr_guest>(DR_GUEST_CREATE, created, {}, &fds);
        if (fds.size() != 4)
            throw std::runtime_error("a guest has 4 descriptors");
        front_end_fd = std::move(fds[0]);
        service_fd = std::move(fds[1]);
        kick = std::move(fds[2]);
        call_event = std::move(fds[3]);
        map(front_end_fd, PROT_READ | PROT_WRITE, front_end_map);
        map(service_fd, PROT_READ, service_map);
        submissions.emplace(&submission_region(), &submission_consumer());
        completions.emplace(&completion_consumer(), &completion_region(), created.command_entries);
    }

    // After its connection has broken.
    void take_again(const Daemon &daemon)
    {
        reconnect(daemon);
        created.flags = DR_GUEST_TAKE;
        info = get<dr_guest>(DR_GUEST_CREATE, created);
    }

    [[nodiscard]] dr_ring_consumer &completion_consumer() const { return *front_end_map.as<dr_ring_consumer>(0); }
    [[nodiscard]] dr_ring_producer &submission_region() const { return *front_end_map.as<dr_ring_producer>(DR_PAGE); }
    [[nodiscard]] dr_ring_consumer &submission_consumer() const { return *service_map.as<dr_ring_consumer>(0); }
    [[nodiscard]] dr_ring_producer &completion_region() const { return *service_map.as<dr_ring_producer>(DR_PAGE); }

    // How many submissions the service has taken.
    [[nodiscard]] std::uint64_t taken() const
    {
        return std::atomic_ref(submission_consumer().tail).load(std::memory_order_seq_cst);
    }

    void add_memory(std::uint64_t oa, std::uint64_t length, const Fd &fd)
    {
        get<dr_empty>(DR_MEMORY_ADD, dr_memory_region{0, 0, oa, length, 0}, {fd.get()});
    }

    static dr_hwpt_alloc hwpt_request(std::uint32_t ioas)
    {
        dr_hwpt_alloc request{};
        request.ioas = ioas;
        request.format = DR_FORMAT_AMDV1;
        request.flags = DR_HWPT_DIRTY_TRACKING;
        request.aperture_lg2 = 32;
        request.shards = 1;
        request.leaf_lg2_max = 12;
        request.space = DR_SPACE_IOVA;
        request.ring_entries = 64;
        return request;
    }

    RawRing ring(std::uint32_t hwpt, std::uint32_t shard = 0)
    {
        std::vector<Fd> fds;
        get<dr_ring>(DR_RING_GET, dr_ring_get{0, hwpt, shard}, {}, &fds);
        RawRing ring{std::move(fds.at(0)), std::move(fds.at(1)), std::move(fds.at(2)), std::move(fds.at(3)), {}, {}};
        map(ring.producer_fd, PROT_READ, ring.producer_map);
        map(ring.consumer_fd, PROT_READ | PROT_WRITE, ring.consumer_map);
        return ring;
    }

    void submit(const dr_command &command)
    {
        submissions->put(0, command);
        submissions->stage(1);
        (void)submissions->publish();
        ring_bell();
    }
    void ring_bell() const { ::eventfd_write(kick.get(), 1); }

    [[nodiscard]] std::optional<dr_completion> completed()
    {
        const auto batch = completions->peek(1);
        if (batch.empty())
            return std::nullopt;
        const dr_completion copy = batch.front();
        if (completions->release(1))
            ring_bell();
        return copy;
    }

    dr_completion next_completion()
    {
        std::optional<dr_completion> completion;
        if (!comes_true([&] { return (completion = completed()).has_value(); }))
            throw std::runtime_error("no completion comes");
        return *completion;
    }

    // The result: 0 or -errno.
    int run(const dr_command &command)
    {
        submit(command);
        last = next_completion();
        EXPECT_EQ(last.user_data, command.user_data);
        return last.result;
    }

    dr_guest_create created;
    dr_guest info{};
    Fd front_end_fd;
    Fd service_fd;
    Fd kick;
    Fd call_event;
    Mapping front_end_map;
    Mapping service_map;
    std::optional<ring::Producer<dr_command>> submissions;
    std::optional<ring::Consumer<dr_completion>> completions;
    dr_completion last{}; // of run()

  private:
    static void map(const Fd &fd, int protection, Mapping &out)
    {
        struct stat status {
        };
        need(::fstat(fd.get(), &status), "fstat");
        if (out.map(fd.get(), static_cast<std::size_t>(status.st_size), protection) != 0)
            throw std::runtime_error("mmap");
    }
};

// When this returns, the walker has looked at every command ring and shard after what was written before. There is one
// walker.
inline void walker_goes_round(const Daemon &daemon)
{
    RawGuest pace(daemon, 4);
    for (int i = 0; i < 3; ++i)
        EXPECT_EQ(pace.run({}), -EINVAL);
}

} // namespace dirtyring::test
