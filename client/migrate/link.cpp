#include "client/migrate/link.hpp"

#include "client/migrate/clock.hpp"
#include "client/migrate/failure.hpp"
#include "client/migrate/options.hpp"
#include "client/migrate/units.hpp"

#include <algorithm>
#include <array>
#include <sys/socket.h>
#include <sys/uio.h>

namespace dirtyring::migrate {
namespace {

struct Header {
    std::uint64_t address;
    std::uint64_t length;
};

constexpr std::uint64_t second_ns = 1'000'000'000;
constexpr std::uint64_t window_min_ns = second_ns / 5;
constexpr std::uint64_t burst_ns = 2'000'000; // by how much a sleep that took too long is made up for

void send_all(int socket, Header header, std::span<const std::byte> data)
{
    std::array<iovec, 2> parts{{{&header, sizeof header}, {const_cast<std::byte *>(data.data()), data.size()}}};
    msghdr message{};
    message.msg_iov = parts.data();
    message.msg_iovlen = parts.size();
    while (message.msg_iovlen > 0) {
        const ssize_t sent = ::sendmsg(socket, &message, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            throw system_failure("the link to the destination VMM broke");
        }
        auto left = static_cast<std::size_t>(sent);
        while (message.msg_iovlen > 0 && left >= message.msg_iov->iov_len) {
            left -= message.msg_iov->iov_len;
            ++message.msg_iov;
            --message.msg_iovlen;
        }
        if (message.msg_iovlen > 0) {
            message.msg_iov->iov_base = static_cast<std::byte *>(message.msg_iov->iov_base) + left;
            message.msg_iov->iov_len -= left;
        }
    }
}

// False: the other end was closed.
bool receive_all(int socket, std::span<std::byte> data)
{
    while (!data.empty()) {
        const ssize_t got = ::recv(socket, data.data(), data.size(), MSG_WAITALL);
        if (got == 0)
            return false;
        if (got < 0 && errno != EINTR)
            throw system_failure("the migration link broke");
        data = data.subspan(got < 0 ? 0 : static_cast<std::size_t>(got));
    }
    return true;
}

} // namespace

LinkEnds make_link()
{
    int ends[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
        throw system_failure("socketpair");
    return {ring::Fd(ends[0]), ring::Fd(ends[1])};
}

std::uint64_t Link::chunk() const
{
    constexpr std::uint64_t most = 256u << 10;
    // A slow link takes a millisecond's worth: the rings are looked at between two chunks.
    return bandwidth_ == 0 ? most : std::clamp(bandwidth_ / 1000 / page_size * page_size, page_size, most);
}

void Link::send(std::uint64_t address, std::span<const std::byte> data)
{
    const std::uint64_t began = now_ns();
    send_all(socket_.get(), {address, data.size()}, data);
    const std::uint64_t sent = sizeof(Header) + data.size();
    bytes_sent_ += sent;
    if (bandwidth_ != 0) {
        const auto cost =
            static_cast<std::uint64_t>(static_cast<double>(sent) * second_ns / static_cast<double>(bandwidth_));
        free_at_ = std::max(free_at_, began - burst_ns) + cost;
    }
    measure(sent, began);
}

void Link::measure(std::uint64_t sent, std::uint64_t began_ns)
{
    const std::uint64_t now = now_ns();
    window_ns_ += now - (last_ns_ != 0 ? last_ns_ : began_ns);
    window_bytes_ += sent;
    last_ns_ = now;
    const bool full = window_ns_ >= window_min_ns;
    if (full || !measured_)
        rate_ = static_cast<double>(window_bytes_) * second_ns /
                static_cast<double>(std::max<std::uint64_t>(window_ns_, 1));
    if (full) {
        measured_ = true;
        window_ns_ = 0;
        window_bytes_ = 0;
    }
}

void Link::finish()
{
    send_all(socket_.get(), {0, 0}, {});
    bytes_sent_ += sizeof(Header);
    std::byte acknowledgement{};
    if (!receive_all(socket_.get(), {&acknowledgement, 1}))
        throw Failure("the destination VMM went away before it acknowledged the end");
}

bool receive(const ring::Fd &socket, std::span<std::byte> memory)
{
    for (;;) {
        Header header{};
        if (!receive_all(socket.get(), std::as_writable_bytes(std::span(&header, 1))))
            return false;
        if (header.length == 0)
            break;
        if (header.address > memory.size() || header.length > memory.size() - header.address)
            throw Failure(fmt::format("the source VMM sent {} bytes for {:#x}, outside the memory of {}", header.length,
                                      header.address, bytes(memory.size())));
        if (!receive_all(socket.get(), memory.subspan(header.address, header.length)))
            return false;
    }
    const std::byte acknowledgement{1};
    if (::send(socket.get(), &acknowledgement, 1, MSG_NOSIGNAL) != 1)
        throw system_failure("the end cannot be acknowledged");
    return true;
}

} // namespace dirtyring::migrate
