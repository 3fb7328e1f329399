#include "tests/chaos/statistics.hpp"

#include <algorithm>
#include <cstdio>
#include <span>
#include <string_view>

namespace dirtyring::chaos {
namespace {

template <class T> T median(std::span<const T> values)
{
    std::vector<T> sorted(values.begin(), values.end());
    const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2);
    std::nth_element(sorted.begin(), middle, sorted.end());
    return *middle;
}

void print_times(const char *what, const std::vector<std::uint64_t> &ns)
{
    if (!ns.empty())
        fmt::print("  {:<12}{:.1f} ms median, {:.1f} ms worst, of {}\n", what,
                   static_cast<double>(median(std::span<const std::uint64_t>(ns))) / 1e6,
                   static_cast<double>(*std::ranges::max_element(ns)) / 1e6, ns.size());
}

struct Growth {
    std::int64_t first;
    std::int64_t last;
};

// Medians of the first and the last quarter, kB.
Growth growth(const std::vector<std::int64_t> &kb)
{
    const std::size_t quarter = std::max<std::size_t>(1, kb.size() / 4);
    const std::span all(kb);
    return {median(all.first(quarter)), median(all.last(quarter))};
}

} // namespace

void expect_flat(const Statistics &s)
{
    for (const auto &[who, kb] : {std::pair("the supervisor", &s.supervisor_kb), std::pair("a worker", &s.worker_kb)}) {
        if (kb->empty())
            continue;
        const auto [first, last] = growth(*kb);
        constexpr std::int64_t slack_kb = 4096;
        if (last > first + first / 5 + slack_kb)
            throw migrate::Failure(fmt::format("the memory of {} grew from {} kB to {} kB", who, first, last));
    }
}

void print_summary(const Shared &shared, Statistics s, double seconds)
{
    std::uint64_t syncs = 0, asleep = 0, changes = 0, again = 0, written = 0, pins = 0, reported = 0, over = 0,
                  unknown = 0, overtaken = 0, cleaned = 0;
    for (const Guest &guest : shared.guests) {
        syncs += guest.state.syncs;
        asleep += guest.state.asleep_syncs;
        changes += guest.state.changes;
        again += guest.state.again;
        overtaken += guest.state.overtaken;
        cleaned += guest.state.died_cleaned;
        reported += guest.state.reported;
        over += guest.state.over_reported;
        unknown += guest.state.unknown;
        for (std::size_t i = 0; i < guest.device.size(); ++i) {
            written += guest.device[i].writes;
            pins += guest.device[i].pins;
        }
    }
    fmt::print("disturbed for {:.1f} s, seed {}\n", seconds, shared.options.seed);
    fmt::print("  kills       {} of the service, {} of devices, {} of VMMs, {} of visitors\n", s.service_kills,
               s.device_kills, s.vmm_kills, s.visitor_kills);
    fmt::print("  others      {} stops, {} stalls named, {} VMMs replaced by themselves, {} waits of 10 s given up\n",
               s.stops, s.stalls, s.vmm_leaves, shared.gave_up().load());
    fmt::print("  guests      {}, with {} devices each; {} visitors came and went, {} hwpts destroyed\n",
               shared.guests.size(), shared.options.devices, shared.visits().load(), shared.destroyed().load());
    fmt::print("  syncs       {}, {} of them waited for by calls alone\n", syncs, asleep);
    fmt::print("  changes     {} of maps and tracking, {} unmaps that met a full ring\n", changes, again);
    fmt::print("  enables     {} unmaps were under way, {} devices died meanwhile\n", overtaken, cleaned);
    fmt::print("  written     {} pages, {} pins\n", written, pins);
    fmt::print("  reported    {} pages, {} of them equal to their copy; {} runs of what is not mapped\n", reported,
               over, unknown);
    print_times("restarts", s.restarts_ns);
    print_times("recoveries", s.recoveries_ns);
    if (!s.worker_kb.empty()) {
        const Growth supervisor = growth(s.supervisor_kb);
        const Growth worker = growth(s.worker_kb);
        fmt::print("  memory      supervisor {} kB, at last {} kB; worker {} kB, at last {} kB\n", supervisor.first,
                   supervisor.last, worker.first, worker.last);
    }
    std::string reached;
    for (const auto &[point, kills] : s.points)
        reached += fmt::format("{}{} {}", reached.empty() ? "" : ", ", name_of(point), kills);
    fmt::print("  points      {}\n", reached.empty() ? "none" : reached);
}

} // namespace dirtyring::chaos
