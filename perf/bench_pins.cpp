// What DMA in flight costs who publishes: from D to the run at the consumer, while pins are held. On one core.
#include "perf/bench_hwpt.hpp"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <vector>

namespace {

using dirtyring::perf::BenchHwpt;
using dirtyring::perf::DoneOp;

constexpr unsigned memory_lg2 = 30;
constexpr std::uint64_t memory_bytes = 1ull << memory_lg2;
constexpr std::size_t pins_max = 1024;

BenchHwpt &hwpt()
{
    static BenchHwpt h(memory_lg2, {.pins = pins_max});
    h.sweep_and_consume();
    return h;
}

// Pins for writing on every second page from 0.
class InFlight
{
  public:
    InFlight(BenchHwpt &hwpt, std::int64_t pins) : hwpt_(hwpt)
    {
        hwpt_.dma().enter();
        for (std::int64_t i = 0; i < pins; ++i) {
            const auto iova = static_cast<std::uint64_t>(i) * 2 * DR_PAGE;
            dirtyring::iommu::DmaFault fault;
            if (hwpt_.dma().pin(iova, DR_PAGE, true, slots_.emplace_back(), fault, [](auto...) {}) != 0)
                std::abort();
        }
        (void)hwpt_.dma().leave();
    }
    InFlight(const InFlight &) = delete;
    InFlight &operator=(const InFlight &) = delete;
    ~InFlight()
    {
        if (unmap_.finished)
            std::abort(); // it did not wait
        hwpt_.dma().enter();
        for (const unsigned slot : slots_)
            (void)hwpt_.dma().unpin(slot);
        (void)hwpt_.dma().leave();
        hwpt_.sweep_and_consume();
        if (unmap_.finished) {
            DoneOp map;
            map.end = DR_PAGE;
            map.rights = {true, true};
            hwpt_.run(map);
        }
    }

    // Of the first page.
    void submit_unmap()
    {
        unmap_.kind = dirtyring::service::ShardOp::Kind::unmap;
        unmap_.end = DR_PAGE;
        hwpt_.shard().submit(unmap_);
    }

  private:
    BenchHwpt &hwpt_;
    std::vector<unsigned> slots_;
    DoneOp unmap_;
};

// Of each publication: another page is dirty, how long until its run is there. The median, for others use this core,
// too.
class Times
{
  public:
    explicit Times(benchmark::State &state) : state_(state) {}
    Times(const Times &) = delete;
    Times &operator=(const Times &) = delete;
    ~Times()
    {
        const auto middle = took_.begin() + static_cast<std::ptrdiff_t>(took_.size() / 2);
        std::nth_element(took_.begin(), middle, took_.end());
        state_.counters["median_ns"] = middle == took_.end() ? 0 : *middle;
    }

    void add(BenchHwpt &h)
    {
        const auto begin = std::chrono::steady_clock::now();
        h.step_until_published();
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
        state_.SetIterationTime(took.count());
        took_.push_back(took.count() * 1e9);
    }

  private:
    benchmark::State &state_;
    std::vector<double> took_;
};

void publish(benchmark::State &state)
{
    BenchHwpt &h = hwpt();
    const InFlight in_flight(h, state.range(0));
    Times times(state);
    for (auto _ : state) {
        h.dirty(memory_bytes - DR_PAGE);
        times.add(h);
        h.sweep_and_consume();
    }
}
BENCHMARK(publish)->ArgName("pins")->Arg(0)->Arg(64)->Arg(1024)->UseManualTime();

void publish_while_an_unmap_waits(benchmark::State &state)
{
    BenchHwpt &h = hwpt();
    InFlight in_flight(h, state.range(0));
    in_flight.submit_unmap();
    h.sweep_and_consume();
    Times times(state);
    for (auto _ : state) {
        h.dirty(memory_bytes - DR_PAGE);
        times.add(h);
        h.sweep_and_consume();
    }
}
BENCHMARK(publish_while_an_unmap_waits)->ArgName("pins")->Arg(64)->Arg(1024)->UseManualTime();

// The unmap comes just before, so its look at all slots is part of it.
void publish_behind_a_new_unmap(benchmark::State &state)
{
    BenchHwpt &h = hwpt();
    Times times(state);
    for (auto _ : state) {
        InFlight in_flight(h, state.range(0));
        h.dirty(memory_bytes - DR_PAGE);
        in_flight.submit_unmap();
        times.add(h);
    }
}
BENCHMARK(publish_behind_a_new_unmap)->ArgName("pins")->Arg(64)->Arg(1024)->UseManualTime();

} // namespace
