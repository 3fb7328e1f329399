// What tracking costs a device: writes of 4 KiB beside the copy alone and beside a vhost log; hot pages that are
// written all the time.
#include "perf/bench_hwpt.hpp"
#include "perf/bitmap_peers.hpp"
#include "perf/figures.hpp"

#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

namespace {

using namespace dirtyring::perf;
using dirtyring::iommu::FaultReason;
using Kind = dirtyring::service::ShardOp::Kind;

constexpr unsigned memory_lg2 = 30;
constexpr std::uint64_t hot_pages = 64; // fits the IOTLB and the caches, so that the copy hides nothing

class Writer
{
  public:
    explicit Writer(BenchHwpt &hwpt) : hwpt_(hwpt), data_(DR_PAGE, std::byte{1}) {}

    // 4 KiB in a section of its own.
    void write(std::uint64_t page)
    {
        auto &dma = hwpt_.dma();
        dma.enter();
        const bool fault = dma.write(page << DR_PAGE_LG2, data_.data(), DR_PAGE).reason != FaultReason::none;
        (void)dma.leave();
        if (fault)
            throw Failure("a write faults");
    }

    void copy(std::uint64_t page)
    {
        std::memcpy(alone_.data() + page * DR_PAGE, data_.data(), DR_PAGE);
        asm volatile("" ::: "memory");
    }

  private:
    BenchHwpt &hwpt_;
    std::vector<std::byte> data_;
    std::vector<std::byte> alone_ = std::vector<std::byte>(hot_pages * DR_PAGE);
};

// ns each, of rounds over all hot pages.
template <class Write, class Between> double each(unsigned rounds, Write write, Between between)
{
    double ns = 0;
    for (unsigned round = 0; round < rounds; ++round) {
        ns += timed([&] {
            for (std::uint64_t page = 0; page < hot_pages; ++page)
                write(page);
        });
        between();
    }
    return ns / static_cast<double>(rounds * hot_pages);
}

Samples less(const Samples &a, const Samples &b)
{
    Samples difference;
    for (std::size_t i = 0; i < a.size(); ++i)
        difference.push_back(a[i] - b[i]);
    return difference;
}

void measure_writes(Session &session)
{
    BenchHwpt hwpt(memory_lg2);
    Writer writer(hwpt);
    Bitmap log(hwpt.pages());
    const unsigned rounds = session.pick(1u, 5'000u, 20'000u);
    const auto nothing = [] {};
    const auto write = [&](std::uint64_t page) { writer.write(page); };
    const auto logged = [&](std::uint64_t page) {
        writer.copy(page);
        log.set_shared(page);
    };
    const auto samples =
        in_turns(session.turns(), {[&] {
                                       return each(
                                           rounds, [&](std::uint64_t page) { writer.copy(page); }, nothing);
                                   },
                                   [&] { return each(rounds, write, nothing); },
                                   [&] { return each(rounds, write, [&] { hwpt.sweep_and_consume(); }); },
                                   [&] { return each(rounds, logged, nothing); }});
    const Other peer{"vhost log", less(samples[3], samples[0])};
    session.add(Figure{.name = "write of 4 KiB, warm IOTLB, over the copy",
                       .unit = "ns",
                       .ours = less(samples[1], samples[0]),
                       .peer = peer,
                       .limit = Other{"the copy", samples[0]},
                       .goal = Goal::at_most(10)});
    session.add(Figure{.name = "first write of a page since a sweep, over the copy",
                       .unit = "ns",
                       .ours = less(samples[2], samples[0]),
                       .peer = peer,
                       .limit = Other{"the copy", samples[0]},
                       .goal = Goal::at_most(25)});
}

// Devices that set D while nobody asks for it, beside those that do not. D of all pages is clear, and no translation is
// cached, when a round begins.
void measure_always_on(Session &session)
{
    const unsigned rounds = session.pick(1u, 100u, 400u);
    const auto turn = [](BenchHwpt &hwpt, Kind kind) {
        DoneOp op;
        op.kind = kind;
        hwpt.run(op);
    };
    struct Side {
        explicit Side(bool always_on) : hwpt(memory_lg2, {.always_on = always_on}), writer(hwpt) {}
        BenchHwpt hwpt;
        Writer writer;
    };
    Side off(false);
    Side on(true);
    const auto first = [&](Side &side) {
        const auto clean = [&] {
            turn(side.hwpt, Kind::enable);
            turn(side.hwpt, Kind::disable);
        };
        clean();
        return each(
            rounds, [&](std::uint64_t page) { side.writer.write(page); }, clean);
    };
    const auto warm = [&](Side &side) {
        return each(
            100 * rounds, [&](std::uint64_t page) { side.writer.write(page); }, [] {});
    };
    const auto samples = in_turns(session.turns(), {[&] { return first(off); }, [&] { return warm(off); },
                                                    [&] { return first(on); }, [&] { return warm(on); }});
    session.add(Figure{.name = "nobody asks, first write of 4 KiB to a page, always on",
                       .unit = "ns",
                       .ours = samples[2],
                       .limit = Other{"not always on", samples[0]}});
    session.add(Figure{.name = "nobody asks, write of 4 KiB, always on",
                       .unit = "ns",
                       .ours = samples[3],
                       .limit = Other{"not always on", samples[1]}});
}

// The walker and the consumer, on the other core.
class Owner
{
  public:
    explicit Owner(BenchHwpt &hwpt)
        : thread_([this, &hwpt] {
              pin_to_core(1);
              while (!stop_.load(std::memory_order_relaxed))
                  hwpt.step_and_consume(now_ns());
          })
    {
    }
    Owner(const Owner &) = delete;
    Owner &operator=(const Owner &) = delete;
    ~Owner()
    {
        stop_ = true;
        thread_.join();
    }

  private:
    std::atomic<bool> stop_ = false;
    std::thread thread_; // last
};

void measure_hot_pages(Session &session)
{
    if (cores() < 2)
        return session.skip("64 hot pages", "needs two cores");
    constexpr std::uint64_t interval_ns = 1'000'000;
    BenchHwpt hwpt(memory_lg2, {.min_interval_ns = interval_ns});
    Writer writer(hwpt);
    const unsigned rounds = session.pick(10u, 5'000u, 20'000u);
    // Every second page: what lies together is reported as one run.
    const auto write = [&](std::uint64_t page) { writer.write(2 * page); };
    const auto pages_a_second = [&] {
        const Owner owner(hwpt);
        return 1e9 / each(rounds, write, [] {});
    };
    const auto turn = [&](Kind kind) {
        DoneOp op;
        op.kind = kind;
        hwpt.run(op);
    };
    Samples entries; // a page and interval, while it is tracked
    const auto samples =
        in_turns(session.turns(), {[&] {
                                       const std::uint64_t before = hwpt.shard().counters().runs;
                                       const std::uint64_t began = now_ns();
                                       const double rate = pages_a_second();
                                       const double intervals = static_cast<double>(now_ns() - began) / interval_ns;
                                       const std::uint64_t runs = hwpt.shard().counters().runs - before;
                                       entries.push_back(static_cast<double>(runs) / hot_pages / (intervals + 1));
                                       return rate;
                                   },
                                   [&] {
                                       turn(Kind::disable);
                                       const double rate = pages_a_second();
                                       turn(Kind::enable);
                                       return rate;
                                   }});
    session.add(Figure{
        .name = "64 hot pages, entries a page and ms", .unit = "entries", .ours = entries, .goal = Goal::at_most(1)});
    session.add(Figure{.name = "64 hot pages, the device's rate",
                       .unit = "pages/s",
                       .ours = samples[0],
                       .limit = Other{"not tracked", samples[1]},
                       .ratio = Ratio::ours_to_limit,
                       .goal = Goal::ratio_at_least(0.9)});
}

void measure_device(Session &session)
{
    measure_writes(session);
    measure_always_on(session);
    measure_hot_pages(session);
}

} // namespace

int main(int argc, char **argv)
{
    return run(argc, argv, measure_device);
}
