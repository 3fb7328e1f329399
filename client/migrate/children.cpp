#include "client/migrate/children.hpp"

#include "client/migrate/clock.hpp"
#include "client/migrate/failure.hpp"
#include "client/migrate/shared.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>

namespace dirtyring::migrate {
namespace {

constexpr std::uint64_t program_patience_ns = 3'000'000'000; // between SIGTERM and SIGKILL

// Runs `body` in a fresh child and never returns.
[[noreturn]] void run_part(Control &control, const std::string &name, const std::function<void()> &body)
{
    try {
        body();
    } catch (const std::exception &e) {
        end_failed(control, fmt::format("{}: {}", name, e.what()));
    }
    ::_exit(EXIT_SUCCESS); // not exit: what the parent buffered or registered is the parent's
}

std::string last_line(std::string text)
{
    while (text.ends_with('\n'))
        text.pop_back();
    const std::size_t newline = text.rfind('\n');
    return newline == std::string::npos ? text : text.substr(newline + 1);
}

} // namespace

void Children::Child::listen()
{
    constexpr std::size_t kept = 4096;
    char buffer[1024];
    ssize_t got = 0;
    while ((got = ::read(errors.get(), buffer, sizeof buffer)) > 0) {
        last_words.append(buffer, static_cast<std::size_t>(got));
        if (last_words.size() > kept)
            last_words.erase(0, last_words.size() - kept);
    }
    if (got == 0)
        errors = ring::Fd(); // closed: polling it again would not wait
}

void Children::Child::look()
{
    int how = 0;
    if (!status && ::waitpid(pid, &how, WNOHANG) == pid)
        status = how;
}

// A program is to run until it is told to end.
bool Children::Child::failed() const
{
    return status && (program || *status != 0);
}

bool Children::fork(const std::string &name, bool program, ring::Fd errors)
{
    const pid_t parent = ::getpid();
    std::fflush(nullptr); // else both would write what is buffered
    const pid_t pid = ::fork();
    if (pid < 0)
        throw system_failure(fmt::format("cannot start the {}", name));
    if (pid == 0) {
        // A parent that died before the prctl sends no signal, hence the look behind it. A group of its own: Ctrl-C
        // goes to the parent, which ends the others.
        ::prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (::getppid() != parent)
            ::_exit(EXIT_FAILURE);
        ::prctl(PR_SET_NAME, name.c_str());
        ::setpgid(0, 0);
        signals_.undo();
        return true;
    }
    Child child{name, pid, ring::Fd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0))), program, std::move(errors),
                {},   {}};
    if (!child.pidfd) {
        const int error = errno;
        ::kill(pid, SIGKILL);
        ::waitpid(pid, nullptr, 0);
        errno = error;
        throw system_failure("pidfd_open");
    }
    children_.push_back(std::move(child));
    return false;
}

void Children::start(const std::string &name, const std::function<void()> &body)
{
    if (fork(name, false, ring::Fd()))
        run_part(control_, name, body);
}

pid_t Children::start_program(const std::string &path, std::vector<std::string> arguments)
{
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0)
        throw system_failure("pipe");
    ring::Fd read_end(ends[0]);
    const ring::Fd write_end(ends[1]);
    const std::string name = path.substr(path.rfind('/') + 1);
    if (!fork(name, true, std::move(read_end)))
        return children_.back().pid;

    ::dup2(write_end.get(), STDERR_FILENO);
    std::vector<char *> argv{const_cast<char *>(path.c_str())};
    for (std::string &argument : arguments)
        argv.push_back(argument.data());
    argv.push_back(nullptr);
    ::execv(path.c_str(), argv.data());
    end_failed(control_, fmt::format("{}: {}", path, std::strerror(errno)));
}

void Children::watch(int timeout_ms)
{
    std::vector<pollfd> fds{{signals_.fd(), POLLIN, 0}};
    for (const Child &child : children_) {
        fds.push_back({child.pidfd.get(), POLLIN, 0});
        fds.push_back({child.errors.get(), POLLIN, 0}); // -1 is passed over
    }
    if (::poll(fds.data(), fds.size(), timeout_ms) < 0 && errno != EINTR)
        throw system_failure("poll");
    if (fds[0].revents != 0)
        throw Failure("interrupted");
    for (std::size_t i = 0; i < children_.size(); ++i) {
        if (fds[2 + 2 * i].revents != 0)
            children_[i].listen();
        if (fds[1 + 2 * i].revents != 0)
            children_[i].look();
    }
    if (std::any_of(children_.begin(), children_.end(), [](const Child &child) { return child.failed(); }))
        throw Failure(epitaph());
    std::erase_if(children_, [](const Child &child) { return child.status.has_value(); });
}

// What went wrong: a part that was killed has pulled others down who can only say that it is gone; then what a part had
// to say; then whatever is known.
std::string Children::epitaph()
{
    for (Child &child : children_)
        child.look();
    const auto failed = [](const Child &child) { return child.failed(); };
    const auto killed = [](const Child &child) { return child.status && WIFSIGNALED(*child.status); };
    auto child = std::find_if(children_.begin(), children_.end(), killed);
    if (child != children_.end())
        return fmt::format("{} was ended by signal {} ({}) before the migration was done", child->name,
                           WTERMSIG(*child->status), ::strsignal(WTERMSIG(*child->status)));
    if (control_.failure.load(std::memory_order_acquire) == 2) // pairs with end_failed
        return control_.sentence;
    child = std::find_if(children_.begin(), children_.end(), failed);
    child->listen();
    const std::string words = last_line(child->last_words);
    return fmt::format("{} ended with exit code {} before the migration was done{}{}", child->name,
                       WEXITSTATUS(*child->status), words.empty() ? "" : "; its last words: ", words);
}

bool Children::parts_running() const
{
    return std::any_of(children_.begin(), children_.end(), [](const Child &child) { return !child.program; });
}

void Children::end()
{
    std::erase_if(children_, [](const Child &child) { return child.status.has_value(); });
    // The parts hold nothing that needs an orderly end; a program may.
    for (const Child &child : children_)
        ::kill(child.pid, child.program ? SIGTERM : SIGKILL);
    const std::uint64_t deadline = now_ns() + program_patience_ns;
    for (Child &child : children_) {
        for (bool ended = false; !ended && now_ns() < deadline;) {
            std::array<pollfd, 2> fds{{{child.pidfd.get(), POLLIN, 0}, {child.errors.get(), POLLIN, 0}}};
            const timespec patience = until(deadline);
            ::ppoll(fds.data(), fds.size(), &patience, nullptr);
            if (fds[1].revents != 0)
                child.listen(); // a full pipe must not keep it from ending
            ended = fds[0].revents != 0;
        }
        ::kill(child.pid, SIGKILL);
        ::waitpid(child.pid, nullptr, 0);
    }
    children_.clear();
}

} // namespace dirtyring::migrate
