#include "client/check/subject.hpp"

#include "client/migrate/failure.hpp"

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

namespace dirtyring::check {

namespace {

std::vector<std::string> words_of(const std::string &command, const Placeholders &placeholders)
{
    std::vector<std::string> words;
    for (std::size_t at = 0; (at = command.find_first_not_of(' ', at)) != std::string::npos;) {
        const std::size_t end = std::min(command.find(' ', at), command.size());
        std::string &word = words.emplace_back(command.substr(at, end - at));
        for (const auto &[placeholder, value] : placeholders) {
            for (std::size_t hole = 0; (hole = word.find(placeholder, hole)) != std::string::npos; hole += value.size())
                word.replace(hole, placeholder.size(), value);
        }
        at = end;
    }
    return words;
}

} // namespace

std::string beside_us(const std::string &program)
{
    std::error_code error;
    const auto beside = std::filesystem::read_symlink("/proc/self/exe", error).parent_path() / program;
    return ::access(beside.c_str(), X_OK) == 0 ? beside.string() : program;
}

void Subject::start(const std::string &command, const Placeholders &placeholders)
{
    std::vector<std::string> words = words_of(command, placeholders);
    if (words.empty())
        throw migrate::BadInput("--program: expected a command, found nothing");
    std::vector<char *> argv;
    for (std::string &word : words)
        argv.push_back(word.data());
    argv.push_back(nullptr);
    said_ = ring::Fd(::memfd_create("said", MFD_CLOEXEC));
    const pid_t parent = ::getpid();
    std::fflush(nullptr);
    pid_ = ::fork();
    if (pid_ < 0)
        throw migrate::system_failure(fmt::format("cannot start {}", words[0]));
    if (pid_ == 0) {
        ::prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (::getppid() != parent)
            ::_exit(EXIT_FAILURE);
        ::setpgid(0, 0);
        ::dup2(said_.get(), STDOUT_FILENO);
        ::dup2(said_.get(), STDERR_FILENO);
        ::execvp(argv[0], argv.data());
        ::dprintf(STDERR_FILENO, "%s: %s\n", argv[0], std::strerror(errno));
        ::_exit(127);
    }
    ::setpgid(pid_, pid_); // whoever of the two comes first
}

bool Subject::look(int options)
{
    int status = 0;
    if (status_ || pid_ < 0)
        return false;
    if (::waitpid(pid_, &status, options) != pid_)
        return true;
    if (WIFSTOPPED(status))
        still_ = true;
    else if (!WIFCONTINUED(status))
        status_ = status;
    return !status_;
}

bool Subject::ended()
{
    return !look(WNOHANG);
}

bool Subject::hold_still()
{
    if (ended())
        return false;
    ::kill(-pid_, SIGSTOP);
    while (!still_ && look(WUNTRACED)) {
    }
    return !status_;
}

void Subject::go_on()
{
    still_ = false;
    if (pid_ > 0 && !status_)
        ::kill(-pid_, SIGCONT);
}

bool Subject::crashed()
{
    if (!ended() || !status_ || !WIFSIGNALED(*status_))
        return false;
    const int signal = WTERMSIG(*status_);
    return signal == SIGSEGV || signal == SIGBUS || signal == SIGILL || signal == SIGFPE;
}

bool Subject::succeeded()
{
    return ended() && status_ && WIFEXITED(*status_) && WEXITSTATUS(*status_) == 0;
}

std::string Subject::last_line() const
{
    std::string text(1024, '\0');
    const off_t size = ::lseek(said_.get(), 0, SEEK_END);
    const ssize_t n =
        ::pread(said_.get(), text.data(), text.size(), std::max<off_t>(0, size - static_cast<off_t>(text.size())));
    text.resize(n > 0 ? static_cast<std::size_t>(n) : 0);
    while (text.ends_with('\n'))
        text.pop_back();
    return text.substr(text.rfind('\n') + 1);
}

std::optional<std::string> Subject::end()
{
    if (!ended() || !status_)
        return std::nullopt;
    const std::string how = WIFEXITED(*status_) ? fmt::format("ended with exit code {}", WEXITSTATUS(*status_))
                                                : fmt::format("was ended by signal {}", WTERMSIG(*status_));
    const std::string said = last_line();
    return said.empty() ? how : fmt::format("{}: {}", how, said);
}

std::string Subject::state()
{
    return "it " + end().value_or("goes on");
}

void Subject::ask_to_end()
{
    if (!ended())
        ::kill(pid_, SIGTERM);
}

void Subject::kill()
{
    if (pid_ < 0)
        return;
    ::kill(-pid_, SIGKILL); // what it started too
    int status = 0;
    if (!status_ && ::waitpid(pid_, &status, 0) == pid_)
        status_ = status;
    pid_ = -1;
}

} // namespace dirtyring::check
