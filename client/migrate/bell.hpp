// Wakes one sleeper of another process or thread. The flag lies in the control block, the eventfd is inherited by fork.
#pragma once

#include "client/migrate/clock.hpp"
#include "client/migrate/failure.hpp"
#include "ring/region.hpp"

#include <array>
#include <atomic>
#include <cstdint>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

namespace dirtyring::migrate {

// Sleeper: arm, look at what it waits for, sleep. Ringer: change that, ring. This is the store-buffering shape, so both
// the flag here and what is waited for (in struct Control) are seq_cst on both sides: either the sleeper sees the
// change or the ringer sees the flag.
class Bell
{
  public:
    explicit Bell(std::atomic<std::uint32_t> &asleep) : asleep_(&asleep), fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK))
    {
        if (!fd_)
            throw system_failure("eventfd");
    }

    void ring() const
    {
        if (asleep_->load(std::memory_order_seq_cst) != 0 && asleep_->exchange(0, std::memory_order_seq_cst) != 0) {
            const std::uint64_t one = 1;
            [[maybe_unused]] const ssize_t written = ::write(fd_.get(), &one, sizeof one); // cannot fill up
        }
    }

    void arm() const { asleep_->store(1, std::memory_order_seq_cst); }

    // Sleeps until the bell rings, one of the others (-1: none) is readable, or the deadline. Tells which of the others
    // are. Call it armed.
    std::array<bool, 2> sleep(std::uint64_t deadline_ns, std::array<int, 2> others = {-1, -1}) const
    {
        std::array<pollfd, 3> fds{{{fd_.get(), POLLIN, 0}, {others[0], POLLIN, 0}, {others[1], POLLIN, 0}}};
        const timespec timeout = until(deadline_ns);
        if (::ppoll(fds.data(), fds.size(), &timeout, nullptr) < 0) {
            if (errno != EINTR)
                throw system_failure("ppoll");
            return {};
        }
        std::uint64_t rings = 0;
        if (fds[0].revents != 0) [[maybe_unused]]
            const ssize_t got = ::read(fd_.get(), &rings, sizeof rings);
        return {fds[1].revents != 0, fds[2].revents != 0};
    }

    // Sleeps until ready() or the deadline; tells which.
    template <class Ready> bool wait(Ready ready, std::uint64_t deadline_ns = never) const
    {
        while (!ready()) {
            if (now_ns() >= deadline_ns)
                return false;
            arm();
            if (ready())
                break;
            sleep(deadline_ns);
        }
        return true;
    }

  private:
    std::atomic<std::uint32_t> *asleep_;
    ring::Fd fd_;
};

} // namespace dirtyring::migrate
