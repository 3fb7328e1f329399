#include "client/migrate/migrate.hpp"

#include "client/migrate/children.hpp"
#include "client/migrate/clock.hpp"
#include "client/migrate/device.hpp"
#include "client/migrate/failure.hpp"
#include "client/migrate/killer.hpp"
#include "client/migrate/link.hpp"
#include "client/migrate/progress.hpp"
#include "client/migrate/results.hpp"
#include "client/migrate/shared.hpp"
#include "client/migrate/signals.hpp"
#include "client/migrate/source.hpp"
#include "client/migrate/temporary_directory.hpp"
#include "client/migrate/units.hpp"

#include <filesystem>
#include <optional>
#include <string>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/un.h>
#include <utility>
#include <vector>

namespace dirtyring::migrate {
namespace {

constexpr int glance_ms = 5; // while the service starts
constexpr int progress_ms = 100;
constexpr std::uint64_t service_patience_ns = 10'000'000'000;

Plan plan_for(const Options &options)
{
    if (options.synthetic())
        return {};
    const auto events = load_trace(options.trace);
    if (!events)
        throw BadInput(events.error());
    return make_plan(options.trace, *events, options.memory);
}

bool accepts(const std::string &socket_path)
{
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    socket_path.copy(address.sun_path, sizeof address.sun_path - 1);
    const ring::Fd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    return ::connect(socket.get(), reinterpret_cast<const sockaddr *>(&address), sizeof address) == 0;
}

// Returns the pid, which with --kill-service is the supervisor's.
pid_t start_service(Children &children, const Options &options, const std::string &socket_path)
{
    const auto program = std::filesystem::read_symlink("/proc/self/exe").parent_path() / "dirtyringd";
    if (!std::filesystem::exists(program))
        throw Failure(fmt::format("{}: not found; expected the service there, or --socket-path of one that runs",
                                  program.string()));
    std::vector<std::string> arguments{"--socket-path", socket_path};
    if (options.kill_service_ms != 0)
        arguments.emplace_back("--supervise");
    const pid_t pid = children.start_program(program, std::move(arguments));
    const std::uint64_t deadline = now_ns() + service_patience_ns;
    while (!accepts(socket_path)) {
        children.watch(glance_ms);
        if (now_ns() > deadline)
            throw Failure(fmt::format("dirtyringd did not open {} within 10 s", socket_path));
    }
    return pid;
}

void start_parts(Children &children, Shared &shared)
{
    LinkEnds ends = make_link();
    children.start("destination VMM", [&] {
        ends.source = ring::Fd();
        if (!receive(ends.destination, {shared.destination.map.data(), shared.destination.map.size()}))
            throw Failure("the source VMM went away");
    });
    children.start("source VMM", [&] {
        ends.destination = ring::Fd();
        run_source(shared, ends.source);
    });
    ends.source = ring::Fd();
    ends.destination = ring::Fd();
    for (unsigned i = 0; i < shared.options.devices; ++i)
        children.start(fmt::format("device {}", i), [&shared, i] { run_device(shared, i); });
}

// Runs all parts to their end.
void run(Shared &shared)
{
    // In the order in which they come: signals wait until all is cleaned up, the directory outlives the service.
    const Signals signals;
    std::optional<TemporaryDirectory> directory;
    Children children(shared.control, signals);
    shared.socket_path = shared.options.socket_path;
    if (shared.socket_path.empty()) {
        directory.emplace();
        shared.socket_path = fmt::format("{}/service.sock", directory->path());
        const pid_t service = start_service(children, shared.options, shared.socket_path);
        if (shared.options.kill_service_ms != 0)
            children.start("killer", [&shared, service] { kill_workers(shared, service); });
    }
    start_parts(children, shared);
    Progress progress(shared.control, shared.options);
    while (children.parts_running()) {
        children.watch(progress_ms);
        progress.tick();
    }
}

} // namespace

void migrate(const Options &options)
{
    exit_when_interrupted();
    check(options);
    Plan plan = plan_for(options);
    Outputs outputs(options);
    Shared shared(options, std::move(plan));
    run(shared);

    const Judgement judgement = judge(shared);
    print_summary(shared, judgement);
    outputs.write(shared, judgement);
    if (!judgement.passed())
        throw Failure(
            fmt::format("{} pages differ between source and destination, and {} pages were not reported after "
                        "their last write; expected none of either",
                        count(judgement.differing_pages), count(judgement.journal.unreported)));
}

} // namespace dirtyring::migrate
