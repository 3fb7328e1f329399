#include "client/migrate/signals.hpp"

#include "client/migrate/failure.hpp"

#include <cstdlib>
#include <string_view>
#include <sys/signalfd.h>
#include <unistd.h>

namespace dirtyring::migrate {
namespace {

constexpr int interruptions[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT};

void interrupted(int /*signal*/)
{
    constexpr std::string_view sentence = "dirtyring: interrupted\n";
    [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, sentence.data(), sentence.size());
    ::_exit(EXIT_FAILURE);
}

void handle_with(void (*handler)(int))
{
    struct sigaction action {
    };
    action.sa_handler = handler;
    for (const int signal : interruptions)
        ::sigaction(signal, &action, nullptr);
}

} // namespace

void exit_when_interrupted()
{
    handle_with(interrupted);
}

Signals::Signals()
{
    sigset_t set;
    sigemptyset(&set);
    for (const int signal : interruptions)
        sigaddset(&set, signal);
    ::sigprocmask(SIG_BLOCK, &set, &before_);
    fd_ = ring::Fd(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
    if (!fd_)
        throw system_failure("signalfd");
}

Signals::~Signals()
{
    ::sigprocmask(SIG_SETMASK, &before_, nullptr);
}

void Signals::undo() const
{
    handle_with(SIG_DFL);
    ::sigprocmask(SIG_SETMASK, &before_, nullptr);
}

} // namespace dirtyring::migrate
