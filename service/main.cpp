#include "service/control/control.hpp"
#include "service/control/options.hpp"
#include "service/keeper/fd_store.hpp"
#include "service/keeper/listener.hpp"
#include "service/keeper/supervisor.hpp"
#include "service/walkers/lcores.hpp"

#include <fmt/format.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <systemd/sd-daemon.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fcntl.h>
#include <string>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>
#include <vector>

namespace {

using namespace dirtyring::service;

void set_up_logging(const std::string &level)
{
    spdlog::set_default_logger(spdlog::stderr_color_mt("dirtyringd"));
    spdlog::set_pattern("%Y-%m-%d %H:%M:%S.%f dirtyringd %^%l%$: %v");
    spdlog::set_level(spdlog::level::from_str(level));
}

// Before the EAL starts threads: the control thread alone takes them, from a signalfd.
void set_up_signals()
{
    sigset_t ends;
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    ::sigprocmask(SIG_BLOCK, &ends, nullptr);
    std::signal(SIGPIPE, SIG_IGN); // nobody may be reading the log
}

// Each guest costs some ten descriptors and each device more. A worker has its supervisor's limit.
void raise_descriptor_limit()
{
    rlimit limit{};
    if (::getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        ::setrlimit(RLIMIT_NOFILE, &limit);
    }
}

// Room in the table of descriptors, for some fifty guests, while there is one thread. Where there are several, the
// kernel waits for RCU each time that it makes the table larger, and the guests that are being taken up wait with it:
// milliseconds, or seconds where the kernel's own threads get no processor.
void make_room_for_descriptors()
{
    constexpr int highest = 1023;
    const dirtyring::ring::Fd fd(::fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, highest));
}

// A supervisor starts the file that it is itself, whatever has become of its path.
int supervise_self(int argc, char **argv, int fd)
{
    std::vector<std::string> words(argv, argv + argc);
    std::erase(words, "--supervise");
    return supervise("/proc/self/exe", std::move(words), dirtyring::ring::Fd(fd));
}

tl::expected<Listener, std::string> listen(FdStore &store, const Options &options)
{
    if (auto listener = Listener::handed_over(store, options.socket_path))
        return std::move(*listener);
    return options.fd >= 0 ? Listener::inherit(options.fd) : Listener::open(options.socket_path);
}

// Returns only when it cannot start.
int run(const Options &options)
{
    ::prctl(PR_SET_NAME, "dirtyringd"); // not "exe"
    spdlog::debug("a worker begins");
    set_up_signals();
    make_room_for_descriptors();
    FdStore store = FdStore::inherit();
    auto listener = listen(store, options);
    if (!listener) {
        fmt::print(stderr, "dirtyringd: {}\n", listener.error());
        return 1;
    }
    auto lcores = Lcores::start(options.walkers);
    if (!lcores) {
        fmt::print(stderr, "dirtyringd: {}\n", lcores.error());
        return 1;
    }
    spdlog::debug("the EAL is up");
    listener->keep(store);
    Control control((*lcores)->walkers(), listener->take(), store);
    if (auto ok = control.restore(); !ok) {
        fmt::print(stderr, "dirtyringd: {}\n", ok.error());
        return 1;
    }
    control.run([&options] {
        spdlog::info("ready, {} walker{}", options.walkers, options.walkers == 1 ? "" : "s");
        ::sd_notify(0, "READY=1");
    });
    ::sd_notify(0, "STOPPING=1");
    (*lcores)->stop();
    listener->remove(store);
    // Closing a descriptor that a peer has sent may wait for that peer; the end of the process does not.
    spdlog::shutdown();
    std::_Exit(0);
}

} // namespace

int main(int argc, char **argv)
{
    const auto parsed = parse_options(argc, argv);
    if (const int *code = std::get_if<int>(&parsed))
        return *code;
    const auto &options = std::get<Options>(parsed);
    set_up_logging(options.log_level);
    raise_descriptor_limit();
    try {
        return options.supervise ? supervise_self(argc, argv, options.fd) : run(options);
    } catch (const std::exception &e) {
        fmt::print(stderr, "dirtyringd: {}\n", e.what());
        return 1;
    }
}
