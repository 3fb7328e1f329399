// One io_uring of one thread, with what all users of it here need.
#pragma once

#include <cstdint>
#include <liburing.h>

namespace dirtyring::service {

class Uring
{
  public:
    explicit Uring(unsigned entries); // throws std::system_error
    ~Uring() { io_uring_queue_exit(&ring_); }
    Uring(const Uring &) = delete;
    Uring &operator=(const Uring &) = delete;

    // A submission entry; submits first when the queue is full.
    [[nodiscard]] io_uring_sqe *sqe(std::uint64_t user_data);

    // Adds 1 to an eventfd that a peer has. NOWAIT: the peer may have filled it and cleared O_NONBLOCK.
    void write_eventfd(int fd, std::uint64_t user_data);

    // Completes each time that fd becomes readable again, also if nobody reads it in between.
    void poll(int fd, std::uint64_t user_data);
    void cancel_poll(std::uint64_t polled, std::uint64_t user_data);

    // Hands the entries to the kernel, if there are any.
    void submit();
    // The same, and waits for a completion until the time on CLOCK_MONOTONIC.
    void submit_and_wait(std::uint64_t now_ns, std::uint64_t until_ns);

    // Calls handle(user_data, res, flags) for each completion that is there, at most reaped_at_once; true if there were
    // any. What handle() brings about, at once perhaps, is for the next call: peers could go on for ever.
    template <class Handle> bool reap(Handle handle)
    {
        bool any = false;
        io_uring_cqe *cqe = nullptr;
        for (unsigned n = 0; n < reaped_at_once && io_uring_peek_cqe(&ring_, &cqe) == 0; ++n) {
            const io_uring_cqe copy = *cqe;
            io_uring_cqe_seen(&ring_, cqe);
            handle(copy.user_data, copy.res, copy.flags);
            any = true;
        }
        return any;
    }

  private:
    static constexpr unsigned reaped_at_once = 512;

    io_uring ring_{};
};

} // namespace dirtyring::service
