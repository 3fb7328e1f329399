// Kills and stops a service, its devices and its VMMs under load, at random moments and at every point of the protocol,
// and looks for a page that was written and not reported. tests/README.md tells how.
#include "client/migrate/failure.hpp"
#include "tests/chaos/disturber.hpp"
#include "tests/chaos/run.hpp"
#include "tests/chaos/statistics.hpp"

#include <cerrno>
#include <cstdio>
#include <sys/wait.h>

namespace {

using namespace dirtyring::chaos;

// Throws what was found.
void run(const Options &options)
{
    Run run(options);
    Statistics statistics;
    const std::uint64_t began = now_ns();
    try {
        run.start();
        Disturber(run, statistics).disturb();
        const double seconds = static_cast<double>(now_ns() - began) / 1e9;
        run.finish();
        expect_flat(statistics);
        print_summary(run.shared(), std::move(statistics), seconds);
    } catch (const std::exception &) {
        constexpr std::size_t events = 60;
        run.shared().print_events(events);
        print_summary(run.shared(), std::move(statistics), static_cast<double>(now_ns() - began) / 1e9);
        throw;
    }
}

void expect_no_children()
{
    if (::waitpid(-1, nullptr, WNOHANG) != -1 || errno != ECHILD)
        throw dirtyring::migrate::Failure("left behind: a child");
}

int outcome(const Options &options)
{
    const auto found = [&](Finding what, const std::exception &e) {
        fmt::print(stderr, "chaos: {} (seed {})\n", e.what(), options.seed);
        return what != Finding::nothing && what == options.wanted ? 0 : 1;
    };
    try {
        run(options);
        expect_no_children();
    } catch (const Lost &e) {
        return found(Finding::loss, e);
    } catch (const Hang &e) {
        return found(Finding::hang, e);
    } catch (const std::exception &e) {
        return found(Finding::nothing, e);
    }
    fmt::print("0 lost\n");
    if (options.wanted == Finding::nothing)
        return 0;
    fmt::print(stderr, "chaos: a rule was broken, and nothing was found (seed {})\n", options.seed);
    return 1;
}

} // namespace

int main(int argc, char **argv)
{
    const auto parsed = parse_options(argc, argv);
    if (const int *code = std::get_if<int>(&parsed))
        return *code;
    const Options &options = std::get<Options>(parsed);
    fmt::print("chaos: seed {}\n", options.seed);
    return outcome(options);
}
