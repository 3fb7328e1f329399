#include "tests/chaos/service.hpp"

#include "client/dirtyring.h"
#include "client/migrate/clock.hpp"
#include "client/migrate/failure.hpp"
#include "client/migrate/newest_child.hpp"
#include "tests/chaos/child.hpp"

#include <csignal>
#include <cstdlib>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

namespace dirtyring::chaos {

namespace {

constexpr std::size_t said_max = 12; // lines of the log, for a failure

std::string proc(pid_t pid, const char *what)
{
    return fmt::format("/proc/{}/{}", pid, what);
}

template <class Ready> bool comes_true(Ready ready, std::uint64_t limit_ns)
{
    const std::uint64_t deadline = migrate::now_ns() + limit_ns;
    while (!ready()) {
        if (migrate::now_ns() > deadline)
            return false;
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return true;
}

} // namespace

Holdings holdings(pid_t pid)
{
    Holdings all{};
    std::error_code gone; // the process, meanwhile
    for (const auto &entry : std::filesystem::directory_iterator(proc(pid, "fd"), gone)) {
        ++all.descriptors;
        all.memfds += std::filesystem::read_symlink(entry.path(), gone).string().starts_with("/memfd:") ? 1 : 0;
    }
    std::ifstream maps(proc(pid, "maps"));
    for (std::string line; std::getline(maps, line);)
        all.mapped += line.find("/memfd:") != std::string::npos ? 1 : 0;
    std::ifstream status(proc(pid, "status"));
    for (std::string word; status >> word;) {
        if (word == "VmRSS:")
            status >> all.resident;
    }
    return all;
}

Service::Service(const Options &options, const std::string &directory, const migrate::Signals &signals)
    : options_(options), directory_(directory)
{
    const std::string plan = directory + "/plan";
    const ring::Fd file(::open(plan.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600));
    if (!file || ::ftruncate(file.get(), sizeof(test::DiePlan)) != 0 ||
        plan_map_.map(file.get(), sizeof(test::DiePlan), PROT_READ | PROT_WRITE) != 0)
        throw migrate::system_failure(plan);
    plan_ = plan_map_.as<test::DiePlan>();

    const std::string program = std::filesystem::read_symlink("/proc/self/exe").parent_path() / "dirtyringd_breakable";
    const std::string log = directory + "/log";
    const std::string socket = directory + "/socket";
    supervisor_ = fork_part("supervisor", signals);
    if (supervisor_ == 0) {
        const int to = ::open(log.c_str(), O_CREAT | O_WRONLY | O_APPEND, 0600);
        ::dup2(to, STDERR_FILENO);
        ::close(to);
        ::setenv("DIRTYRING_DIE_PLAN", plan.c_str(), 1);
        ::setenv("DIRTYRING_BREAK", std::to_string(static_cast<int>(options.rule)).c_str(), 1);
        ::execl(program.c_str(), "dirtyringd", "--supervise", "--socket-path", socket.c_str(), "--walkers", "2",
                "--log-level", "info", nullptr);
        ::_exit(127);
    }
    expect_up();
}

Service::~Service()
{
    if (supervisor_ == 0)
        return;
    ::kill(supervisor_, SIGKILL); // its worker dies with it
    ::waitpid(supervisor_, nullptr, 0);
}

pid_t Service::worker() const
{
    return migrate::newest_child(supervisor_);
}

bool Service::signal_worker(int number) const
{
    const pid_t pid = worker();
    if (pid == 0)
        return false;
    const ring::Fd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
    // Another process may have had the pid when the descriptor was opened, but then the worker is another by now.
    return pidfd && worker() == pid && ::syscall(SYS_pidfd_send_signal, pidfd.get(), number, nullptr, 0) == 0;
}

void Service::plan(Point point, std::uint64_t times) const
{
    plan_->left = times;
    plan_->at = static_cast<std::uint64_t>(point) + 1;
}

void Service::expect_up()
{
    const auto up = [this] {
        look();
        dirtyring_vm *guest = nullptr;
        const bool made = dirtyring_connect((directory_ + "/socket").c_str(), &guest) == 0;
        dirtyring_close(guest);
        return made;
    };
    if (!comes_true(up, options_.patience_ns()))
        throw Hang(fmt::format("a hang: the service does not begin: {}", dirtyring_error()));
}

void Service::look()
{
    std::ifstream log(directory_ + "/log");
    log.seekg(looked_at_);
    for (std::string line; std::getline(log, line) && !log.eof();) { // what has no end yet is being written
        looked_at_ = log.tellg();
        said_.push_back(line);
        if (said_.size() > said_max)
            said_.pop_front();
        if (line.find("died of") != std::string::npos && line.find("died of SIGKILL") == std::string::npos)
            throw migrate::Failure(line);
    }
    int status = 0;
    if (::waitpid(supervisor_, &status, WNOHANG) != supervisor_)
        return;
    supervisor_ = 0;
    throw migrate::Failure(
        fmt::format("the supervisor ended with status {:#x}; the last it said:\n{}", status, fmt::join(said_, "\n")));
}

void Service::end()
{
    ::kill(supervisor_, SIGTERM);
    int status = 0;
    if (!comes_true([&] { return ::waitpid(supervisor_, &status, WNOHANG) == supervisor_; }, options_.patience_ns()))
        throw Hang("a hang: the service was asked to end");
    supervisor_ = 0;
    if (status != 0)
        throw migrate::Failure(fmt::format("the service ended with status {:#x} when it was asked to", status));
    if (std::filesystem::exists(directory_ + "/socket"))
        throw migrate::Failure("the service left its socket");
}

} // namespace dirtyring::chaos
