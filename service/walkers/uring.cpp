#include "service/walkers/uring.hpp"

#include <cerrno>
#include <poll.h>
#include <sys/uio.h>
#include <system_error>

namespace dirtyring::service {

Uring::Uring(unsigned entries)
{
    if (const int error = io_uring_queue_init(entries, &ring_, 0); error != 0)
        throw std::system_error(-error, std::generic_category(), "io_uring_queue_init");
}

io_uring_sqe *Uring::sqe(std::uint64_t user_data)
{
    io_uring_sqe *entry = io_uring_get_sqe(&ring_);
    while (entry == nullptr) {
        io_uring_submit(&ring_);
        entry = io_uring_get_sqe(&ring_);
    }
    entry->user_data = user_data;
    return entry;
}

void Uring::write_eventfd(int fd, std::uint64_t user_data)
{
    static const std::uint64_t one = 1;
    io_uring_sqe *entry = sqe(user_data);
    io_uring_prep_write(entry, fd, &one, sizeof one, 0);
    entry->rw_flags = RWF_NOWAIT;
    entry->user_data = user_data;
}

void Uring::poll(int fd, std::uint64_t user_data)
{
    io_uring_sqe *entry = sqe(user_data);
    io_uring_prep_poll_multishot(entry, fd, POLLIN);
    entry->user_data = user_data;
}

void Uring::cancel_poll(std::uint64_t polled, std::uint64_t user_data)
{
    io_uring_sqe *entry = sqe(user_data);
    io_uring_prep_poll_remove(entry, polled);
    entry->user_data = user_data;
}

void Uring::submit()
{
    if (io_uring_sq_ready(&ring_) != 0)
        io_uring_submit(&ring_);
}

void Uring::submit_and_wait(std::uint64_t now_ns, std::uint64_t until_ns)
{
    if (until_ns == UINT64_MAX) {
        io_uring_submit_and_wait(&ring_, 1);
        return;
    }
    io_uring_cqe *cqe = nullptr;
    const std::uint64_t ns = until_ns > now_ns ? until_ns - now_ns : 0;
    __kernel_timespec wait{static_cast<long long>(ns / 1'000'000'000), static_cast<long long>(ns % 1'000'000'000)};
    io_uring_submit_and_wait_timeout(&ring_, &cqe, 1, &wait, nullptr);
}

} // namespace dirtyring::service
