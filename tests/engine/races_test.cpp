// Negative controls that need two processors: the walker advances and samples while a device enters a section and looks
// at the generation. Two threads race a bounded number of times.
#include "tests/engine/hook.hpp"
#include "tests/engine/scenario.hpp"

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <pthread.h>
#include <random>
#include <sched.h>
#include <thread>
#include <vector>

namespace dirtyring::test {
namespace {

// One round: the device makes a page of a large leaf dirty and has it in its IOTLB. Then at the same time the walker
// sweeps and the VMM copies the leaf's last page at once, and the device, in its next section, writes the end of the
// leaf, which takes it some microseconds. Stores that miss the cache stand in the store buffer before the one that
// matters.

struct alignas(128) Slow {
    std::atomic<std::uint64_t> word{0};
};

class Race
{
  public:
    enum class Meeting { around_advance, after_first_page };

    explicit Race(Meeting meeting) : meeting_(meeting), rig_({.memory = 4 * MiB})
    {
        EXPECT_EQ(rig_.map(0, large, 0), 0);
        EXPECT_EQ(rig_.enable(), 0);
    }

    // Pages lost in at most `rounds` rounds, or until the first.
    std::uint64_t run(unsigned rounds, std::chrono::seconds limit)
    {
        const auto until = std::chrono::steady_clock::now() + limit;
        at_point = [this](Point p) {
            if (p == Point::walker_before_advance && meeting_here_) {
                meeting_here_ = false;
                meet();
            }
        };
        std::thread device([this] { write_rounds(); });
        pin(1, device.native_handle());
        cpu_set_t before;
        pthread_getaffinity_np(pthread_self(), sizeof before, &before);
        pin(0, pthread_self());

        std::uint64_t lost = 0;
        for (round_ = 1; round_ <= rounds && lost == 0 && std::chrono::steady_clock::now() < until; ++round_)
            lost += sweep_round();
        stop_.store(true);
        device.join();
        at_point = nullptr;
        pthread_setaffinity_np(pthread_self(), sizeof before, &before);
        std::printf("[   rounds ] %u\n", round_ - 1);
        return lost;
    }

  private:
    static constexpr std::uint64_t tail_length = 256 * KiB;
    static constexpr std::uint64_t tail = large - tail_length;
    static constexpr std::uint64_t last_page = large - page_size;
    static constexpr unsigned slow_stores = 24;

    static void pin(unsigned cpu, pthread_t thread)
    {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cpu, &set);
        pthread_setaffinity_np(thread, sizeof set, &set); // best effort
    }

    static void spin(unsigned n)
    {
        for (; n > 0; --n)
            std::atomic_signal_fence(std::memory_order_seq_cst);
    }

    template <class Done> static void await(Done done)
    {
        for (unsigned i = 0; !done(); ++i) {
            if (i % 4096 == 4095)
                sched_yield();
        }
    }

    static void store_slowly(std::array<Slow, slow_stores> &lines, std::uint64_t value)
    {
        for (Slow &line : lines)
            line.word.store(value, std::memory_order_relaxed);
    }

    void meet()
    {
        go_.store(round_, std::memory_order_release);
        if (meeting_ == Meeting::after_first_page) {
            // The device has begun to copy. glibc stores the first bytes last where the processor has no fast
            // REP MOVSB.
            await([this] { return peek_word(rig_.source.data() + tail + page_size) == round_; });
        } else {
            spin(walker_random_() % 128);
            store_slowly(of_walker_, round_);
        }
    }

    std::uint64_t sweep_round()
    {
        store_slowly(of_device_, round_); // now they are not in the device's cache
        start_.store(round_, std::memory_order_release);
        await([this] { return ready_.load(std::memory_order_acquire) == round_; });
        meeting_here_ = true;
        rig_.step();
        consume();
        go_.store(round_, std::memory_order_release); // if the sweep found nothing
        await([this] { return landed_.load(std::memory_order_acquire) == round_; });
        Op sync;
        sync.kind = OpKind::sync;
        rig_.shard().submit(sync);
        while (!sync.over()) {
            rig_.step();
            consume();
        }
        consume();
        const std::uint64_t n =
            std::memcmp(rig_.source.data() + last_page, rig_.destination.data() + last_page, page_size);
        return n != 0 ? 1 : 0;
    }

    void consume()
    {
        const auto entries = rig_.consumer().peek();
        for (const std::uint64_t e : entries) {
            if (!dr_is_marker(e))
                copy_page(rig_.destination.data() + last_page, rig_.source.data() + last_page);
        }
        if (!entries.empty())
            static_cast<void>(rig_.consumer().release(entries.size()));
    }

    void write_rounds()
    {
        Device &device = rig_.device();
        std::minstd_rand random(7);
        std::vector<std::uint64_t> data(tail_length / 8);
        for (std::uint64_t round = 1;; ++round) {
            await([&] { return start_.load(std::memory_order_acquire) == round || stop_.load(); });
            if (stop_.load())
                return;
            std::fill(data.begin(), data.end(), round);
            store_slowly(of_walker_, round);
            device.enter();
            device.write(0, &round, sizeof round);
            static_cast<void>(device.leave());
            ready_.store(round, std::memory_order_release);
            await([&] { return go_.load(std::memory_order_acquire) == round; });
            if (meeting_ == Meeting::around_advance) {
                spin(static_cast<unsigned>(random() % 128));
                store_slowly(of_device_, round);
            }
            device.enter();
            device.write(tail, data.data(), tail_length);
            static_cast<void>(device.leave());
            landed_.store(round, std::memory_order_release);
        }
    }

    Meeting meeting_;
    Rig rig_;
    std::minstd_rand walker_random_{3};
    unsigned round_ = 0;
    bool meeting_here_ = false; // the walker's thread's
    alignas(128) std::atomic<std::uint64_t> start_{0};
    alignas(128) std::atomic<std::uint64_t> ready_{0};
    alignas(128) std::atomic<std::uint64_t> go_{0};
    alignas(128) std::atomic<std::uint64_t> landed_{0};
    std::atomic<bool> stop_{false};
    alignas(128) std::array<Slow, slow_stores> of_device_;
    std::array<Slow, slow_stores> of_walker_;
};

struct Control {
    friend void PrintTo(const Control &c, std::ostream *out) { *out << c.name; }

    Rule rule;
    const char *name;
    Race::Meeting meeting;
    bool hardware; // the loss is a store that stands in the store buffer
};

constexpr Control controls[] = {
    {Rule::section_without_order, "section_without_order", Race::Meeting::around_advance, true},
    {Rule::advance_plain, "advance_plain", Race::Meeting::around_advance, true},
    {Rule::sample_before_advance, "sample_before_advance", Race::Meeting::after_first_page, false},
};

class Races : public testing::TestWithParam<Control>
{
  protected:
    void SetUp() override
    {
        if (std::thread::hardware_concurrency() < 2)
            GTEST_SKIP() << "two processors must run at the same time";
    }
};

TEST_P(Races, GreenAsItIs)
{
    EXPECT_EQ(std::make_unique<Race>(GetParam().meeting)->run(3'000, std::chrono::seconds(10)), 0u);
}

TEST_P(Races, RedWhenBroken)
{
    if (GetParam().hardware && sanitized)
        GTEST_SKIP() << "what a sanitizer adds takes longer than the store stays there: shown in the optimised build";
    const Breaking breaking(GetParam().rule);
    EXPECT_GT(std::make_unique<Race>(GetParam().meeting)->run(2'000'000, std::chrono::seconds(60)), 0u);
}

INSTANTIATE_TEST_SUITE_P(Rules, Races, testing::ValuesIn(controls),
                         [](const auto &info) { return std::string(info.param.name); });

} // namespace
} // namespace dirtyring::test
