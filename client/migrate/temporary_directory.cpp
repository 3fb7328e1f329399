#include "client/migrate/temporary_directory.hpp"

#include "client/migrate/failure.hpp"

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <filesystem>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

namespace dirtyring::migrate {
namespace {

void remove(const std::string &path)
{
    std::error_code ignored; // the other of the two may have been faster
    std::filesystem::remove_all(path, ignored);
}

[[noreturn]] void keep_house(int pipe, const std::string &path)
{
    sigset_t all;
    sigfillset(&all);
    ::sigprocmask(SIG_SETMASK, &all, nullptr); // what interrupts the others is no reason to stop here
    ::setpgid(0, 0);
    ::prctl(PR_SET_NAME, "janitor");
    char byte = 0;
    while (::read(pipe, &byte, 1) < 0 && errno == EINTR) {
    }
    remove(path);
    ::_exit(EXIT_SUCCESS);
}

} // namespace

TemporaryDirectory::TemporaryDirectory() : path_((std::filesystem::temp_directory_path() / "dirtyring-XXXXXX").string())
{
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0)
        throw system_failure("pipe");
    ring::Fd read_end(ends[0]);
    lifeline_ = ring::Fd(ends[1]);
    if (::mkdtemp(path_.data()) == nullptr)
        throw system_failure("cannot make the directory " + path_);
    std::fflush(nullptr);
    janitor_ = ::fork();
    if (janitor_ < 0) {
        remove(path_);
        throw system_failure("cannot start the janitor of " + path_);
    }
    if (janitor_ == 0) {
        ::close(lifeline_.get());
        keep_house(read_end.get(), path_);
    }
}

TemporaryDirectory::~TemporaryDirectory()
{
    remove(path_);
    lifeline_ = ring::Fd();
    ::waitpid(janitor_, nullptr, 0);
}

} // namespace dirtyring::migrate
