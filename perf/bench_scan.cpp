// What it costs to find, clear, invalidate and publish, and for a consumer to read: all of it, on one core.
#include "perf/bench_hwpt.hpp"

#include <benchmark/benchmark.h>

#include <random>
#include <vector>

namespace {

using dirtyring::perf::BenchHwpt;

// Tables of 256 GiB take a second to build: one hwpt for each size serves all benchmarks.
BenchHwpt &hwpt(unsigned memory_lg2)
{
    static std::map<unsigned, std::unique_ptr<BenchHwpt>> made;
    auto &h = made[memory_lg2];
    if (!h)
        h = std::make_unique<BenchHwpt>(memory_lg2);
    h->sweep_and_consume();
    return *h;
}

// A guest in which nothing was written, with the summary.
void idle_sweep(benchmark::State &state)
{
    BenchHwpt &h = hwpt(static_cast<unsigned>(state.range(0)));
    for (auto _ : state)
        benchmark::DoNotOptimize(h.shard().step(h.tick()));
}
BENCHMARK(idle_sweep)->ArgName("memory_lg2")->Arg(32)->Arg(38)->Unit(benchmark::kMicrosecond);

// The same without: every entry is read.
void full_scan_clean(benchmark::State &state)
{
    BenchHwpt &h = hwpt(static_cast<unsigned>(state.range(0)));
    for (auto _ : state) {
        h.owe_full_scan();
        h.sweep_and_consume();
    }
    state.counters["per_page"] =
        benchmark::Counter(static_cast<double>(h.pages()) * static_cast<double>(state.iterations()),
                           benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
}
BENCHMARK(full_scan_clean)->ArgName("memory_lg2")->Arg(32)->Arg(38)->Unit(benchmark::kMillisecond);

// Random pages of the guest are dirty, one in `one_in`; written by this core.
void sweep_random(benchmark::State &state)
{
    BenchHwpt &h = hwpt(static_cast<unsigned>(state.range(0)));
    const std::uint64_t count = h.pages() / static_cast<std::uint64_t>(state.range(1));
    std::mt19937_64 random(1);
    std::uint64_t found = 0;
    for (auto _ : state) {
        state.PauseTiming();
        for (std::uint64_t i = 0; i < count; ++i)
            h.dirty(random() % h.pages() << DR_PAGE_LG2);
        state.ResumeTiming();
        found += h.sweep_and_consume();
    }
    state.counters["per_dirty_page"] =
        benchmark::Counter(static_cast<double>(found), benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
}
BENCHMARK(sweep_random)
    ->ArgNames({"memory_lg2", "one_in"})
    ->Args({38, 10000})
    ->Args({34, 100})
    ->Args({34, 10})
    ->Args({32, 1})
    ->Unit(benchmark::kMillisecond);

} // namespace
