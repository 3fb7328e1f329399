// What a device notices of a split and a collapse of 64 GiB in leaves of 1 GiB: how many pages it writes while nothing
// is resized, and meanwhile. Two threads: the owner, which sweeps all the time, and the device. bench_resize [ROUNDS]
#include "perf/bench_hwpt.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

namespace {

using dirtyring::perf::BenchHwpt;
using dirtyring::perf::DoneOp;
using Clock = std::chrono::steady_clock;
using Kind = dirtyring::service::ShardOp::Kind;

constexpr unsigned memory_lg2 = 36;
constexpr std::uint64_t working_set = 256ull << 20; // of the device, from 0
constexpr std::uint64_t min_interval_ns = 1'000'000;
constexpr std::chrono::milliseconds rest{300}; // of the owner, while the rate without a resize is taken

std::uint64_t now_ns()
{
    return static_cast<std::uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count());
}

// Writes random pages for good.
class BusyDevice
{
  public:
    explicit BusyDevice(BenchHwpt &hwpt) : thread_([this, &hwpt] { write(hwpt); }) {}
    BusyDevice(const BusyDevice &) = delete;
    ~BusyDevice()
    {
        stop_ = true;
        thread_.join();
    }
    [[nodiscard]] std::uint64_t pages() const { return pages_.load(std::memory_order_relaxed); }
    [[nodiscard]] std::uint64_t faults() const { return faults_.load(std::memory_order_relaxed); }

  private:
    void write(BenchHwpt &hwpt)
    {
        std::uint64_t random = 88172645463325252ull;
        char data[DR_PAGE];
        std::memset(data, 1, sizeof data);
        while (!stop_.load(std::memory_order_relaxed)) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            hwpt.dma().enter();
            const auto fault = hwpt.dma().write(random % (working_set / DR_PAGE) * DR_PAGE, data, sizeof data);
            (void)hwpt.dma().leave();
            faults_.fetch_add(fault.reason != dirtyring::iommu::FaultReason::none, std::memory_order_relaxed);
            pages_.fetch_add(1, std::memory_order_relaxed);
        }
    }

    std::atomic<std::uint64_t> pages_ = 0;
    std::atomic<std::uint64_t> faults_ = 0;
    std::atomic<bool> stop_ = false;
    std::thread thread_; // last: the others are there when it begins
};

struct Phase {
    double seconds;
    double rate; // pages/s of the device
};

template <class Over> Phase measure(BenchHwpt &hwpt, const BusyDevice &device, Over over)
{
    const auto began = Clock::now();
    const std::uint64_t before = device.pages();
    while (!over())
        hwpt.step_and_consume(now_ns());
    const double seconds = std::chrono::duration<double>(Clock::now() - began).count();
    return {seconds, static_cast<double>(device.pages() - before) / seconds};
}

Phase without(BenchHwpt &hwpt, const BusyDevice &device)
{
    const auto end = Clock::now() + rest;
    return measure(hwpt, device, [&] { return Clock::now() >= end; });
}

Phase resize(BenchHwpt &hwpt, const BusyDevice &device, Kind kind, unsigned leaf_lg2)
{
    DoneOp op;
    op.kind = kind;
    op.end = 1ull << memory_lg2;
    op.leaf_lg2 = leaf_lg2;
    hwpt.shard().submit(op);
    return measure(hwpt, device, [&] { return op.finished; });
}

double median(std::vector<double> values)
{
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

} // namespace

int main(int argc, char **argv)
{
    unsigned rounds = 7;
    if (argc > 2 || (argc == 2 && std::from_chars(argv[1], argv[1] + std::strlen(argv[1]), rounds).ec != std::errc{}) ||
        rounds == 0) {
        fmt::print(stderr, "usage: bench_resize [ROUNDS]\n");
        return 2;
    }
    BenchHwpt hwpt(memory_lg2, {.leaf_lg2 = 30, .min_interval_ns = min_interval_ns});
    const BusyDevice device(hwpt);
    std::vector<double> large, splitting, small, collapsing, split_seconds, collapse_seconds;
    for (unsigned i = 0; i < rounds; ++i) {
        large.push_back(without(hwpt, device).rate);
        const Phase split = resize(hwpt, device, Kind::split, 12);
        small.push_back(without(hwpt, device).rate);
        const Phase collapse = resize(hwpt, device, Kind::collapse, 30);
        splitting.push_back(split.rate);
        split_seconds.push_back(split.seconds);
        collapsing.push_back(collapse.rate);
        collapse_seconds.push_back(collapse.seconds);
    }
    const double base = std::min(median(large), median(small));
    fmt::print("device, pages of 4 KiB/s (medians of {})\n", rounds);
    fmt::print("  leaves of 1 GiB          {:>10.0f}\n", median(large));
    fmt::print("  leaves of 4 KiB          {:>10.0f}\n", median(small));
    fmt::print("  while 64 GiB are split   {:>10.0f}   {:.2f} of the slower of the two, {:.2f} s\n", median(splitting),
               median(splitting) / base, median(split_seconds));
    fmt::print("  while they are collapsed {:>10.0f}   {:.2f}, {:.2f} s\n", median(collapsing),
               median(collapsing) / base, median(collapse_seconds));
    fmt::print("  faults                   {:>10}\n", device.faults());
    return device.faults() == 0 ? 0 : 1;
}
