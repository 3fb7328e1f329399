// The control socket from a client's side: one request, one reply, together within 10 s.
//
// When the socket breaks, the service has died and another worker will listen at the same path. So this side connects
// again, says who it is, and repeats the request that got no reply, with its old sequence. The descriptor's number
// stays the same.
//
//     away ──connect──► greeting ──HELLO's reply──► entering ──introduction's reply──► in
//      ▲                   │                           │                               │
//      └───────────────────┴──── the socket breaks ────┴───────────────────────────────┘
//
// Nobody listens, or whoever does refuses to take this side up: the service is gone for good. A reply that is late or
// makes no sense leaves the two sides out of step, so the connection is given up too. Then every later call answers
// -ESHUTDOWN, and whoever polls the socket sees it hang up.
//
// Threads: check, failure and give_up are anybody's, all else is the owner's. Whoever holds the mutex looks after the
// connection, so nobody waits for it.
#pragma once

#include "client/internal.hpp"
#include "ring/control.h"

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstddef>
#include <ctime>
#include <mutex>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

namespace dirtyring::client {

inline std::uint64_t monotonic_ns()
{
    timespec now;
    ::clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(now.tv_nsec);
}

inline int expect_descriptors(const FdList &fds, unsigned count)
{
    if (fds.count() == count)
        return 0;
    return fail(EPROTO, "the service sent %u descriptors, expected %u", fds.count(), count);
}

class Connection
{
  public:
    // What this side says after HELLO, whenever it connects.
    template <class In> void introduce(dr_request request, In in)
    {
        static_assert(sizeof in <= sizeof introduction_);
        in.size = sizeof in;
        introduction_request_ = request;
        introduction_size_ = sizeof in;
        std::memcpy(introduction_, &in, sizeof in);
    }

    // Connects, says HELLO and the introduction; `out` and `fds` are the reply to that. -EPROTONOSUPPORT: no common
    // version.
    template <class Out> int open(const char *path, Out &out, FdList &fds, std::uint32_t required = sizeof(Out))
    {
        const std::size_t length = std::strlen(path);
        if (length >= sizeof address_.sun_path)
            return fail(ENAMETOOLONG, "a socket path has at most %zu bytes: %s", sizeof address_.sun_path - 1, path);
        address_.sun_family = AF_UNIX;
        std::memcpy(address_.sun_path, path, length);
        return first(out, fds, required);
    }

    // The same over a connected socket, which cannot be made again.
    template <class Out> int adopt(Fd socket, Out &out, FdList &fds)
    {
        socket_ = std::move(socket);
        begin();
        const int error = greet();
        return error != 0 ? error : first(out, fds, sizeof out);
    }

    // The requests that follow have so much time, each.
    void limit(int seconds) { seconds_ = seconds; }

    // Signalled whenever this side has come back: who was to take what it announces may have died in between.
    void signal_return_to(const Fd &event) { returned_ = &event; }

    [[nodiscard]] int socket() const { return socket_.get(); }
    [[nodiscard]] std::uint64_t features()
    {
        const Lock lock(mutex_);
        return features_;
    }

    // Sends a request with the descriptors in `sent`; `got` are those of the reply. A refusal is the service's errno
    // and sentence.
    template <class In, class Out> int call(dr_request request, In in, Out &out, FdList &sent, FdList &got)
    {
        in.size = sizeof in;
        Payload payload;
        const int error = exchange(request, &in, sizeof in, sent, payload, got);
        return error != 0 ? error : payload.answer(request, out, sizeof out);
    }

    // The same with no descriptors in either direction.
    template <class In, class Out> int call(dr_request request, const In &in, Out &out)
    {
        FdList sent;
        FdList got;
        const int error = call(request, in, out, sent, got);
        return error != 0 ? error : expect_descriptors(got, 0);
    }

    // Comes back if the socket has broken.
    int reconnect()
    {
        const Lock lock(mutex_);
        begin();
        return enter();
    }

    // Sleeps until `event` is readable or the socket stirs, and looks after the connection.
    int sleep(const Fd &event)
    {
        const Lock lock(mutex_);
        const bool away = state_ == State::away;
        pollfd fds[] = {{event.get(), POLLIN, 0}, {socket(), POLLIN | POLLRDHUP, 0}};
        ::poll(fds, away ? 1 : 2, away ? pause_ms : -1);
        begin();
        return tend();
    }

    // Looks after the connection without waiting for the service. 0: this side is in, or on its way back.
    int check()
    {
        if (!mutex_.try_lock())
            return failure();
        const Lock lock(mutex_, std::adopt_lock);
        begin();
        return tend();
    }

    // -ESHUTDOWN once the service is gone for good.
    [[nodiscard]] int failure() const
    {
        const char *why = gone_.load(std::memory_order_relaxed);
        return why == nullptr ? 0 : fail(ESHUTDOWN, "the service is gone: %s", why);
    }

    // `why` lives as long as the program.
    void give_up(const char *why)
    {
        gone_.store(why, std::memory_order_relaxed);
        ::shutdown(socket(), SHUT_RDWR);
    }

  private:
    using Lock = std::lock_guard<Mutex>;
    enum class State { away, greeting, entering, in };

    static constexpr int pause_ms = 10; // before knocking again where nobody opened

    struct Payload {
        std::uint32_t size = 0;
        bool refusal = false;
        unsigned char bytes[DR_MESSAGE_MAX];

        // What a newer service says beyond our struct is ignored; what it leaves out behind the first `required` bytes
        // is zero.
        template <class T> bool read(T &out, std::uint32_t required) const
        {
            std::uint32_t stated = 0;
            std::memcpy(&stated, bytes, sizeof stated);
            if (stated != size || size < required)
                return false;
            out = T{};
            std::memcpy(&out, bytes, std::min<std::size_t>(size, sizeof out));
            return true;
        }

        template <class Out> int answer(std::uint32_t request, Out &out, std::uint32_t required) const
        {
            if (refusal)
                return refused();
            if (!read(out, required))
                return fail(EPROTO, "the reply to request %u makes no sense: %u bytes", request, size);
            return 0;
        }

        [[nodiscard]] int refused() const
        {
            constexpr int errno_max = 4095;
            dr_refusal told{};
            if (!read(told, offsetof(dr_refusal, sentence)) || told.error <= 0 || told.error > errno_max)
                return fail(EPROTO, "the service refused in a way that makes no sense");
            return fail(told.error, "%.*s", static_cast<int>(sizeof told.sentence), told.sentence);
        }
    };

    // ---- connecting. All that follows is under mutex_, or before anybody else knows of this object.

    void begin() { deadline_ns_ = monotonic_ns() + static_cast<std::uint64_t>(seconds_) * 1'000'000'000; }

    template <class Out> int first(Out &out, FdList &fds, std::uint32_t required)
    {
        begin();
        Payload payload;
        while (state_ != State::in) {
            if (const int error = advance(payload, fds); error != 0 && !passes(error))
                return error;
            if (state_ == State::in)
                break;
            if (const int error = pause(); error != 0)
                return error;
        }
        return payload.answer(introduction_request_, out, required);
    }

    // Until this side is in again.
    int enter()
    {
        for (;;) {
            if (const int error = tend(); error != 0)
                return error;
            if (state_ == State::in)
                return 0;
            if (const int error = pause(); error != 0) {
                give_up("it did not answer in time");
                return error;
            }
        }
    }

    // One step towards being in, if there is one to be made. 0: this side is in, or on its way.
    int tend()
    {
        if (const int error = failure(); error != 0)
            return error;
        Payload payload;
        FdList fds; // of regions and events that we have
        const int error = advance(payload, fds);
        if (error == 0 || passes(error))
            return 0;
        give_up("it did not take us up again");
        return error == -EPROTO ? error : -ESHUTDOWN;
    }

    // Errors of advance() after which it is worth trying again.
    [[nodiscard]] bool passes(int error) const
    {
        switch (-error) {
        case EAGAIN:    // many are knocking
        case ESHUTDOWN: // who had opened has died
            return can_knock();
        case EMFILE:
        case ENFILE:
        case ENOMEM:
        case ENOBUFS:
            return been_in_;
        default:
            return false;
        }
    }

    int advance(Payload &payload, FdList &fds)
    {
        pollfd look{socket(), POLLIN | POLLRDHUP, 0};
        const bool stirs = ::poll(&look, 1, 0) > 0;
        int error = 0;
        switch (state_) {
        case State::in:
            if (!stirs)
                return 0;
            if (look.revents == POLLIN)
                return fail(EPROTO, "the service sent something unasked");
            [[fallthrough]];
        case State::away:
            error = knock();
            break;
        case State::greeting:
            if (stirs)
                error = greeted(payload, fds);
            break;
        case State::entering:
            if (stirs)
                error = entered(payload, fds);
            break;
        }
        if (error != 0)
            state_ = State::away;
        return error;
    }

    [[nodiscard]] bool can_knock() const { return address_.sun_family != AF_UNSPEC; }

    int knock()
    {
        if (!can_knock())
            return closed();
        Fd fresh(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
        if (!fresh)
            return fail(errno, "cannot make a socket: %s", std::strerror(errno));
        // Non-blocking: EAGAIN while the backlog is full.
        if (::connect(fresh.get(), reinterpret_cast<const sockaddr *>(&address_), sizeof address_) != 0)
            return fail(errno, "cannot connect to %s: %s", address_.sun_path, std::strerror(errno));
        if (!socket_)
            socket_ = std::move(fresh);
        else if (::dup3(fresh.get(), socket(), O_CLOEXEC) < 0)
            return fail(errno, "cannot replace the socket: %s", std::strerror(errno));
        if (const int error = failure(); error != 0) { // meanwhile
            ::shutdown(socket(), SHUT_RDWR);
            return error;
        }
        return greet();
    }

    int greet()
    {
        dr_hello request{};
        request.size = sizeof request;
        request.version = DR_PROTOCOL_VERSION;
        request.features = DR_FEATURES_ALL;
        state_ = State::greeting;
        awaited_ = ++sequence_;
        FdList none;
        return send(DR_HELLO, awaited_, &request, sizeof request, none);
    }

    int greeted(Payload &payload, FdList &fds)
    {
        if (const int error = receive(DR_HELLO, awaited_, payload, fds); error != 0)
            return error;
        dr_hello reply{};
        if (const int error = payload.answer(DR_HELLO, reply, sizeof reply); error != 0)
            return error;
        if (const int error = expect_descriptors(fds, 0); error != 0)
            return error;
        if (reply.version != DR_PROTOCOL_VERSION)
            return fail(EPROTONOSUPPORT, "the service speaks protocol version %u, this library version %u",
                        reply.version, DR_PROTOCOL_VERSION);
        features_ = reply.features & DR_FEATURES_ALL;
        state_ = State::entering;
        awaited_ = ++sequence_;
        return send(introduction_request_, awaited_, introduction_, introduction_size_, fds);
    }

    int entered(Payload &payload, FdList &fds)
    {
        if (const int error = receive(introduction_request_, awaited_, payload, fds); error != 0)
            return error;
        if (payload.refusal)
            return payload.refused();
        if (introduction_request_ == DR_GUEST_CREATE) {
            dr_guest guest{};
            if (const int error = payload.answer(DR_GUEST_CREATE, guest, sizeof guest); error != 0)
                return error;
            if (static_cast<std::int32_t>(guest.sequence - sequence_) > 0)
                sequence_ = guest.sequence;
        }
        state_ = State::in;
        if (std::exchange(been_in_, true) && returned_ != nullptr)
            signal_event(*returned_);
        return 0;
    }

    // ---- messages

    int exchange(dr_request request, const void *in, std::uint32_t in_size, FdList &sent, Payload &payload, FdList &got)
    {
        const Lock lock(mutex_);
        begin();
        const std::uint32_t number = ++sequence_;
        for (;;) {
            int error = enter();
            if (error != 0)
                return error;
            error = send(request, number, in, in_size, sent);
            if (error == 0)
                error = receive(request, number, payload, got);
            if (error == 0)
                return 0;
            if (error != -ESHUTDOWN) {
                give_up("it had broken the rules of the socket, or was late");
                return error;
            }
            state_ = State::away;
        }
    }

    int send(std::uint32_t request, std::uint32_t number, const void *payload, std::uint32_t payload_size, FdList &fds)
    {
        const dr_message_header header{request, DR_PROTOCOL_VERSION, payload_size, number};
        unsigned char message[sizeof header + DR_MESSAGE_MAX];
        std::memcpy(message, &header, sizeof header);
        std::memcpy(message + sizeof header, payload, payload_size);
        const std::size_t size = sizeof header + payload_size;
        for (std::size_t done = 0; done < size;) {
            iovec piece{message + done, size - done};
            msghdr msg{};
            msg.msg_iov = &piece;
            msg.msg_iovlen = 1;
            if (done == 0)
                fds.attach_to(msg);
            const ssize_t n = ::sendmsg(socket(), &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
            if (n >= 0)
                done += static_cast<std::size_t>(n);
            else if (const int error = wait(errno, POLLOUT); error != 0)
                return error;
        }
        return 0;
    }

    // Refusals included. `fds` are those of this reply alone.
    int receive(std::uint32_t request, std::uint32_t number, Payload &payload, FdList &fds)
    {
        fds.close_all();
        dr_message_header got{};
        if (const int error = receive_bytes(&got, sizeof got, fds); error != 0)
            return error;
        constexpr std::uint32_t flags = DR_PROTOCOL_VERSION | DR_MESSAGE_REPLY;
        if (got.request != request || got.sequence != number || (got.flags & ~DR_MESSAGE_REFUSAL) != flags ||
            got.size < sizeof(dr_empty) || got.size > DR_MESSAGE_MAX)
            return fail(EPROTO,
                        "expected the reply to request %u, number %u; got request %u, number %u, flags %#x, %u bytes",
                        request, number, got.request, got.sequence, got.flags, got.size);
        payload.size = got.size;
        payload.refusal = (got.flags & DR_MESSAGE_REFUSAL) != 0;
        return receive_bytes(payload.bytes, got.size, fds);
    }

    int receive_bytes(void *to, std::size_t size, FdList &fds)
    {
        for (std::size_t done = 0; done < size;) {
            iovec piece{static_cast<unsigned char *>(to) + done, size - done};
            msghdr msg{};
            msg.msg_iov = &piece;
            msg.msg_iovlen = 1;
            fds.prepare(msg);
            const ssize_t n = ::recvmsg(socket(), &msg, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
            if (n < 0) {
                if (const int error = wait(errno, POLLIN); error != 0)
                    return error;
                continue;
            }
            if (!fds.take_from(msg))
                return fail(EPROTO, "the service sent more than %u descriptors, or there is no room for them here",
                            DR_MESSAGE_FDS_MAX);
            if (n == 0)
                return closed();
            done += static_cast<std::size_t>(n);
        }
        return 0;
    }

    // After a sendmsg or recvmsg that failed with `error`: 0 when it is time to try again.
    int wait(int error, short events) const
    {
        if (error == EINTR)
            return 0;
        if (error == EPIPE || error == ECONNRESET)
            return closed();
        if (error != EAGAIN)
            return fail(error, "the control socket failed: %s", std::strerror(error));
        pollfd waiting{socket(), events, 0};
        return wait_for(&waiting, INT_MAX);
    }

    // Until it is worth calling advance() again.
    int pause() const
    {
        if (state_ == State::away)
            return wait_for(nullptr, pause_ms);
        pollfd waiting{socket(), POLLIN | POLLRDHUP, 0};
        return wait_for(&waiting, INT_MAX);
    }

    int wait_for(pollfd *waiting, int at_most_ms) const
    {
        const std::uint64_t now = monotonic_ns();
        if (now >= deadline_ns_)
            return fail(ETIMEDOUT, "the service did not answer within %d s", seconds_);
        const int left_ms = static_cast<int>((deadline_ns_ - now) / 1'000'000 + 1);
        ::poll(waiting, waiting != nullptr ? 1 : 0, std::min(left_ms, at_most_ms));
        return 0;
    }

    static int closed() { return fail(ESHUTDOWN, "the service closed the connection"); }

    Mutex mutex_;
    Fd socket_;             // replaced in place, by dup3
    sockaddr_un address_{}; // AF_UNSPEC: not known
    State state_ = State::away;
    bool been_in_ = false;
    dr_request introduction_request_{};
    std::uint32_t introduction_size_ = 0;
    alignas(8) unsigned char introduction_[sizeof(dr_device_attach)];
    const Fd *returned_ = nullptr;
    std::uint64_t features_ = 0;
    int seconds_ = 10;
    std::uint64_t deadline_ns_ = 0;
    std::uint32_t sequence_ = 0; // the last one used
    std::uint32_t awaited_ = 0;  // of the reply that ends greeting or entering
    std::atomic<const char *> gone_{nullptr};
};

} // namespace dirtyring::client
