#include "client/check/program.hpp"

#include "client/migrate/failure.hpp"

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

namespace dirtyring::check {
namespace {

constexpr std::chrono::seconds patience{10}; // until it listens; between SIGTERM and SIGKILL

bool listens(const std::string &path)
{
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof address.sun_path - 1);
    const ring::Fd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    return ::connect(probe.get(), reinterpret_cast<const sockaddr *>(&address), sizeof address) == 0;
}

} // namespace

std::vector<std::string> words_of(const std::string &command, const std::string &socket)
{
    constexpr std::string_view placeholder = "{socket}";
    std::vector<std::string> words;
    for (std::size_t at = 0; (at = command.find_first_not_of(' ', at)) != std::string::npos;) {
        const std::size_t end = std::min(command.find(' ', at), command.size());
        std::string word = command.substr(at, end - at);
        if (const std::size_t hole = word.find(placeholder); hole != std::string::npos)
            word.replace(hole, placeholder.size(), socket);
        words.push_back(std::move(word));
        at = end;
    }
    return words;
}

std::string beside_us(const std::string &program)
{
    std::error_code error;
    const auto beside = std::filesystem::read_symlink("/proc/self/exe", error).parent_path() / program;
    return ::access(beside.c_str(), X_OK) == 0 ? beside.string() : program;
}

Program::Program(const std::string &command)
    : socket_(fmt::format("{}/socket", directory_.path())), said_(::memfd_create("said", MFD_CLOEXEC))
{
    std::vector<std::string> words = words_of(command, socket_);
    if (words.empty())
        throw migrate::BadInput("--program: expected a command, found nothing");
    std::vector<char *> argv;
    for (std::string &word : words)
        argv.push_back(word.data());
    argv.push_back(nullptr);
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
    for (const auto until = std::chrono::steady_clock::now() + patience; !listens(socket_);) {
        if (const auto how = end())
            throw migrate::Failure(fmt::format("{} {}", words[0], *how));
        if (std::chrono::steady_clock::now() > until)
            throw migrate::Failure(
                fmt::format("{} does not listen on {} within {} s", words[0], socket_, patience.count()));
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

bool Program::ended()
{
    int status = 0;
    if (!status_ && ::waitpid(pid_, &status, WNOHANG) == pid_)
        status_ = status;
    return status_.has_value();
}

std::string Program::last_line() const
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

std::optional<std::string> Program::end()
{
    if (!ended())
        return std::nullopt;
    const std::string how = WIFEXITED(*status_) ? fmt::format("ended with exit code {}", WEXITSTATUS(*status_))
                                                : fmt::format("was ended by signal {}", WTERMSIG(*status_));
    const std::string said = last_line();
    return said.empty() ? how : fmt::format("{}: {}", how, said);
}

void Program::stop()
{
    if (pid_ < 0)
        return;
    if (!ended())
        ::kill(pid_, SIGTERM);
    const auto until = std::chrono::steady_clock::now() + patience;
    while (!ended() && std::chrono::steady_clock::now() < until)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    ::kill(-pid_, SIGKILL); // what it started too
    if (!ended()) {
        int status = 0;
        ::waitpid(pid_, &status, 0);
        status_ = status;
    }
    pid_ = -1;
}

} // namespace dirtyring::check
