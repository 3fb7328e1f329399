#include "client/check/peer.hpp"

#include "ring/socket.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

namespace dirtyring::check {

const char *request_name(std::uint32_t request)
{
    static constexpr std::array names{
        "",        "HELLO",         "GUEST_CREATE",  "MEMORY_ADD",    "IOAS_ALLOC",  "HWPT_ALLOC", "RING_GET",
        "DESTROY", "DEVICE_ATTACH", "DEVICE_DETACH", "GUEST_DESTROY", "DEVICE_INFO", "HWPT_STATUS"};
    return request > 0 && request < names.size() ? names[request] : "an unknown request";
}

std::string error_name(int error)
{
    const char *known = ::strerrorname_np(error);
    return known != nullptr ? known : fmt::format("errno {}", error);
}

std::string Reply::outcome() const
{
    if (!refused())
        return "it was done";
    const auto refusal = as<dr_refusal>();
    return fmt::format("refused with {} ({})", error_name(refusal.error),
                       std::string_view(refusal.sentence, ::strnlen(refusal.sentence, sizeof refusal.sentence)));
}

Peer::Peer(Context &context)
    : context_(context), socket_(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0))
{
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    context.socket.copy(address.sun_path, sizeof address.sun_path - 1);
    // EAGAIN: the backlog is full.
    int error = EAGAIN;
    const bool answered = context.comes_true([&] {
        error = ::connect(socket_.get(), reinterpret_cast<const sockaddr *>(&address), sizeof address) == 0 ? 0 : errno;
        return error != EAGAIN;
    });
    if (!answered || error != 0)
        throw Gone(fmt::format("cannot connect to {}: {}", context.socket, std::strerror(error)));
}

bool Peer::send(const Bytes &bytes, const std::vector<int> &fds) const
{
    std::vector<std::byte> control(CMSG_SPACE(fds.size() * sizeof(int)));
    for (std::size_t done = 0; done < bytes.size();) {
        iovec piece{const_cast<std::byte *>(bytes.data()) + done, bytes.size() - done};
        msghdr message{};
        message.msg_iov = &piece;
        message.msg_iovlen = 1;
        if (!fds.empty() && done == 0) {
            message.msg_control = control.data();
            message.msg_controllen = control.size();
            cmsghdr *c = CMSG_FIRSTHDR(&message);
            c->cmsg_level = SOL_SOCKET;
            c->cmsg_type = SCM_RIGHTS;
            c->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
            std::memcpy(CMSG_DATA(c), fds.data(), fds.size() * sizeof(int));
        }
        const ssize_t n = ::sendmsg(socket_.get(), &message, MSG_NOSIGNAL);
        if (n > 0) {
            done += static_cast<std::size_t>(n);
            continue;
        }
        pollfd writable{socket_.get(), POLLOUT, 0};
        if (errno != EAGAIN || ::poll(&writable, 1, context_.deadline.of_a_wait().ms_left()) != 1)
            return false;
    }
    return true;
}

Bytes Peer::message(std::uint32_t request, const Bytes &payload, std::uint32_t sequence)
{
    const dr_message_header header{request, DR_PROTOCOL_VERSION, static_cast<std::uint32_t>(payload.size()), sequence};
    Bytes all(sizeof header + payload.size());
    std::memcpy(all.data(), &header, sizeof header);
    std::copy(payload.begin(), payload.end(), all.begin() + sizeof header);
    return all;
}

void Peer::read(void *to, std::size_t size, std::vector<Fd> &fds, std::uint32_t request) const
{
    for (std::size_t done = 0; done < size;) {
        iovec piece{static_cast<std::byte *>(to) + done, size - done};
        msghdr message{};
        message.msg_iov = &piece;
        message.msg_iovlen = 1;
        ring::FdList list;
        list.prepare(message);
        const ssize_t n = ::recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC);
        if (n > 0) {
            const bool fits = list.take_from(message);
            context_.need(fits, "F-8", request_name(request), "more descriptors than a message may carry",
                          fmt::format("at most {}", DR_MESSAGE_FDS_MAX));
            for (unsigned i = 0; i < list.count(); ++i)
                fds.push_back(list.take(i));
            done += static_cast<std::size_t>(n);
            continue;
        }
        const bool closed = n == 0 || errno == ECONNRESET;
        pollfd readable{socket_.get(), POLLIN, 0};
        const bool more = !closed && ::poll(&readable, 1, context_.deadline.of_a_wait().ms_left()) == 1;
        context_.need(more, "F-4", request_name(request), closed ? "the connection was closed" : context_.nothing(),
                      "a reply");
    }
}

void Peer::check_header(const dr_message_header &h, std::uint32_t request, std::uint32_t sequence) const
{
    constexpr std::uint32_t known = DR_MESSAGE_VERSION_MASK | DR_MESSAGE_REPLY | DR_MESSAGE_REFUSAL;
    const std::string where = fmt::format("the reply to {}", request_name(request));
    const std::string flags = fmt::format("flags {:#x}", h.flags);
    context_.expect((h.flags & DR_MESSAGE_VERSION_MASK) == DR_PROTOCOL_VERSION && (h.flags & ~known) == 0, "F-1", where,
                    flags, fmt::format("version {} and nothing above bit 3", DR_PROTOCOL_VERSION));
    context_.expect(h.request == request && h.sequence == sequence && (h.flags & DR_MESSAGE_REPLY) != 0, "F-5", where,
                    fmt::format("request {}, sequence {}, {}", h.request, h.sequence, flags),
                    fmt::format("request {}, sequence {}, bit 2", request, sequence));
    context_.need(h.size >= sizeof(dr_empty) && h.size <= DR_MESSAGE_MAX, "F-2", where, fmt::format("size {}", h.size),
                  fmt::format("{} to {}", sizeof(dr_empty), DR_MESSAGE_MAX));
}

void Peer::check_payload(const Reply &reply, std::size_t required) const
{
    const std::string where = fmt::format("the reply to {}", request_name(reply.header.request));
    const auto stated = reply.as<dr_empty>().size;
    const std::size_t least = reply.refused() ? offsetof(dr_refusal, sentence) + 1 : required;
    context_.expect(stated == reply.payload.size() && stated >= least, "F-2", where,
                    fmt::format("a payload of {} bytes that begins with {}", reply.payload.size(), stated),
                    fmt::format("its size, {} or more", least));
    if (!reply.refused())
        return;
    const auto refusal = reply.as<dr_refusal>();
    const std::size_t length = ::strnlen(refusal.sentence, sizeof refusal.sentence);
    context_.expect(refusal.error > 0 && refusal.error < 4096 && length > 0 && length < sizeof refusal.sentence, "F-6",
                    where, fmt::format("error {} and a sentence of {} bytes", refusal.error, length),
                    fmt::format("a positive errno and 1 to {} bytes before a NUL", sizeof refusal.sentence - 1));
}

Reply Peer::receive(std::uint32_t request, std::uint32_t sequence, std::size_t required,
                    std::optional<unsigned> descriptors)
{
    Reply reply;
    const std::string where = fmt::format("the reply to {}", request_name(request));
    read(&reply.header, 1, reply.fds, request);
    const std::size_t first = reply.fds.size();
    read(reinterpret_cast<std::byte *>(&reply.header) + 1, sizeof reply.header - 1, reply.fds, request);
    check_header(reply.header, request, sequence);
    reply.payload.resize(reply.header.size);
    read(reply.payload.data(), reply.payload.size(), reply.fds, request);
    context_.verdicts.pass("F-4");
    check_payload(reply, required);
    const std::size_t count = reply.fds.size();
    if (count > 0)
        context_.expect(count == first, "F-3", where,
                        fmt::format("{} descriptors behind its first byte", count - first), "all with its first byte");
    if (reply.refused())
        context_.expect(count == 0, "F-7", where, fmt::format("a refusal with {} descriptors", count), "none");
    else if (descriptors)
        context_.need(count == *descriptors, "F-8", where, fmt::format("{} descriptors", count),
                      fmt::format("{}", *descriptors));
    return reply;
}

bool Peer::hangs_up() const
{
    char ignored[4096];
    for (;;) {
        const ssize_t n = ::recv(socket_.get(), ignored, sizeof ignored, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN))
            return true;
        pollfd readable{socket_.get(), POLLIN, 0};
        if (n < 0 && ::poll(&readable, 1, context_.deadline.of_a_wait().ms_left()) != 1)
            return false;
    }
}

Reply Peer::call_bytes(std::uint32_t request, const Bytes &payload, const std::vector<int> &fds)
{
    const std::uint32_t sequence = ++sequence_;
    send(message(request, payload, sequence), fds);
    return receive(request, sequence, sizeof(dr_empty), std::nullopt);
}

void Peer::refused(Rule rule, const Reply &reply, int error, const std::string &what) const
{
    context_.expect(reply.error() == error, rule, what, reply.outcome(), fmt::format("{}", error_name(error)));
}

Peer &Peer::hello(std::uint64_t features)
{
    get<dr_hello>(DR_HELLO, dr_hello{0, DR_PROTOCOL_VERSION, features});
    return *this;
}

} // namespace dirtyring::check
