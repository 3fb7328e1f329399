#include "service/keeper/listener.hpp"

#include "ring/control.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <cerrno>
#include <cstring>
#include <ctime>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

namespace dirtyring::service {

namespace {

tl::unexpected<std::string> failed(const std::string &path, std::string_view why)
{
    return tl::unexpected(fmt::format("cannot listen on {}: {}", path, why));
}

enum class There { nobody, somebody, unknown };

// Whether somebody answers at the address. The socket of a service that has just died may still accept for a moment,
// while the kernel takes its io_uring apart; such a connection breaks, and then nobody is there.
There who_is_there(const sockaddr_un &address)
{
    struct {
        dr_message_header header{DR_HELLO, DR_PROTOCOL_VERSION, sizeof(dr_hello), 0};
        dr_hello hello{sizeof(dr_hello), DR_PROTOCOL_VERSION, 0};
    } message;
    constexpr int patience_ms = 2000;
    constexpr timeval patience{patience_ms / 1000, 0};
    constexpr timespec pause{0, 10'000'000};
    constexpr int tries = patience_ms / 10; // who hangs up on all of them, being full perhaps, is there too
    for (int i = 0; i < tries; ++i, ::nanosleep(&pause, nullptr)) {
        const ring::Fd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        ::setsockopt(probe.get(), SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience); // connect waits so long
        if (::connect(probe.get(), reinterpret_cast<const sockaddr *>(&address), sizeof address) != 0) {
            if (errno == EAGAIN)
                return There::somebody; // too busy to accept
            return errno == ECONNREFUSED ? There::nobody : There::unknown;
        }
        pollfd answer{probe.get(), POLLIN, 0};
        char byte = 0;
        if (::send(probe.get(), &message, sizeof message, MSG_NOSIGNAL) != sizeof message)
            continue;
        if (::poll(&answer, 1, patience_ms) <= 0 || ::recv(probe.get(), &byte, 1, 0) > 0)
            return There::somebody;
    }
    return There::somebody;
}

std::string bound_path(int fd)
{
    sockaddr_un address{};
    socklen_t size = sizeof address;
    ::getsockname(fd, reinterpret_cast<sockaddr *>(&address), &size);
    return {address.sun_path, ::strnlen(address.sun_path, sizeof address.sun_path)};
}

} // namespace

bool is_listening(int fd)
{
    int listening = 0;
    socklen_t size = sizeof listening;
    return ::getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) == 0 && listening != 0;
}

Listener::Listener(ring::Fd fd, std::string path) : fd_(std::move(fd)), path_(std::move(path))
{
    struct stat there {
    };
    if (!path_.empty() && ::lstat(path_.c_str(), &there) == 0) {
        device_ = there.st_dev;
        inode_ = there.st_ino;
    }
}

tl::expected<Listener, std::string> Listener::open(const std::string &path)
{
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (path.empty() || path.size() >= sizeof address.sun_path)
        return failed(path, fmt::format("a socket path has 1 to {} bytes, this one {}", sizeof address.sun_path - 1,
                                        path.size()));
    path.copy(address.sun_path, path.size());
    const auto *at = reinterpret_cast<const sockaddr *>(&address);

    ring::Fd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!fd)
        return failed(path, std::strerror(errno));
    struct stat there {
    };
    if (::lstat(path.c_str(), &there) == 0) {
        if (!S_ISSOCK(there.st_mode))
            return failed(path, "something else than a socket is there");
        switch (who_is_there(address)) {
        case There::somebody:
            return failed(path, "another service is listening there");
        case There::unknown:
            return failed(path, std::strerror(errno));
        case There::nobody:
            break;
        }
        if (::unlink(path.c_str()) != 0)
            return failed(path, fmt::format("the socket left over there cannot be removed: {}", std::strerror(errno)));
    }
    if (::bind(fd.get(), at, sizeof address) != 0 || ::listen(fd.get(), 64) != 0)
        return failed(path, std::strerror(errno));
    return Listener(std::move(fd), path);
}

tl::expected<Listener, std::string> Listener::inherit(int fd)
{
    int type = 0;
    socklen_t size = sizeof type;
    if (::getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) != 0 || type != SOCK_STREAM)
        return tl::unexpected(fmt::format("--fd {} is not a stream socket", fd));
    return Listener(ring::Fd(fd), {});
}

std::optional<Listener> Listener::handed_over(FdStore &store, const std::string &path)
{
    if (is_listening(store.get(kept_name))) {
        ring::Fd fd = store.take(kept_name);
        const bool ours = bound_path(fd.get()) == path;
        Listener self(std::move(fd), ours ? path : std::string());
        self.kept_ = true;
        return self;
    }
    for (const std::string &name : store.names()) {
        if (is_listening(store.get(name)))
            return Listener(store.take(name), {});
    }
    return std::nullopt;
}

void Listener::keep(FdStore &store)
{
    if (kept_ || path_.empty() || !store.kept())
        return;
    if (const int error = store.put(kept_name, fd_.get()); error == 0)
        kept_ = true;
    else
        spdlog::warn("the listening socket is not kept for a successor: {}", std::strerror(-error));
}

void Listener::remove(FdStore &store)
{
    store.remove(kept_name); // first: nobody is to inherit a socket that cannot be found
    remove_file();
}

void Listener::remove_file()
{
    struct stat there {
    };
    if (!path_.empty() && ::lstat(path_.c_str(), &there) == 0 && there.st_dev == device_ && there.st_ino == inode_)
        ::unlink(path_.c_str());
}

} // namespace dirtyring::service
