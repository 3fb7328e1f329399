// A service that is wrong in one way: dirtyringd behind a meddler, which passes messages on in both directions and
// changes some.
#pragma once

#include "ring/socket.hpp"
#include "tests/service/daemon.hpp"

#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <thread>

namespace dirtyring::test {

struct Message {
    dr_message_header header{};
    Bytes payload;
    std::vector<Fd> fds;
    bool fds_late = false; // they go with the payload
    unsigned pieces = 0;   // in which it came; 2 are one for the header and one for the payload

    [[nodiscard]] bool sane() const
    {
        return (header.flags & DR_MESSAGE_VERSION_MASK) == DR_PROTOCOL_VERSION &&
               (header.flags & DR_MESSAGE_REPLY) == 0 && header.size >= sizeof(dr_empty) &&
               header.size <= DR_MESSAGE_MAX;
    }
    template <class T, class Change> void change(Change change)
    {
        T value{};
        std::memcpy(&value, payload.data(), std::min(payload.size(), sizeof value));
        change(value);
        std::memcpy(payload.data(), &value, std::min(payload.size(), sizeof value));
    }
    [[nodiscard]] bool refused() const { return (header.flags & DR_MESSAGE_REFUSAL) != 0; }
    [[nodiscard]] bool is(dr_request request) const { return header.request == request && !refused(); }
    void refuse(int error)
    {
        dr_refusal refusal{sizeof refusal, error, "no"};
        payload = bytes_of(refusal);
        header.size = sizeof refusal;
        header.flags |= DR_MESSAGE_REFUSAL;
        fds.clear();
    }
    void pretend_done() { header.flags &= ~DR_MESSAGE_REFUSAL; }
};

inline bool read_all(int socket, void *to, std::size_t size, Message &of)
{
    for (std::size_t done = 0; done < size;) {
        iovec piece{static_cast<std::byte *>(to) + done, size - done};
        msghdr message{};
        message.msg_iov = &piece;
        message.msg_iovlen = 1;
        ring::FdList list;
        list.prepare(message);
        const ssize_t n = ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
        if (n <= 0)
            return false; // nothing has come, and the control buffer says nothing
        (void)list.take_from(message);
        for (unsigned i = 0; i < list.count(); ++i)
            of.fds.push_back(list.take(i));
        ++of.pieces;
        done += static_cast<std::size_t>(n);
    }
    return true;
}

// True: a whole message, or a header that makes no sense.
inline bool read_message(int socket, Message &message, bool request)
{
    message = {};
    if (!read_all(socket, &message.header, sizeof message.header, message))
        return false;
    if (request && !message.sane())
        return true;
    message.payload.resize(message.header.size);
    return read_all(socket, message.payload.data(), message.payload.size(), message);
}

inline bool send_message(const Peer &to, const Message &message)
{
    Bytes bytes = bytes_of(message.header);
    bytes.insert(bytes.end(), message.payload.begin(), message.payload.end());
    std::vector<int> fds;
    for (const Fd &fd : message.fds)
        fds.push_back(fd.get());
    if (message.fds_late)
        return to.send(bytes_of(message.header)) && to.send(message.payload, fds);
    return to.send(bytes, fds);
}

// False: the service has hung up instead.
inline bool client_speaks(int client, int service)
{
    pollfd both[] = {{client, POLLIN, 0}, {service, POLLIN, 0}};
    return ::poll(both, 2, -1) > 0 && both[1].revents == 0;
}

class Meddler
{
  public:
    // `meddle` may change a request that is about to be passed on, and a reply. False: it is not passed on.
    using Meddle = std::function<bool(Message &)>;
    static bool leave(Message &) { return true; }

    explicit Meddler(Meddle with_replies, Meddle with_requests = leave)
        : with_replies_(std::move(with_replies)), with_requests_(std::move(with_requests))
    {
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        socket().copy(address.sun_path, sizeof address.sun_path - 1);
        listener_ = Fd(need(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket"));
        need(::bind(listener_.get(), reinterpret_cast<const sockaddr *>(&address), sizeof address), "bind");
        need(::listen(listener_.get(), 64), "listen");
        acceptor_ = std::thread([this] { accept(); });
    }
    ~Meddler()
    {
        ::shutdown(listener_.get(), SHUT_RDWR);
        acceptor_.join(); // no more threads from here on
        {
            const std::lock_guard lock(mutex_);
            for (const int s : open_)
                ::shutdown(s, SHUT_RDWR);
        }
        for (std::thread &t : threads_)
            t.join();
        ::unlink(socket().c_str());
    }

    [[nodiscard]] std::string socket() const { return directory_.path() + "/meddler"; }
    // From here on the service is not told that a client hangs up.
    void keep_connections() { keeps_connections_ = true; }

  private:
    void accept()
    {
        for (;;) {
            Fd client(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
            if (!client)
                return;
            {
                const std::lock_guard lock(mutex_);
                open_.insert(client.get());
            }
            threads_.emplace_back([this, client = std::make_shared<Fd>(std::move(client))] {
                pass_on(*client);
                const std::lock_guard lock(mutex_);
                open_.erase(client->get());
                *client = Fd(); // hangs up
            });
        }
    }

    void pass_on(Fd &client)
    {
        const Peer to_service(daemon_);
        const Peer to_client(Fd(::fcntl(client.get(), F_DUPFD_CLOEXEC, 0)), std::chrono::seconds(0)); // waits for good
        if (keeps_connections_) {
            const std::lock_guard lock(mutex_);
            kept_.emplace_back(need(::fcntl(to_service.socket(), F_DUPFD_CLOEXEC, 0), "dup"));
        }
        Message message;
        while (client_speaks(client.get(), to_service.socket()) && read_message(client.get(), message, true)) {
            if (!with_requests_(message))
                continue;
            if (!send_message(to_service, message))
                return;
            if (!read_message(to_service.socket(), message, false))
                return;
            if (with_replies_(message) && !send_message(to_client, message))
                return;
        }
    }

    Daemon daemon_;
    TemporaryDirectory directory_;
    Meddle with_replies_;
    Meddle with_requests_;
    Fd listener_;
    std::mutex mutex_;
    std::set<int> open_;
    std::atomic<bool> keeps_connections_ = false;
    std::vector<Fd> kept_;
    std::thread acceptor_;
    std::vector<std::thread> threads_; // the acceptor's, as long as it runs
};

// ---- shared memory --------------------------------------------------------------------------------------------------

inline Mapping map_all(const Fd &fd, int protection)
{
    struct stat status {
    };
    need(::fstat(fd.get(), &status), "fstat");
    Mapping map;
    need(map.map(fd.get(), static_cast<std::size_t>(status.st_size), protection), "mmap");
    return map;
}

// Does something again and again until it goes.
class Repeated
{
  public:
    explicit Repeated(std::function<void()> what)
        : thread_([this, what = std::move(what)] {
              for (; !stop_; std::this_thread::sleep_for(std::chrono::microseconds(100)))
                  what();
          })
    {
    }
    Repeated(const Repeated &) = delete;
    Repeated &operator=(const Repeated &) = delete;
    ~Repeated()
    {
        stop_ = true;
        thread_.join();
    }

  private:
    std::atomic<bool> stop_ = false;
    std::thread thread_;
};

// How a ring is forged: all entries of the service's pass through here.
struct Forgery {
    std::function<std::uint64_t(std::uint64_t)> entry = {};
    std::function<bool(std::uint64_t)> held = {}; // until the next marker, which then stands before it
    std::function<void(dr_ring_header &)> header = {};
    std::function<void(dr_ring_producer &to, std::uint64_t head)> always = {};
};

// Copies a ring into one of its own, which the consumer gets in its place.
class ForgedRing
{
  public:
    ForgedRing(Message &reply, Forgery forgery) : forgery_(std::move(forgery))
    {
        real_ = map_all(reply.fds[0], PROT_READ);
        consumer_ = map_all(reply.fds[1], PROT_READ);
        need(forged_.make("forged", real_.size(), ring::Pages::present), "memfd");
        dr_ring_header &header = forged_.map.as<dr_ring_producer>()->header;
        header = real_.as<dr_ring_producer>()->header;
        forged_.map.as<dr_ring_producer>()->want_kick = 1; // a copy of it would come too late
        if (forgery_.header)
            forgery_.header(header);
        need(forged_.read_only(reply.fds[0]), "reopen");
        repeated_ = std::make_unique<Repeated>([this] { copy(); });
    }

    void copy()
    {
        const std::lock_guard lock(mutex_);
        auto &from = *real_.as<dr_ring_producer>();
        auto &to = *forged_.map.as<dr_ring_producer>();
        const auto *entries = reinterpret_cast<const std::uint64_t *>(&from + 1);
        auto *copies = reinterpret_cast<std::uint64_t *>(&to + 1);
        const std::uint64_t tail = std::atomic_ref(consumer_.as<dr_ring_consumer>()->tail).load();
        for (const std::uint64_t upto = std::atomic_ref(from.head).load();
             at_ != upto && at_ - tail < to.header.capacity; ++at_) {
            const std::uint64_t entry = entries[at_ & (from.header.capacity - 1)];
            if (forgery_.held && forgery_.held(entry)) {
                held_.push_back(entry);
                continue;
            }
            copies[head_++ & (to.header.capacity - 1)] = forgery_.entry ? forgery_.entry(entry) : entry;
            if (dr_is_marker(entry)) {
                for (const std::uint64_t e : held_)
                    copies[head_++ & (to.header.capacity - 1)] = e;
                held_.clear();
            }
        }
        std::atomic_ref(to.staged).store(head_);
        std::atomic_ref(to.head).store(head_);
        if (forgery_.always)
            forgery_.always(to, head_);
    }

  private:
    Forgery forgery_;
    std::mutex mutex_;
    Mapping real_;
    Mapping consumer_;
    ring::Region forged_;
    std::vector<std::uint64_t> held_;
    std::uint64_t at_ = 0;
    std::uint64_t head_ = 0;
    std::unique_ptr<Repeated> repeated_;
};

// Stands between a front-end and its command ring.
class ForgedCommands
{
  public:
    struct Meddling {
        // Changes a command before it is passed on. False: it is not, and completes with 0.
        std::function<bool(dr_command &)> command = {};
        // Changes the completion of a command as it was submitted. How often it is to come.
        std::function<int(dr_completion &, const dr_command &)> completion = {};
        bool calls = true;
        bool counts_completions = true; // takes a command only if there is a slot for its completion
    };

    ForgedCommands(Message &reply, Meddling meddling)
        : meddling_(std::move(meddling)), front_(map_all(reply.fds[0], PROT_READ | PROT_WRITE)),
          service_(map_all(reply.fds[1], PROT_READ)), kick_(duplicate(reply.fds[2])), call_(duplicate(reply.fds[3])),
          capacity_(service_.as<dr_ring_producer>(DR_PAGE)->header.capacity),
          to_service_(front_.as<dr_ring_producer>(DR_PAGE), service_.as<dr_ring_consumer>()),
          from_service_(front_.as<dr_ring_consumer>(), service_.as<dr_ring_producer>(DR_PAGE), capacity_)
    {
        need(forged_front_.make("forged", front_.size(), ring::Pages::present), "memfd");
        need(forged_service_.make("forged", service_.size(), ring::Pages::present), "memfd");
        submissions().header = front_.as<dr_ring_producer>(DR_PAGE)->header;
        completions().header = service_.as<dr_ring_producer>(DR_PAGE)->header;
        forged_service_.map.as<dr_ring_consumer>()->armed = DR_DISARMED;
        reply.fds[0] = duplicate(forged_front_.fd);
        need(forged_service_.read_only(reply.fds[1]), "reopen");
        repeated_ = std::make_unique<Repeated>([this] { pass_on(); });
    }

  private:
    static Fd duplicate(const Fd &fd) { return Fd(need(::fcntl(fd.get(), F_DUPFD_CLOEXEC, 0), "dup")); }
    [[nodiscard]] dr_ring_producer &submissions() const { return *forged_front_.map.as<dr_ring_producer>(DR_PAGE); }
    [[nodiscard]] dr_ring_producer &completions() const { return *forged_service_.map.as<dr_ring_producer>(DR_PAGE); }

    void complete(dr_completion completion, const dr_command &command)
    {
        const int times = meddling_.completion ? meddling_.completion(completion, command) : 1;
        for (int i = 0; i < times; ++i) {
            reinterpret_cast<dr_completion *>(&completions() + 1)[completed_++ & (capacity_ - 1)] = completion;
            std::atomic_ref(completions().head).store(completed_);
        }
        if (meddling_.calls)
            ::eventfd_write(call_.get(), 1);
    }

    void pass_on()
    {
        const auto *slots = reinterpret_cast<const dr_command *>(&submissions() + 1);
        const auto room = [&] {
            const std::uint64_t reaped = std::atomic_ref(forged_front_.map.as<dr_ring_consumer>()->tail).load();
            return taken_ - reaped < (meddling_.counts_completions ? capacity_ : 2 * capacity_);
        };
        while (std::atomic_ref(submissions().head).load() != taken_ && room()) {
            dr_command command = slots[taken_++ & (capacity_ - 1)];
            std::atomic_ref(forged_service_.map.as<dr_ring_consumer>()->tail).store(taken_);
            submitted_[command.user_data] = command;
            const dr_command before = command;
            if (meddling_.command && !meddling_.command(command)) {
                complete({command.user_data, 0, 0, 0, 0}, before);
                continue;
            }
            to_service_.put(0, command);
            to_service_.stage(1);
            (void)to_service_.publish();
            ::eventfd_write(kick_.get(), 1);
        }
        for (auto batch = from_service_.peek(1); !batch.empty(); batch = from_service_.peek(1)) {
            const dr_completion completion = batch.front();
            if (from_service_.release(1))
                ::eventfd_write(kick_.get(), 1);
            complete(completion, submitted_[completion.user_data]);
        }
    }

    Meddling meddling_;
    Mapping front_;
    Mapping service_;
    Fd kick_;
    Fd call_;
    std::uint64_t capacity_;
    ring::Producer<dr_command> to_service_;
    ring::Consumer<dr_completion> from_service_;
    ring::Region forged_front_;
    ring::Region forged_service_;
    std::map<std::uint64_t, dr_command> submitted_;
    std::uint64_t taken_ = 0;
    std::uint64_t completed_ = 0;
    std::unique_ptr<Repeated> repeated_;
};

} // namespace dirtyring::test
