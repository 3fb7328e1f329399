#include "service/guests/peer_fds.hpp"

#include <fmt/format.h>

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace dirtyring::service {

namespace {

// SO_PEERPIDFD is newer than Debian 12's headers.
constexpr int so_peerpidfd = 77;

} // namespace

Result<ring::Fd> duplicate(int fd)
{
    ring::Fd copy(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (!copy)
        return refusal(errno, fmt::format("out of descriptors: {}", std::strerror(errno)));
    return copy;
}

Result<ring::Fd> read_only(const ring::Region &region)
{
    ring::Fd copy;
    if (const int error = region.read_only(copy); error != 0)
        return refusal(-error, fmt::format("cannot reopen a region read-only: {}", std::strerror(-error)));
    return copy;
}

Result<Process> peer_process(int socket)
{
    ucred credentials{};
    socklen_t size = sizeof credentials;
    if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0)
        return refusal(ESRCH, "the peer's process is not known");
    int pidfd = -1;
    size = sizeof pidfd;
    if (::getsockopt(socket, SOL_SOCKET, so_peerpidfd, &pidfd, &size) != 0)
        pidfd = static_cast<int>(::syscall(SYS_pidfd_open, credentials.pid, 0));
    if (pidfd < 0)
        return refusal(ESRCH, fmt::format("process {} cannot be watched: {}", credentials.pid, std::strerror(errno)));
    return Process{credentials.pid, ring::Fd(pidfd)};
}

bool has_ended(const ring::Fd &pidfd)
{
    pollfd waiting{pidfd.get(), POLLIN, 0};
    return !pidfd || ::poll(&waiting, 1, 0) == 1;
}

} // namespace dirtyring::service
