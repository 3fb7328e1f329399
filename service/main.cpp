#include "service/control.hpp"
#include "service/lcores.hpp"
#include "service/listener.hpp"
#include "service/options.hpp"

#include <fmt/format.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <systemd/sd-daemon.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <sys/resource.h>

namespace {

using namespace dirtyring::service;

void set_up_logging(const std::string &level)
{
    spdlog::set_default_logger(spdlog::stderr_color_mt("dirtyringd"));
    spdlog::set_pattern("%Y-%m-%d %H:%M:%S.%e dirtyringd %^%l%$: %v");
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

// Each guest costs some ten descriptors and each device more.
void raise_descriptor_limit()
{
    rlimit limit{};
    if (::getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        ::setrlimit(RLIMIT_NOFILE, &limit);
    }
}

// Returns only when it cannot start.
int run(const Options &options)
{
    set_up_signals();
    raise_descriptor_limit();
    auto listener = options.fd >= 0 ? Listener::inherit(options.fd) : Listener::open(options.socket_path);
    if (!listener) {
        fmt::print(stderr, "dirtyringd: {}\n", listener.error());
        return 1;
    }
    auto lcores = Lcores::start(options.walkers);
    if (!lcores) {
        fmt::print(stderr, "dirtyringd: {}\n", lcores.error());
        return 1;
    }
    Control control((*lcores)->walkers(), listener->take());
    spdlog::info("ready, {} walker{}", options.walkers, options.walkers == 1 ? "" : "s");
    ::sd_notify(0, "READY=1");
    control.run();
    ::sd_notify(0, "STOPPING=1");
    (*lcores)->stop();
    listener->remove();
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
    try {
        return run(options);
    } catch (const std::exception &e) {
        fmt::print(stderr, "dirtyringd: {}\n", e.what());
        return 1;
    }
}
