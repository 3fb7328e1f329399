// System calls for each sleep and wake, of a consumer that sleeps after every run and of a service that calls it. Both
// processes are traced, which makes them slow, so it is counted and not timed.
#include "perf/figures.hpp"
#include "perf/service.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <new>
#include <optional>
#include <set>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <thread>

namespace {

using namespace dirtyring;
using namespace dirtyring::perf;

enum class Phase { making, ready, counted, done };

struct Counts {
    std::uint64_t vmm = 0;
    std::uint64_t kicks = 0;      // of these, those that wake the walker
    std::uint64_t vmm_sleeps = 0; // and those that wait
    std::uint64_t service = 0;
    std::uint64_t wakes = 0;  // of these, those that hand calls to the kernel
    std::uint64_t sleeps = 0; // and those that wait
};

// The VMM: another process, so that it can be traced. Its device, in a thread that is not traced, writes only when it
// sleeps.
void sleep_and_wake(const std::string &socket, std::atomic<Phase> &phase, unsigned times)
{
    ServedGuest guest(socket, {.memory_bytes = 1ull << 30});
    std::atomic<unsigned> sleeps = 0;
    std::thread device([&] {
        for (unsigned i = 0; i < times; ++i) {
            while (sleeps <= i)
                ::usleep(100);
            ::usleep(1000);
            guest.write(i % 1024 * DR_PAGE);
        }
    });
    phase = Phase::ready;
    while (phase == Phase::ready)
        ::usleep(1000);
    for (unsigned i = 0; i < times; ++i) {
        ++sleeps;
        while (guest.drain([](auto...) {}) == 0)
            guest.rings().wait();
    }
    phase = Phase::done;
    device.join();
}

// False: it may not be traced here.
bool trace(pid_t thread)
{
    return ::ptrace(PTRACE_SEIZE, thread, nullptr, PTRACE_O_TRACESYSGOOD) == 0 &&
           ::ptrace(PTRACE_INTERRUPT, thread, nullptr, nullptr) == 0;
}

bool trace_all(pid_t pid)
{
    const std::filesystem::directory_iterator threads(fmt::format("/proc/{}/task", pid));
    return std::all_of(begin(threads), end(threads),
                       [](const auto &thread) { return trace(std::stoi(thread.path().filename())); });
}

// What both do until the phase is done.
std::optional<Counts> count(pid_t vmm, pid_t service, std::atomic<Phase> &phase)
{
    if (!trace(vmm) || !trace_all(service))
        return std::nullopt;
    phase = Phase::counted;
    Counts counts;
    std::set<pid_t> begun; // a thread's first call is the one that was interrupted to trace it
    while (phase != Phase::done) {
        int status = 0;
        const pid_t thread = ::waitpid(-1, &status, __WALL);
        if (thread < 0 || WIFEXITED(status) || WIFSIGNALED(status))
            throw Failure("what was traced has ended");
        __ptrace_syscall_info info{};
        if (WSTOPSIG(status) == (SIGTRAP | 0x80) && ::ptrace(PTRACE_GET_SYSCALL_INFO, thread, sizeof info, &info) > 0 &&
            info.op == PTRACE_SYSCALL_INFO_ENTRY && phase == Phase::counted && info.entry.nr != SYS_clock_nanosleep &&
            !begun.insert(thread).second) {
            ++(thread == vmm ? counts.vmm : counts.service);
            counts.kicks += thread == vmm && info.entry.nr == SYS_write;
            counts.vmm_sleeps += thread == vmm && info.entry.nr == SYS_epoll_wait && info.entry.args[3] != 0;
            const bool enters = thread != vmm && info.entry.nr == SYS_io_uring_enter;
            counts.sleeps += enters && info.entry.args[2] > 0;
            counts.wakes += enters && info.entry.args[2] == 0;
        }
        ::ptrace(PTRACE_SYSCALL, thread, nullptr, nullptr);
    }
    return counts;
}

void measure_calls(Session &session)
{
    const char *name = "system calls for sleeps and wakes";
    if (cores() < 2)
        return session.skip(name, "needs two cores");
    const unsigned times = session.pick(10u, 1000u, 10000u);
    const Service service;
    void *shared = ::mmap(nullptr, DR_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        throw Failure("no shared memory");
    auto &phase = *new (shared) std::atomic<Phase>(Phase::making);
    const pid_t vmm = ::fork();
    if (vmm == 0) {
        ::prctl(PR_SET_PDEATHSIG, SIGKILL);
        sleep_and_wake(service.socket(), phase, times);
        ::_exit(EXIT_SUCCESS);
    }
    while (phase == Phase::making && ::waitpid(vmm, nullptr, WNOHANG) == 0)
        ::usleep(1000);
    const std::optional<Counts> counts = count(vmm, service.pid(), phase);
    ::kill(vmm, SIGKILL);
    ::waitpid(vmm, nullptr, 0);
    if (!counts)
        return session.skip(name, "processes may not be traced");
    const auto add = [&](const char *what, std::uint64_t calls, std::uint64_t count) {
        session.add(
            Figure{.name = what,
                   .unit = "calls",
                   .ours = {static_cast<double>(calls) / static_cast<double>(std::max<std::uint64_t>(count, 1))},
                   .goal = Goal::at_most(1)});
    };
    add("system calls of a consumer, each sleep", counts->vmm - counts->kicks, counts->vmm_sleeps);
    add("system calls of the walker, each wake of a consumer", counts->wakes, times);
    add("system calls of the walker, each sleep", counts->service - counts->wakes, counts->sleeps);
}

} // namespace

int main(int argc, char **argv)
{
    return run(argc, argv, measure_calls);
}
