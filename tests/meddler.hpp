// A service that is wrong in one way: dirtyringd behind a meddler, which passes messages on in both directions and changes some.
#pragma once

#include "ring/socket.hpp"
#include "tests/daemon.hpp"

#include <functional>
#include <mutex>
#include <set>
#include <thread>

namespace dirtyring::test {

struct Message {
    dr_message_header header{};
    Bytes payload;
    std::vector<Fd> fds;

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
};

inline bool read_all(int socket, void *to, std::size_t size, std::vector<Fd> &fds)
{
    for (std::size_t done = 0; done < size;) {
        iovec piece{static_cast<std::byte *>(to) + done, size - done};
        msghdr message{};
        message.msg_iov = &piece;
        message.msg_iovlen = 1;
        ring::FdList list;
        list.prepare(message);
        const ssize_t n = ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
        (void)list.take_from(message);
        for (unsigned i = 0; i < list.count(); ++i)
            fds.push_back(list.take(i));
        if (n <= 0)
            return false;
        done += static_cast<std::size_t>(n);
    }
    return true;
}

// True: a whole message, or a header that makes no sense.
inline bool read_message(int socket, Message &message, bool request)
{
    message = {};
    if (!read_all(socket, &message.header, sizeof message.header, message.fds))
        return false;
    if (request && !message.sane())
        return true;
    message.payload.resize(message.header.size);
    return read_all(socket, message.payload.data(), message.payload.size(), message.fds);
}

inline bool send_message(const Peer &to, const Message &message)
{
    Bytes bytes = bytes_of(message.header);
    bytes.insert(bytes.end(), message.payload.begin(), message.payload.end());
    std::vector<int> fds;
    for (const Fd &fd : message.fds)
        fds.push_back(fd.get());
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
        threads_.emplace_back([this] { accept(); });
    }
    ~Meddler()
    {
        ::shutdown(listener_.get(), SHUT_RDWR);
        threads_.front().join(); // no more threads from here on
        {
            const std::lock_guard lock(mutex_);
            for (const int s : open_)
                ::shutdown(s, SHUT_RDWR);
        }
        for (std::size_t i = 1; i < threads_.size(); ++i)
            threads_[i].join();
        ::unlink(socket().c_str());
    }

    [[nodiscard]] std::string socket() const { return directory_.path() + "/meddler"; }

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
    std::vector<std::thread> threads_;
};

} // namespace dirtyring::test
