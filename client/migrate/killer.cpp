#include "client/migrate/killer.hpp"

#include "client/migrate/clock.hpp"
#include "client/migrate/failure.hpp"
#include "client/migrate/newest_child.hpp"

#include <algorithm>
#include <csignal>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace dirtyring::migrate {
namespace {

constexpr int glance_ms = 2;
constexpr std::uint64_t ms_ns = 1'000'000;
constexpr std::uint64_t settled_ns = 25 * ms_ns; // the supervisor takes who dies sooner after it was ready for hopeless
constexpr std::uint64_t rest_ns = 10 * ms_ns;    // after which a pause of the devices is taken for one

// A pidfd, empty when there is none, as there may be between two workers. Whom it names was the supervisor's child all
// the time, and no stranger who got the pid.
ring::Fd worker_of(pid_t supervisor)
{
    const pid_t pid = newest_child(supervisor);
    ring::Fd worker(pid != 0 ? static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)) : -1);
    return pid == newest_child(supervisor) ? std::move(worker) : ring::Fd();
}

bool dies_within(const ring::Fd &process, int timeout_ms)
{
    pollfd end{process.get(), POLLIN, 0};
    return ::poll(&end, 1, timeout_ms) > 0;
}

// Never before the worker has reported something: one after the other that dies before would keep the guest waiting for
// good. And never while the devices rest, which would look as if the service were away for long.
bool due(const Control &control, std::uint64_t interval_ns)
{
    if (phase(control) < Phase::running || now_ns() > control.reported_ns.load(std::memory_order_relaxed) + rest_ns)
        return false;
    const std::uint64_t killed = control.killed_ns.load(std::memory_order_relaxed); // by this process
    const std::uint64_t back = control.back_ns.load(std::memory_order_relaxed);
    if (killed == 0)
        return now_ns() >= control.start_ns + interval_ns;
    return back > killed && now_ns() >= std::max(killed + interval_ns, back + settled_ns);
}

} // namespace

void kill_workers(Shared &shared, pid_t supervisor)
{
    Control &control = shared.control;
    const std::uint64_t interval_ns = shared.options.kill_service_ms * ms_ns;
    const auto finished = [&control] { return phase(control) == Phase::finished; };
    while (!finished()) {
        const ring::Fd worker = worker_of(supervisor);
        if (!worker || dies_within(worker, 0)) { // there is no next one yet
            ::poll(nullptr, 0, glance_ms);
            continue;
        }
        while (!finished() && !due(control, interval_ns)) {
            if (dies_within(worker, glance_ms) && !finished())
                throw Failure("a worker of the service died, and it was not this one's doing");
        }
        if (finished())
            break;
        const std::uint64_t killed = now_ns();
        if (::syscall(SYS_pidfd_send_signal, worker.get(), SIGKILL, nullptr, 0) != 0)
            throw system_failure("a worker of the service cannot be killed");
        while (!dies_within(worker, -1)) {
        }
        control.service_kills.fetch_add(1, std::memory_order_relaxed);
        control.killed_ns.store(killed, std::memory_order_release); // pairs with Reports::drain
    }
}

} // namespace dirtyring::migrate
