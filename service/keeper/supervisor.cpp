#include "service/keeper/supervisor.hpp"

#include "service/keeper/fd_keeper.hpp"
#include "service/keeper/listener.hpp"

#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <systemd/sd-daemon.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstring>
#include <fcntl.h>
#include <optional>
#include <poll.h>
#include <string_view>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <system_error>
#include <thread>
#include <unistd.h>

namespace dirtyring::service {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds settled{20}; // who dies sooner after it was ready would die again
constexpr milliseconds pause_min{10};
constexpr milliseconds pause_max{1000};
constexpr unsigned early_deaths_max = 10; // in a row
constexpr milliseconds patience{10'000};  // with a worker that was asked to end

double ms(Clock::duration d)
{
    return std::chrono::duration<double, std::milli>(d).count();
}

std::vector<char *> pointers(std::vector<std::string> &words)
{
    std::vector<char *> all;
    for (std::string &word : words)
        all.push_back(word.data());
    all.push_back(nullptr);
    return all;
}

class Supervisor
{
  public:
    Supervisor(const std::string &program, std::vector<std::string> arguments, ring::Fd listener)
        : program_(program), arguments_(std::move(arguments))
    {
        std::signal(SIGCHLD, SIG_DFL); // ignored, it would hide how a worker died
        std::signal(SIGPIPE, SIG_IGN); // nobody may be reading the log
        sigset_t taken;
        sigemptyset(&taken);
        for (const int number : {SIGCHLD, SIGTERM, SIGINT, SIGHUP})
            sigaddset(&taken, number);
        ::sigprocmask(SIG_BLOCK, &taken, nullptr);
        signals_ = ring::Fd(::signalfd(-1, &taken, SFD_CLOEXEC | SFD_NONBLOCK));
        if (!signals_)
            throw std::system_error(errno, std::generic_category(), "signalfd");
        if (listener) {
            ::fcntl(listener.get(), F_SETFD, FD_CLOEXEC);
            keeper_.keep(Listener::kept_name, std::move(listener));
        }
    }

    int run()
    {
        start();
        while (!exit_code_) {
            wait();
            take_signals();
            receive();
            if (deadline_ && Clock::now() >= *deadline_) {
                deadline_.reset();
                if (worker_ == 0)
                    start();
                else
                    ::kill(worker_, SIGKILL);
            }
        }
        return *exit_code_;
    }

  private:
    void wait() const
    {
        pollfd events[] = {{signals_.get(), POLLIN, 0}, {keeper_.socket(), POLLIN, 0}};
        int timeout = -1;
        if (deadline_)
            timeout = std::max(0, static_cast<int>(std::chrono::ceil<milliseconds>(*deadline_ - Clock::now()).count()));
        ::poll(events, std::size(events), timeout);
    }

    // ---- the life of a worker ----

    void start()
    {
        const std::vector<FdKeeper::Kept> &kept = keeper_.kept();
        std::vector<std::string> environment = worker_environment(kept);
        const std::vector<char *> variables = pointers(environment);
        const std::vector<char *> words = pointers(arguments_);
        const pid_t self = ::getpid();
        started_ = Clock::now();
        ready_.reset();
        const pid_t pid = ::fork();
        if (pid == 0)
            become_worker(self, kept, words, variables);
        if (pid < 0) {
            spdlog::error("supervisor: no worker can be started: {}", std::strerror(errno));
            return try_again(true);
        }
        worker_ = pid;
        spdlog::debug("supervisor: worker {} started with {} descriptors", worker_, kept.size());
    }

    // LISTEN_PID comes last, with room for the number, which the worker alone knows.
    [[nodiscard]] std::vector<std::string> worker_environment(const std::vector<FdKeeper::Kept> &kept) const
    {
        std::vector<std::string> all;
        for (char **variable = environ; *variable != nullptr; ++variable) {
            const std::string_view v(*variable);
            if (!v.starts_with("LISTEN_") && !v.starts_with("NOTIFY_SOCKET="))
                all.emplace_back(v);
        }
        all.push_back(fmt::format("NOTIFY_SOCKET={}", keeper_.address()));
        std::string names;
        for (const FdKeeper::Kept &k : kept)
            names += fmt::format("{}{}", names.empty() ? "" : ":", k.name);
        if (!kept.empty()) {
            all.push_back(fmt::format("LISTEN_FDNAMES={}", names));
            all.push_back(fmt::format("LISTEN_FDS={}", kept.size()));
            all.push_back(fmt::format("LISTEN_PID={:16}", ""));
        }
        return all;
    }

    // The signals that ask for an end stay blocked: one that comes before the worker waits for it does not kill it.
    [[noreturn]] void become_worker(pid_t supervisor, const std::vector<FdKeeper::Kept> &kept,
                                    const std::vector<char *> &words, const std::vector<char *> &variables) const
    {
        ::prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (::getppid() != supervisor)
            ::_exit(1); // it died before that
        sigset_t children;
        sigemptyset(&children);
        sigaddset(&children, SIGCHLD);
        ::sigprocmask(SIG_UNBLOCK, &children, nullptr);
        // None is overwritten before it was moved: see FdKeeper::kept().
        for (int to = SD_LISTEN_FDS_START; const FdKeeper::Kept &k : kept) {
            if (k.fd.get() == to)
                ::fcntl(to, F_SETFD, 0);
            else
                ::dup2(k.fd.get(), to);
            ++to;
        }
        if (!kept.empty()) {
            char *number = std::strchr(*(variables.end() - 2), '=') + 1;
            *std::to_chars(number, number + std::strlen(number), ::getpid()).ptr = '\0';
        }
        ::execve(program_.c_str(), words.data(), variables.data());
        fmt::print(stderr, "dirtyringd: cannot start {}: {}\n", program_, std::strerror(errno));
        ::_exit(127);
    }

    void receive()
    {
        if (!keeper_.receive(worker_) || ready_)
            return;
        ready_ = Clock::now();
        spdlog::info("supervisor: worker {} was ready after {:.1f} ms", worker_, ms(*ready_ - started_));
        if (!std::exchange(was_ever_ready_, true))
            ::sd_notify(0, "READY=1");
    }

    void take_signals()
    {
        for (signalfd_siginfo signal{};
             !exit_code_ && ::read(signals_.get(), &signal, sizeof signal) == sizeof signal;) {
            if (signal.ssi_signo == SIGCHLD)
                bury();
            else
                end(signal);
        }
    }

    void end(const signalfd_siginfo &signal)
    {
        spdlog::info("supervisor: asked to end by SIG{} of process {}",
                     ::sigabbrev_np(static_cast<int>(signal.ssi_signo)), signal.ssi_pid);
        ::sd_notify(0, "STOPPING=1");
        if (worker_ == 0) {
            exit_code_ = 0;
            return;
        }
        ::kill(worker_, std::exchange(ending_, true) ? SIGKILL : SIGTERM);
        deadline_ = Clock::now() + patience;
    }

    void bury()
    {
        siginfo_t death{};
        if (worker_ == 0 || ::waitid(P_PID, worker_, &death, WEXITED | WNOHANG | WNOWAIT) != 0 || death.si_pid == 0)
            return;
        // As long as it is not reaped nobody else has its pid: what comes from there is its own last will.
        receive();
        const auto now = Clock::now();
        const bool exited = death.si_code == CLD_EXITED;
        const int code = exited ? death.si_status : 1;
        const pid_t pid = std::exchange(worker_, 0);
        const std::string how =
            exited ? fmt::format("exit code {}", code) : fmt::format("SIG{}", ::sigabbrev_np(death.si_status));
        const bool hopeless = exited && (code == 0 || code == usage_error || (code == 1 && !was_ever_ready_));
        if (ending_ || hopeless) {
            spdlog::debug("supervisor: worker {} ended by {}", pid, how);
            exit_code_ = code;
            return reap(pid);
        }
        spdlog::error("supervisor: worker {} died of {} after {:.1f} ms, death {}; {} descriptors are kept", pid, how,
                      ms(now - started_), ++deaths_, keeper_.kept().size());
        try_again(!ready_ || now - *ready_ < settled);
        reap_aside(pid);
    }

    static void reap(pid_t pid) { ::waitid(P_PID, pid, nullptr, WEXITED); }

    // On a busy machine the kernel can take a second to forget a process: no worker waits for that.
    static void reap_aside(pid_t pid)
    {
        try {
            std::thread(reap, pid).detach();
        } catch (const std::system_error &) {
            reap(pid);
        }
    }

    void try_again(bool early)
    {
        early_deaths_ = early ? early_deaths_ + 1 : 0;
        if (early_deaths_ == early_deaths_max) {
            spdlog::critical("supervisor: {} workers in a row died as soon as they lived: giving up", early_deaths_);
            exit_code_ = 1;
        } else if (early) {
            const milliseconds pause = std::min(pause_min * (1 << (early_deaths_ - 1)), pause_max);
            spdlog::warn("supervisor: the next worker starts in {} ms", pause.count());
            deadline_ = Clock::now() + pause;
        } else {
            start();
        }
    }

    const std::string program_;
    std::vector<std::string> arguments_;
    FdKeeper keeper_;
    ring::Fd signals_;

    pid_t worker_ = 0; // 0: between two of them
    Clock::time_point started_;
    std::optional<Clock::time_point> ready_;
    std::optional<Clock::time_point> deadline_; // to start a worker, or to kill one that does not end
    bool was_ever_ready_ = false;
    bool ending_ = false;
    unsigned deaths_ = 0;
    unsigned early_deaths_ = 0;
    std::optional<int> exit_code_;
};

} // namespace

int supervise(const std::string &program, std::vector<std::string> arguments, ring::Fd listener)
{
    return Supervisor(program, std::move(arguments), std::move(listener)).run();
}

} // namespace dirtyring::service
