// The control socket from a client's side: one request, one reply, together within 10 s.
//
// A reply that is late or makes no sense leaves the two sides out of step, so the connection is shut down then: every later
// call answers -ESHUTDOWN, and whoever polls the socket sees it hang up.
#pragma once

#include "client/internal.hpp"
#include "ring/control.h"

#include <algorithm>
#include <cstddef>
#include <ctime>
#include <poll.h>
#include <sys/socket.h>
#include <sys/time.h>
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
    int open(const char *path)
    {
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        const std::size_t length = std::strlen(path);
        if (length >= sizeof address.sun_path)
            return fail(ENAMETOOLONG, "a socket path has at most %zu bytes: %s", sizeof address.sun_path - 1, path);
        std::memcpy(address.sun_path, path, length);

        adopt(Fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)));
        // connect waits while the service's backlog is full.
        const timeval limit{timeout_s, 0};
        ::setsockopt(socket(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
        while (::connect(socket(), reinterpret_cast<const sockaddr *>(&address), sizeof address) != 0) {
            if (errno == EAGAIN)
                return fail(ETIMEDOUT, "%s did not accept a connection within %d s", path, timeout_s);
            if (errno != EINTR)
                return fail(errno, "cannot connect to %s: %s", path, std::strerror(errno));
        }
        return 0;
    }

    void adopt(Fd socket) { socket_ = std::move(socket); }
    [[nodiscard]] int socket() const { return socket_.get(); }
    [[nodiscard]] std::uint64_t features() const { return features_; }

    // The first request. -EPROTONOSUPPORT: no common version.
    int hello()
    {
        dr_hello request{};
        request.version = DR_PROTOCOL_VERSION;
        request.features = DR_FEATURES_ALL;
        dr_hello reply{};
        if (const int error = call(DR_HELLO, request, reply); error != 0)
            return error;
        if (reply.version != DR_PROTOCOL_VERSION)
            return fail(EPROTONOSUPPORT, "the service speaks protocol version %u, this library version %u",
                        reply.version, DR_PROTOCOL_VERSION);
        features_ = reply.features & DR_FEATURES_ALL;
        return 0;
    }

    // Sends a request with the descriptors in `fds`, and replaces them by those of the reply. A refusal is the service's errno
    // and sentence. The reply has at least its first `required` bytes; what it lacks beyond is zero.
    template <class In, class Out>
    int call(dr_request request, In in, Out &out, FdList &fds, std::uint32_t required = sizeof(Out))
    {
        in.size = sizeof in;
        Payload payload;
        if (const int error = exchange(request, &in, sizeof in, fds, payload); error != 0)
            return error;
        if (!payload.read(out, required))
            return fail(EPROTO, "the reply to request %d makes no sense: %u bytes", static_cast<int>(request),
                        payload.size);
        return 0;
    }

    // The same with no descriptors in either direction.
    template <class In, class Out> int call(dr_request request, const In &in, Out &out)
    {
        FdList fds;
        const int error = call(request, in, out, fds);
        return error != 0 ? error : expect_descriptors(fds, 0);
    }

  private:
    static constexpr int timeout_s = 10;

    struct Payload {
        std::uint32_t size = 0;
        unsigned char bytes[DR_MESSAGE_MAX];

        // What a newer service says beyond our struct is ignored.
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
    };

    int exchange(dr_request request, const void *in, std::uint32_t in_size, FdList &fds, Payload &payload)
    {
        deadline_ns_ = monotonic_ns() + timeout_s * 1'000'000'000ull;
        const dr_message_header sent{request, DR_PROTOCOL_VERSION, in_size, ++sequence_};
        dr_message_header got{};
        int error = send(sent, in, fds);
        fds.close_all();
        if (error == 0)
            error = receive(&got, sizeof got, fds);
        if (error == 0)
            error = check_reply(got, sent);
        if (error == 0)
            error = receive(payload.bytes, got.size, fds);
        if (error != 0) {
            ::shutdown(socket(), SHUT_RDWR);
            return error;
        }
        payload.size = got.size;
        return (got.flags & DR_MESSAGE_REFUSAL) != 0 ? refused(payload) : 0;
    }

    static int check_reply(const dr_message_header &got, const dr_message_header &sent)
    {
        constexpr std::uint32_t flags = DR_PROTOCOL_VERSION | DR_MESSAGE_REPLY;
        if (got.request == sent.request && got.sequence == sent.sequence &&
            (got.flags & ~DR_MESSAGE_REFUSAL) == flags && got.size >= sizeof(dr_empty) && got.size <= DR_MESSAGE_MAX)
            return 0;
        return fail(EPROTO,
                    "expected the reply to request %u, number %u; got request %u, number %u, flags %#x, %u bytes",
                    sent.request, sent.sequence, got.request, got.sequence, got.flags, got.size);
    }

    static int refused(const Payload &payload)
    {
        constexpr int errno_max = 4095;
        dr_refusal refusal{};
        if (!payload.read(refusal, offsetof(dr_refusal, sentence)) || refusal.error <= 0 || refusal.error > errno_max)
            return fail(EPROTO, "the service refused in a way that makes no sense");
        return fail(refusal.error, "%.*s", static_cast<int>(sizeof refusal.sentence), refusal.sentence);
    }

    int send(const dr_message_header &header, const void *payload, FdList &fds)
    {
        unsigned char message[sizeof header + DR_MESSAGE_MAX];
        std::memcpy(message, &header, sizeof header);
        std::memcpy(message + sizeof header, payload, header.size);
        const std::size_t size = sizeof header + header.size;
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

    int receive(void *to, std::size_t size, FdList &fds)
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
                return gone();
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
            return gone();
        if (error != EAGAIN)
            return fail(error, "the control socket failed: %s", std::strerror(error));
        const std::uint64_t now = monotonic_ns();
        if (now >= deadline_ns_)
            return fail(ETIMEDOUT, "the service did not answer within %d s", timeout_s);
        pollfd waiting{socket(), events, 0};
        ::poll(&waiting, 1, static_cast<int>((deadline_ns_ - now) / 1'000'000 + 1));
        return 0;
    }

    static int gone() { return fail(ESHUTDOWN, "the service closed the connection"); }

    Fd socket_;
    std::uint64_t features_ = 0;
    std::uint64_t deadline_ns_ = 0;
    std::uint32_t sequence_ = 0;
};

} // namespace dirtyring::client
