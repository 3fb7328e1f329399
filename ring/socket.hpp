// A control message with its descriptors, as sendmsg and recvmsg take it. No allocation, no exceptions: libdirtyring
// uses it too.
#pragma once

#include "ring/control.h"
#include "ring/region.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <sys/socket.h>

namespace dirtyring::ring {

// The descriptors that travel with a message, and the control buffer for them.
class FdList
{
  public:
    FdList() = default;
    FdList(const FdList &) = delete;
    FdList &operator=(const FdList &) = delete;
    ~FdList() { close_all(); }

    // Takes ownership. There is room for DR_MESSAGE_FDS_MAX.
    void add(Fd fd) { fds_[count_++] = fd.release(); }
    [[nodiscard]] unsigned count() const { return count_; }
    [[nodiscard]] int get(unsigned i) const { return fds_[i]; }
    [[nodiscard]] Fd take(unsigned i) { return Fd(std::exchange(fds_[i], -1)); }

    void close_all()
    {
        while (count_ > 0) {
            if (const int fd = fds_[--count_]; fd >= 0)
                ::close(fd);
        }
    }

    // Puts the list into msg for sendmsg. The list must outlive the call.
    void attach_to(msghdr &msg)
    {
        if (count_ == 0)
            return;
        msg.msg_control = control_;
        msg.msg_controllen = CMSG_SPACE(count_ * sizeof(int));
        cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(count_ * sizeof(int));
        std::memcpy(CMSG_DATA(c), fds_, count_ * sizeof(int));
    }

    // Makes room for descriptors before recvmsg.
    void prepare(msghdr &msg)
    {
        msg.msg_control = control_;
        msg.msg_controllen = sizeof control_;
    }

    // Takes what recvmsg brought; not after it failed, when msg says nothing. False: more came than a message may
    // carry; the list holds them all, for the caller to close.
    [[nodiscard]] bool take_from(msghdr &msg)
    {
        bool fits = (msg.msg_flags & MSG_CTRUNC) == 0;
        for (cmsghdr *c = CMSG_FIRSTHDR(&msg); c != nullptr; c = CMSG_NXTHDR(&msg, c)) {
            if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
                continue;
            const std::size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            for (std::size_t i = 0; i < n; ++i) {
                int fd = -1;
                std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof fd);
                add(Fd(fd));
            }
        }
        return fits && count_ <= DR_MESSAGE_FDS_MAX;
    }

  private:
    // As many as the kernel passes at once (SCM_MAX_FD), so that it never closes what does not fit.
    static constexpr unsigned passed_max = 253;

    int fds_[DR_MESSAGE_FDS_MAX + passed_max];
    unsigned count_ = 0;
    alignas(cmsghdr) char control_[CMSG_SPACE(passed_max * sizeof(int))];
};

// Reads a payload of `size` bytes into a struct of ours, as iommufd's copy_struct_from_user: what the sender does not
// know is zero, and what we do not know must be. -EINVAL: the size field is wrong or the payload ends before `required`
// bytes.
template <class T> int read_payload(const void *payload, std::size_t size, T &out, std::size_t required = sizeof(T))
{
    std::uint32_t stated = 0;
    if (size >= sizeof stated)
        std::memcpy(&stated, payload, sizeof stated);
    if (stated != size || size < required)
        return -EINVAL;
    out = T{};
    std::memcpy(&out, payload, std::min(size, sizeof(T)));
    const auto *bytes = static_cast<const unsigned char *>(payload);
    for (std::size_t i = sizeof(T); i < size; ++i) {
        if (bytes[i] != 0)
            return -E2BIG;
    }
    return 0;
}

} // namespace dirtyring::ring
