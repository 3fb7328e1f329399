// Two walkers on two cores, each with a guest of its own: what they sweep together beside what one sweeps alone.
#include "perf/bench_hwpt.hpp"
#include "perf/figures.hpp"

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace {

using namespace dirtyring::perf;

constexpr std::uint64_t one_in = 10; // pages are dirty

// Dirties and sweeps its guest over and over; M pages/s swept.
double sweep(BenchHwpt &hwpt, unsigned rounds)
{
    double ns = 0;
    for (unsigned round = 0; round < rounds; ++round) {
        for (std::uint64_t page = round % one_in; page < hwpt.pages(); page += one_in)
            hwpt.mark_dirty(page);
        ns += timed([&] { hwpt.sweep_and_consume(); });
    }
    return static_cast<double>(rounds * hwpt.pages() / one_in) / ns * 1e3;
}

double together(std::vector<std::unique_ptr<BenchHwpt>> &hwpts, unsigned rounds)
{
    std::atomic<unsigned> ready = 0;
    double other = 0;
    const auto begin = [&] {
        ++ready;
        while (ready < 2) {
        }
    };
    std::thread thread([&] {
        pin_to_core(1);
        begin();
        other = sweep(*hwpts[1], rounds);
    });
    begin();
    const double mine = sweep(*hwpts[0], rounds);
    thread.join();
    return mine + other;
}

void measure_walkers(Session &session)
{
    const char *name = "two walkers beside one";
    if (cores() < 2)
        return session.skip(name, "needs two cores");
    std::vector<std::unique_ptr<BenchHwpt>> hwpts;
    for (unsigned i = 0; i < 2; ++i)
        hwpts.push_back(std::make_unique<BenchHwpt>(session.pick(28u, 34u, 34u)));
    const unsigned rounds = session.pick(1u, 10u, 20u);
    const auto samples =
        in_turns(session.turns(), {[&] { return together(hwpts, rounds); }, [&] { return sweep(*hwpts[0], rounds); }});
    session.add(Figure{.name = name,
                       .unit = "M/s",
                       .ours = samples[0],
                       .peer = Other{"one", samples[1]},
                       .ratio = Ratio::ours_to_peer});
}

} // namespace

int main(int argc, char **argv)
{
    return run(argc, argv, measure_walkers);
}
