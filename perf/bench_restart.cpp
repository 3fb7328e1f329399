// What a guest notices when the service's worker is killed: from SIGKILL to the first new run at its consumer, and
// where that time goes. A guest of 16 GiB in 4 KiB leaves; a device writes all the time, a consumer polls.
// bench_restart [KILLS]
#include "client/migrate/failure.hpp"
#include "client/migrate/newest_child.hpp"
#include "client/migrate/temporary_directory.hpp"
#include "perf/service.hpp"
#include "ring/region.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <iterator>
#include <poll.h>
#include <string>
#include <string_view>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

using namespace dirtyring;
using migrate::Failure;
using perf::must;
using perf::now_ns;

constexpr std::uint64_t memory_bytes = 16ull << 30;
constexpr std::uint64_t stride = 4u << 20; // between pages that the device writes, so that the memory stays small
constexpr std::chrono::microseconds between_writes{50};
constexpr std::chrono::milliseconds between_kills{100};
constexpr std::uint64_t patience_ns = 10'000'000'000;

// Where the time goes: up to a line of the log, in this order; the last one is the consumer's.
struct Step {
    const char *what;
    const char *line;
};
constexpr std::array steps{
    Step{"the supervisor has noticed", "died of SIGKILL"},
    Step{"the next worker is forked", " started with "},
    Step{"its main begins", "a worker begins"},
    Step{"the EAL is up", "EAL is up"},
    Step{"it has the guests again", "took up "},
    Step{"it is ready", "was ready after"},
    Step{"the consumer has a new run", nullptr},
};

// µs since midnight of the line that has `what` in it, as the service's log has them. The supervisor's lines and the
// worker's are not always in order.
double time_of(std::string_view what, const std::vector<std::string> &lines)
{
    constexpr std::size_t clock = 11; // behind "2026-01-31 "
    for (const std::string &line : lines) {
        unsigned hours = 0;
        unsigned minutes = 0;
        double seconds = 0;
        if (line.find(what) != std::string::npos && line.size() > clock &&
            std::sscanf(line.c_str() + clock, "%u:%u:%lf", &hours, &minutes, &seconds) == 3)
            return ((hours * 60 + minutes) * 60 + seconds) * 1e6;
    }
    throw Failure(fmt::format("the log has no line with \"{}\"", what));
}

// The same of now.
double time_now()
{
    timespec now{};
    clock_gettime(CLOCK_REALTIME, &now);
    tm local{};
    localtime_r(&now.tv_sec, &local);
    return ((local.tm_hour * 60 + local.tm_min) * 60 + local.tm_sec) * 1e6 + static_cast<double>(now.tv_nsec) / 1e3;
}

// A supervised dirtyringd that logs to us.
class Service
{
  public:
    Service()
    {
        int ends[2];
        if (::pipe2(ends, O_CLOEXEC) != 0)
            throw migrate::system_failure("pipe");
        log_ = ring::Fd(ends[0]);
        const ring::Fd write_end(ends[1]);
        const std::string program = std::filesystem::read_symlink("/proc/self/exe").parent_path() / "dirtyringd";
        supervisor_ = ::fork();
        if (supervisor_ == 0) {
            ::prctl(PR_SET_PDEATHSIG, SIGKILL);
            ::dup2(write_end.get(), STDERR_FILENO);
            ::execl(program.c_str(), program.c_str(), "--supervise", "--log-level", "debug", "--socket-path",
                    socket().c_str(), nullptr);
            ::_exit(EXIT_FAILURE);
        }
        (void)read_log("was ready after");
    }
    Service(const Service &) = delete;
    Service &operator=(const Service &) = delete;
    ~Service()
    {
        ::kill(supervisor_, SIGTERM);
        ::waitpid(supervisor_, nullptr, 0);
    }

    [[nodiscard]] std::string socket() const { return directory_.path() + "/service.sock"; }

    // A pidfd.
    [[nodiscard]] ring::Fd worker() const
    {
        const pid_t pid = migrate::newest_child(supervisor_);
        ring::Fd worker(pid > 0 ? static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)) : -1);
        if (!worker)
            throw Failure("there is no worker to kill");
        return worker;
    }

    // The lines from here to the first that has `last` in it.
    std::vector<std::string> read_log(std::string_view last)
    {
        std::vector<std::string> lines;
        for (;;) {
            for (std::size_t end = 0; (end = text_.find('\n')) != std::string::npos; text_.erase(0, end + 1)) {
                lines.push_back(text_.substr(0, end));
                if (lines.back().find(last) != std::string::npos) {
                    text_.erase(0, end + 1);
                    return lines;
                }
            }
            char buffer[4096];
            const ssize_t got = ::read(log_.get(), buffer, sizeof buffer);
            if (got <= 0)
                throw Failure("dirtyringd has ended");
            text_.append(buffer, static_cast<std::size_t>(got));
        }
    }

  private:
    migrate::TemporaryDirectory directory_;
    ring::Fd log_;
    std::string text_; // read and not yet taken
    pid_t supervisor_ = 0;
};

class BusyGuest
{
  public:
    explicit BusyGuest(const std::string &socket)
        : guest_(socket, {.memory_bytes = memory_bytes, .ring_entries = 4096}),
          writer_([this](const std::stop_token &stop) { write(stop); })
    {
    }

    // Takes what is there.
    bool drain()
    {
        bool runs = false;
        guest_.drain([&](auto...) { runs = true; });
        return runs;
    }

    void await_run()
    {
        const std::uint64_t deadline = now_ns() + patience_ns;
        while (!drain()) {
            if (now_ns() > deadline)
                throw Failure("no run came within 10 s");
        }
    }

    void consume(std::chrono::milliseconds time)
    {
        const std::uint64_t end = now_ns() + static_cast<std::uint64_t>(std::chrono::nanoseconds(time).count());
        while (now_ns() < end)
            drain();
        must(guest_.guest().reconnect());
    }

  private:
    void write(const std::stop_token &stop)
    {
        std::uint64_t iova = 0;
        while (!stop.stop_requested()) {
            guest_.write(iova);
            iova = (iova + stride) % memory_bytes;
            std::this_thread::sleep_for(between_writes);
        }
    }

    perf::ServedGuest guest_;
    std::jthread writer_;
};

struct Times { // µs
    std::array<double, steps.size()> parts;
    double whole;
};

Times kill_once(Service &service, BusyGuest &guest)
{
    const ring::Fd worker = service.worker();
    const double killed = time_now();
    if (::syscall(SYS_pidfd_send_signal, worker.get(), SIGKILL, nullptr, 0) != 0)
        throw Failure("the worker cannot be killed");
    pollfd death{worker.get(), POLLIN, 0};
    ::poll(&death, 1, -1);
    guest.drain(); // what it had published; all that comes now is its successor's
    guest.await_run();
    const double back = time_now();
    const std::vector<std::string> lines = service.read_log("was ready after");
    Times times{.parts = {}, .whole = back - killed};
    double last = killed;
    for (std::size_t step = 0; step < steps.size(); ++step) {
        const double now = std::max(last, steps[step].line == nullptr ? back : time_of(steps[step].line, lines));
        times.parts[step] = now - last;
        last = now;
    }
    return times;
}

void run(unsigned kills)
{
    Service service;
    BusyGuest guest(service.socket());
    std::vector<Times> all;
    for (unsigned i = 0; i < kills; ++i) {
        guest.consume(between_kills);
        all.push_back(kill_once(service, guest));
    }
    fmt::print("{:<30}{:>12}{:>12}\n", fmt::format("{} kills, 16 GiB mapped", kills), "median", "worst");
    const auto print_row = [&all](const char *what, auto time) {
        std::vector<double> us;
        std::transform(all.begin(), all.end(), std::back_inserter(us), time);
        std::sort(us.begin(), us.end());
        fmt::print("{:<30}{:>9.1f} ms{:>9.1f} ms\n", what, us[us.size() / 2] / 1000, us.back() / 1000);
    };
    for (std::size_t step = 0; step < steps.size(); ++step)
        print_row(steps[step].what, [step](const Times &t) { return t.parts[step]; });
    print_row("from SIGKILL to the new run", [](const Times &t) { return t.whole; });
}

} // namespace

int main(int argc, char **argv)
{
    unsigned kills = 30;
    if (argc == 2) {
        const std::string_view word(argv[1]);
        const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), kills);
        if (error != std::errc{} || end != word.data() + word.size() || kills == 0)
            argc = 3;
    }
    if (argc > 2) {
        fmt::print(stderr, "usage: bench_restart [KILLS]\n");
        return 2;
    }
    try {
        run(kills);
        return 0;
    } catch (const std::exception &e) {
        fmt::print(stderr, "bench_restart: {}\n", e.what());
        return 1;
    }
}
