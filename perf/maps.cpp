// Map changes of a guest at a service, through the command ring: round trips of one page while the service polls, and
// from its sleep; many at once; and a recorded vIOMMU trace, as fast as it goes.
#include "perf/replay.hpp"
#include "perf/service.hpp"

#include <fmt/format.h>

#include <array>
#include <chrono>
#include <thread>

namespace {

using namespace dirtyring;
using namespace dirtyring::perf;

constexpr std::uint32_t rights = DIRTYRING_READ | DIRTYRING_WRITE;
constexpr std::uint64_t pages = 1 << 16;

struct RoundTrips {
    Samples map;
    Samples unmap;
};

// ns from the command to its completion, which is polled for.
template <class Queue> double round_trip(ServedGuest &guest, Queue queue)
{
    dr_completion completion{};
    const double ns = timed([&] {
        must(queue(guest.guest()));
        must(guest.guest().submit());
        while (guest.guest().reap(&completion, 1) == 0) {
        }
    });
    if (completion.result != 0)
        throw Failure("a map change has failed");
    return ns;
}

// A page is mapped, written, and unmapped; the unmap reports it.
RoundTrips round_trips(ServedGuest &guest, unsigned count, std::chrono::microseconds pause)
{
    RoundTrips times;
    std::uint64_t reported = 0;
    for (unsigned i = 0; i < count; ++i) {
        const std::uint64_t iova = i % pages * DR_PAGE;
        std::this_thread::sleep_for(pause);
        times.map.push_back(1e-3 * round_trip(guest, [&](Guest &g) {
                                return g.queue_map(guest.ioas(), iova, DR_PAGE, iova, rights, 0);
                            }));
        guest.write(iova);
        std::this_thread::sleep_for(pause);
        times.unmap.push_back(1e-3 * round_trip(guest, [&](Guest &g) {
                                  return g.queue_unmap(guest.ioas(), iova, DR_PAGE, DIRTYRING_HARVEST_NOW, 0);
                              }));
        guest.drain([&](std::uint64_t, std::uint64_t n) { reported += n; });
    }
    if (reported < count)
        throw Failure("unmaps have lost pages");
    return times;
}

void add_round_trips(Session &session, const char *when, const RoundTrips &times, Goal goal)
{
    for (const auto &[what, samples] : {std::pair{"map of a page", &times.map}, {"unmap with harvest", &times.unmap}}) {
        session.add(Figure{
            .name = fmt::format("{}, {}, p50", what, when), .unit = "us", .ours = {median(*samples)}, .goal = goal});
        session.add(
            Figure{.name = fmt::format("{}, {}, p99", what, when), .unit = "us", .ours = {quantile(*samples, 0.99)}});
    }
}

// Map changes/s, each page mapped and unmapped again, as many on their way as the command ring takes.
double pipelined(ServedGuest &guest, std::uint64_t count)
{
    std::uint64_t queued = 0;
    std::uint64_t done = 0;
    std::array<dr_completion, 256> completions;
    const double ns = timed([&] {
        while (done < 2 * count) {
            for (bool room = true; room && queued < 2 * count;) {
                const std::uint64_t iova = queued / 2 % pages * DR_PAGE;
                const auto result =
                    queued % 2 == 0 ? guest.guest().queue_map(guest.ioas(), iova, DR_PAGE, iova, rights, 0)
                                    : guest.guest().queue_unmap(guest.ioas(), iova, DR_PAGE, DIRTYRING_HARVEST_NOW, 0);
                room = result.has_value();
                queued += room;
            }
            must(guest.guest().submit());
            const std::uint32_t n = guest.guest().reap(completions.data(), completions.size());
            for (std::uint32_t i = 0; i < n; ++i) {
                if (completions[i].result != 0)
                    throw Failure("a map change has failed");
            }
            done += n;
            guest.drain([](auto...) {});
        }
    });
    return static_cast<double>(done) / ns * 1e9;
}

void measure_trace(Session &session, const Service &service)
{
    Replay replay(service, TRACES "/guest-md5sum-viommu.trace.gz");
    const auto samples = in_turns(session.pick(1u, 3u, 9u), {[&] {
                                      const double ns = timed([&] { replay.run(); });
                                      if (replay.lost() > 0)
                                          throw Failure("the replay has lost pages");
                                      return static_cast<double>(replay.recorded_us()) * 1e3 / ns;
                                  }});
    session.add(Figure{
        .name = "vIOMMU trace, times its recorded rate", .unit = "x", .ours = samples[0], .goal = Goal::at_least(50)});
    session.add(Figure{.name = "vIOMMU trace, most entries in the ring",
                       .unit = "entries",
                       .ours = {static_cast<double>(replay.backlog())}});
}

void measure_maps(Session &session)
{
    if (cores() < 2)
        return session.skip("map changes", "needs two cores");
    const Service service;
    {
        ServedGuest guest(service.socket(), {.memory_bytes = pages * DR_PAGE, .mapped = false});
        const unsigned count = session.pick(10u, 20'000u, 100'000u);
        add_round_trips(session, "service polling", round_trips(guest, count, {}), Goal::at_most(25));
        add_round_trips(session, "service asleep",
                        round_trips(guest, session.pick(2u, 500u, 2'000u), std::chrono::microseconds(1000)),
                        Goal::none());
        const auto rates =
            in_turns(session.turns(), {[&] { return pipelined(guest, session.pick(10u, 50'000u, 200'000u)); }});
        session.add(Figure{.name = "map changes of a page, pipelined",
                           .unit = "1/s",
                           .ours = rates[0],
                           .goal = Goal::at_least(200'000)});
    }
    measure_trace(session, service);
}

} // namespace

int main(int argc, char **argv)
{
    return run(argc, argv, measure_maps);
}
