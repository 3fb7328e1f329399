// What a device pays for a DMA write, beside the copy alone.
#include "perf/bench_hwpt.hpp"

#include <benchmark/benchmark.h>

#include <cstring>
#include <vector>

namespace {

using dirtyring::perf::BenchHwpt;

constexpr unsigned memory_lg2 = 30;
constexpr std::uint64_t hot_pages = 64; // fits the IOTLB and the caches, so that the copy hides nothing

BenchHwpt &hwpt()
{
    static BenchHwpt h(memory_lg2);
    h.sweep_and_consume();
    return h;
}

std::vector<std::byte> &data()
{
    static std::vector<std::byte> bytes(DR_PAGE, std::byte{1});
    return bytes;
}

void copy_alone(benchmark::State &state)
{
    std::vector<std::byte> to(hot_pages * DR_PAGE);
    std::uint64_t page = 0;
    for (auto _ : state) {
        std::memcpy(to.data() + page * DR_PAGE, data().data(), DR_PAGE);
        benchmark::ClobberMemory();
        page = (page + 1) % hot_pages;
    }
}
BENCHMARK(copy_alone);

// 4 KiB into pages that are dirty already, each in a section of its own.
void write_warm(benchmark::State &state)
{
    BenchHwpt &h = hwpt();
    auto &dma = h.dma();
    std::uint64_t page = 0;
    for (auto _ : state) {
        dma.enter();
        benchmark::DoNotOptimize(dma.write(page << DR_PAGE_LG2, data().data(), DR_PAGE));
        benchmark::DoNotOptimize(dma.leave());
        page = (page + 1) % hot_pages;
    }
}
BENCHMARK(write_warm);

// 4 KiB into pages that were swept since: walk, set D, summarize. The sweep is not timed.
void write_first(benchmark::State &state)
{
    BenchHwpt &h = hwpt();
    auto &dma = h.dma();
    std::uint64_t page = 0;
    for (auto _ : state) {
        if (page == hot_pages) {
            state.PauseTiming();
            h.sweep_and_consume();
            page = 0;
            state.ResumeTiming();
        }
        dma.enter();
        benchmark::DoNotOptimize(dma.write(page++ << DR_PAGE_LG2, data().data(), DR_PAGE));
        benchmark::DoNotOptimize(dma.leave());
    }
    h.sweep_and_consume();
}
BENCHMARK(write_first);

} // namespace
