// supervised_worker SOCKET: a worker that does what a test tells it over the socket, one packet at a time, and answers
// each.
#include "service/keeper/fd_store.hpp"

#include <csignal>
#include <cstdlib>
#include <iterator>
#include <sstream>
#include <string>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

namespace {

using dirtyring::ring::Fd;
using dirtyring::service::FdStore;

Fd file_with(const std::string &content)
{
    Fd fd(::memfd_create("content", MFD_CLOEXEC));
    (void)::pwrite(fd.get(), content.data(), content.size(), 0);
    return fd;
}

std::string content_of(const Fd &fd)
{
    char text[64];
    const ssize_t n = fd ? ::pread(fd.get(), text, sizeof text, 0) : -1;
    return n < 0 ? "?" : std::string(text, static_cast<std::size_t>(n));
}

// Of a stranger: from a process of its own.
int notify(const std::string &message, bool stranger = false)
{
    const pid_t child = stranger ? ::fork() : 0;
    if (child > 0)
        return ::waitpid(child, nullptr, 0) == child ? 0 : -1;
    const Fd fd = file_with("raw");
    const int raw = fd.get();
    const int result = ::sd_pid_notify_with_fds(0, 0, message.c_str(), &raw, 1);
    if (stranger)
        ::_exit(0);
    return result < 0 ? result : 0;
}

std::string obey(FdStore &store, const std::string &order, const Fd &connection)
{
    std::istringstream words(order);
    std::string verb;
    std::string name;
    words >> verb;
    const std::string rest = order.size() > verb.size() ? order.substr(verb.size() + 1) : "";
    if (verb == "names") { // with what is in the files, which are taken
        std::string all;
        for (const std::string &n : store.names())
            all += n + '=' + content_of(store.take(n)) + ' ';
        return all;
    }
    if (verb == "intact") { // how many have in them what was put
        int intact = 0;
        for (const std::string &n : store.names())
            intact += content_of(store.take(n)) == "of." + n ? 1 : 0;
        return std::to_string(intact);
    }
    if (verb == "take") {
        words >> name;
        return content_of(store.take(name));
    }
    if (verb == "drop_rest") {
        store.drop_rest();
        return "0";
    }
    if (verb == "put") {
        int result = 0;
        while (words >> name)
            result |= store.put(name, file_with("of." + name).get());
        return std::to_string(result);
    }
    if (verb == "put_connection")
        return std::to_string(store.put("connection", connection.get()));
    if (verb == "remove") {
        while (words >> name)
            store.remove(name);
        return "0";
    }
    if (verb == "notify")
        return std::to_string(notify(rest));
    if (verb == "stranger")
        return std::to_string(notify(rest, true));
    if (verb == "environment") {
        const char *value = std::getenv(rest.c_str());
        return value == nullptr ? "" : value;
    }
    if (verb == "asked_to_end") {
        sigset_t pending;
        ::sigpending(&pending);
        return std::to_string(::sigismember(&pending, SIGTERM));
    }
    if (verb == "exit")
        ::_exit(std::atoi(rest.c_str()));
    if (verb == "raise")
        ::raise(std::atoi(rest.c_str()));
    if (verb == "exit_when_asked") {
        sigset_t ends;
        sigemptyset(&ends);
        sigaddset(&ends, SIGTERM);
        int number = 0;
        ::sigwait(&ends, &number);
        ::_exit(std::atoi(rest.c_str()));
    }
    return "?";
}

} // namespace

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    FdStore store = FdStore::inherit();
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::string(argv[1]).copy(address.sun_path, sizeof address.sun_path - 1);
    const Fd connection(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    if (::connect(connection.get(), reinterpret_cast<const sockaddr *>(&address), sizeof address) != 0)
        return 3;
    char order[16384];
    for (ssize_t n = 0; (n = ::recv(connection.get(), order, sizeof order, 0)) > 0;) {
        const std::string answer = obey(store, {order, static_cast<std::size_t>(n)}, connection) + '\n';
        ::send(connection.get(), answer.data(), answer.size(), MSG_NOSIGNAL);
    }
    return 4;
}
