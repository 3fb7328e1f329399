// The ring beside its peers: 8-byte elements in batches through one core, so what is measured is the instructions of both halves and
// no transfer between caches.
#include "ring/consumer.hpp"
#include "ring/producer.hpp"
#include "ring/region.hpp"

#include <benchmark/benchmark.h>
#include <boost/lockfree/spsc_queue.hpp>
#include <rte_ring.h>
#include <rte_ring_elem.h>

#include <array>
#include <cstdlib>
#include <memory>
#include <vector>

namespace {

constexpr std::uint64_t capacity = 4096;
constexpr std::size_t batch_max = 256;

void count_elements(benchmark::State &state)
{
    state.SetItemsProcessed(state.iterations() * state.range(0));
}

// In place on both sides: entries are built in the ring and read from it.
void dirty_ring(benchmark::State &state)
{
    dirtyring::ring::Region producer_region;
    dirtyring::ring::Region consumer_region;
    if (producer_region.make("bench", dirtyring::ring::producer_region_size(capacity, 8),
                             dirtyring::ring::Pages::present) != 0 ||
        consumer_region.make("bench", sizeof(dr_ring_consumer), dirtyring::ring::Pages::present) != 0)
        std::abort();
    auto *p = producer_region.map.as<dr_ring_producer>();
    auto *c = consumer_region.map.as<dr_ring_consumer>();
    dr_ring_header header{};
    header.capacity = capacity;
    header.entry_size = 8;
    dirtyring::ring::make_producer_region(p, header);
    dirtyring::ring::Producer<std::uint64_t> producer(p, c);
    dirtyring::ring::Consumer<std::uint64_t> consumer(c, p, capacity);
    const auto batch = static_cast<std::uint64_t>(state.range(0));
    std::uint64_t sum = 0;
    for (auto _ : state) {
        if (producer.room() < batch)
            std::abort();
        for (std::uint64_t i = 0; i < batch; ++i)
            producer.put(i, i);
        producer.stage(batch);
        benchmark::DoNotOptimize(producer.publish());
        for (std::uint64_t left = batch; left > 0;) {
            const auto entries = consumer.peek();
            for (const std::uint64_t e : entries)
                sum += e;
            left -= entries.size();
            benchmark::DoNotOptimize(consumer.release(entries.size()));
        }
    }
    benchmark::DoNotOptimize(sum);
    count_elements(state);
}
BENCHMARK(dirty_ring)->Arg(32)->Arg(256);

void boost_spsc_queue(benchmark::State &state)
{
    boost::lockfree::spsc_queue<std::uint64_t> queue(capacity);
    std::array<std::uint64_t, batch_max> buffer{};
    const auto batch = static_cast<std::size_t>(state.range(0));
    std::uint64_t sum = 0;
    for (auto _ : state) {
        for (std::size_t i = 0; i < batch; ++i)
            buffer[i] = i;
        queue.push(buffer.data(), batch);
        queue.consume_all([&](std::uint64_t e) { sum += e; });
    }
    benchmark::DoNotOptimize(sum);
    count_elements(state);
}
BENCHMARK(boost_spsc_queue)->Arg(32)->Arg(256);

void rte_ring_spsc(benchmark::State &state)
{
    const auto size = static_cast<std::size_t>(rte_ring_get_memsize_elem(8, capacity));
    std::unique_ptr<void, decltype(&std::free)> memory(std::aligned_alloc(RTE_CACHE_LINE_SIZE, size), &std::free);
    auto *ring = static_cast<rte_ring *>(memory.get());
    if (rte_ring_init(ring, "bench", capacity, RING_F_SP_ENQ | RING_F_SC_DEQ) != 0)
        std::abort();
    std::array<std::uint64_t, batch_max> buffer{};
    const auto batch = static_cast<unsigned>(state.range(0));
    std::uint64_t sum = 0;
    for (auto _ : state) {
        for (unsigned i = 0; i < batch; ++i)
            buffer[i] = i;
        rte_ring_sp_enqueue_bulk_elem(ring, buffer.data(), 8, batch, nullptr);
        rte_ring_sc_dequeue_bulk_elem(ring, buffer.data(), 8, batch, nullptr);
        for (unsigned i = 0; i < batch; ++i)
            sum += buffer[i];
    }
    benchmark::DoNotOptimize(sum);
    count_elements(state);
}
BENCHMARK(rte_ring_spsc)->Arg(32)->Arg(256);

} // namespace
