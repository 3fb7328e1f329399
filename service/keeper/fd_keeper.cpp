#include "service/keeper/fd_keeper.hpp"

#include "service/keeper/fd_store.hpp"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstddef>
#include <cstring>
#include <numeric>
#include <sys/socket.h>
#include <sys/un.h>
#include <system_error>
#include <unistd.h>

namespace dirtyring::service {

namespace {

constexpr std::size_t message_max = PIPE_BUF; // systemd's
constexpr std::size_t passed_max = 253;       // the kernel's SCM_MAX_FD
constexpr std::size_t kept_name_max = 255;    // systemd's

bool is_name(std::string_view name)
{
    return !name.empty() && name.size() <= kept_name_max &&
           std::all_of(name.begin(), name.end(), [](char c) { return c >= ' ' && c < 127 && c != ':'; });
}

void need(int result, const char *what)
{
    if (result < 0)
        throw std::system_error(errno, std::generic_category(), what);
}

} // namespace

FdKeeper::FdKeeper() : socket_(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0))
{
    const int on = 1;
    sockaddr_un self{};
    self.sun_family = AF_UNIX;
    socklen_t size = sizeof self.sun_family; // the kernel finds a free name, and no file is left
    need(socket_.get(), "socket");
    need(::setsockopt(socket_.get(), SOL_SOCKET, SO_PASSCRED, &on, sizeof on), "SO_PASSCRED");
    need(::bind(socket_.get(), reinterpret_cast<sockaddr *>(&self), size), "bind");
    size = sizeof self;
    need(::getsockname(socket_.get(), reinterpret_cast<sockaddr *>(&self), &size), "getsockname");
    address_.assign(self.sun_path, size - offsetof(sockaddr_un, sun_path));
    address_.front() = '@';
}

bool FdKeeper::receive(pid_t sender)
{
    // Strangers can send as fast as we read. A mark behind all that is there now ends the work; the kernel lets a
    // socket send to itself when its queue is full for others.
    sockaddr_un self{};
    self.sun_family = AF_UNIX;
    address_.copy(self.sun_path, address_.size());
    self.sun_path[0] = '\0';
    ::sendto(socket_.get(), nullptr, 0, 0, reinterpret_cast<const sockaddr *>(&self),
             static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + address_.size()));
    bool ready = false;
    while (receive_one(sender, ready))
        ;
    return ready;
}

bool FdKeeper::receive_one(pid_t sender, bool &ready)
{
    char text[message_max];
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(ucred)) + CMSG_SPACE(passed_max * sizeof(int))];
    iovec piece{text, sizeof text};
    msghdr message{};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    const ssize_t size = ::recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC);
    if (size < 0)
        return false;

    ucred from{};
    std::vector<ring::Fd> fds; // closed at the end, unless kept: so a barrier ends too
    for (cmsghdr *c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
        if (c->cmsg_level != SOL_SOCKET)
            continue;
        if (c->cmsg_type == SCM_CREDENTIALS)
            std::memcpy(&from, CMSG_DATA(c), sizeof from);
        for (std::size_t i = 0; c->cmsg_type == SCM_RIGHTS && i < (c->cmsg_len - CMSG_LEN(0)) / sizeof(int); ++i) {
            int fd = -1;
            std::memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
            fds.emplace_back(fd);
        }
    }
    if (from.pid == ::getpid())
        return false;
    if (from.pid != sender || from.pid == 0) // 0: somebody in another PID namespace
        spdlog::debug("supervisor: ignored a message of process {}", from.pid);
    else if ((message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0)
        spdlog::warn("supervisor: ignored a message of the worker: it is too long, or no descriptor is left");
    else
        handle({text, static_cast<std::size_t>(size)}, std::move(fds), ready);
    return true;
}

void FdKeeper::handle(std::string_view text, std::vector<ring::Fd> fds, bool &ready)
{
    bool store = false;
    bool remove = false;
    std::string_view name;
    while (!text.empty()) {
        const std::string_view line = text.substr(0, text.find('\n'));
        text.remove_prefix(std::min(line.size() + 1, text.size()));
        store |= line == "FDSTORE=1";
        remove |= line == "FDSTOREREMOVE=1";
        ready |= line == "READY=1";
        if (constexpr std::string_view key = "FDNAME="; line.starts_with(key) && is_name(line.substr(key.size())))
            name = line.substr(key.size());
    }
    if (remove)
        std::erase_if(kept_, [&](const Kept &k) { return k.name == name; });
    if (store) {
        for (ring::Fd &fd : fds)
            keep(std::string(name.empty() ? "stored" : name), std::move(fd));
    }
}

void FdKeeper::keep(std::string name, ring::Fd fd)
{
    const std::size_t names_size = std::accumulate(kept_.begin(), kept_.end(), name.size() + 1,
                                                   [](std::size_t n, const Kept &k) { return n + k.name.size() + 1; });
    if (kept_.size() == FdStore::fds_max || names_size > FdStore::names_max) {
        spdlog::warn("supervisor: descriptor {} is not kept: there are {} already", name, kept_.size());
        return;
    }
    if (fd.get() < 3)
        fd = ring::Fd(::fcntl(fd.get(), F_DUPFD_CLOEXEC, 3));
    if (fd)
        kept_.push_back({std::move(name), std::move(fd)});
}

const std::vector<FdKeeper::Kept> &FdKeeper::kept()
{
    std::sort(kept_.begin(), kept_.end(), [](const Kept &a, const Kept &b) { return a.fd.get() < b.fd.get(); });
    return kept_;
}

} // namespace dirtyring::service
