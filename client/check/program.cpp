#include "client/check/program.hpp"

#include "client/migrate/failure.hpp"

#include <chrono>
#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <thread>

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

Program::Program(const std::string &command) : socket_(fmt::format("{}/socket", directory_.path()))
{
    subject_.start(command, {{"{socket}", socket_}});
    for (const auto until = std::chrono::steady_clock::now() + patience; !listens(socket_);) {
        if (const auto how = end())
            throw migrate::Failure(fmt::format("{}: it {}", command, *how));
        if (std::chrono::steady_clock::now() > until)
            throw migrate::Failure(
                fmt::format("{}: it does not listen on {} within {} s", command, socket_, patience.count()));
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

void Program::stop()
{
    subject_.ask_to_end();
    const auto until = std::chrono::steady_clock::now() + patience;
    while (!subject_.ended() && std::chrono::steady_clock::now() < until)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    subject_.kill();
}

} // namespace dirtyring::check
