#include "tests/chaos/child.hpp"

#include "tests/chaos/children.hpp"

#include <csignal>
#include <cstdio>
#include <cstring>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>

namespace dirtyring::chaos {

pid_t fork_part(const std::string &name, const migrate::Signals &signals)
{
    const pid_t parent = ::getpid();
    std::fflush(nullptr); // else both would write what is buffered
    const pid_t pid = ::fork();
    if (pid < 0)
        throw migrate::system_failure("cannot start " + name);
    if (pid == 0) {
        // A parent that died before the prctl sends no signal, hence the look behind it.
        ::prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (::getppid() != parent)
            ::_exit(EXIT_FAILURE);
        ::prctl(PR_SET_NAME, name.c_str());
        ::setpgid(0, 0); // Ctrl-C goes to the parent, which ends the others
        signals.undo();
    }
    return pid;
}

void Child::start()
{
    const std::uint64_t seed = shared_.options.seed + std::hash<std::string>{}(name_) + 1000 * ++lives_;
    pid_ = fork_part(name_, signals_);
    if (pid_ != 0)
        return;
    try {
        body_(seed);
    } catch (const GaveUp &e) {
        shared_.note("{} gives up: {}", name_, e.what());
        shared_.gave_up().fetch_add(1);
    } catch (const std::exception &e) {
        shared_.note("{} fails: {}", name_, e.what());
        shared_.condemn(e);
        ::_exit(EXIT_FAILURE);
    }
    ::_exit(EXIT_SUCCESS); // not exit: what the parent buffered or registered is the parent's
}

void Child::kill()
{
    signal(SIGKILL);
    if (pid_ != 0)
        ::waitpid(std::exchange(pid_, 0), nullptr, 0);
}

bool Child::ended(bool may_die)
{
    int status = 0;
    if (pid_ == 0 || ::waitpid(pid_, &status, WNOHANG) != pid_)
        return pid_ == 0;
    pid_ = 0;
    if (WIFSIGNALED(status) && !(may_die && WTERMSIG(status) == SIGKILL))
        throw migrate::Failure(fmt::format("{} was ended by SIG{}", name_, ::sigabbrev_np(WTERMSIG(status))));
    if (WIFEXITED(status) && WEXITSTATUS(status) != 0)
        throw migrate::Failure(fmt::format("{} ended with exit code {}", name_, WEXITSTATUS(status)));
    return true;
}

bool Child::stopped() const
{
    siginfo_t info{};
    return pid_ != 0 && ::waitid(P_PID, static_cast<id_t>(pid_), &info, WSTOPPED | WNOHANG | WNOWAIT) == 0 &&
           info.si_pid == pid_;
}

} // namespace dirtyring::chaos
