// Whatever a VMM maps and unmaps while devices write and walkers sweep: at every sync the VMM's copy holds what was
// written before it. The walker in one thread, each device in one, the VMM in the test's.
#include "tests/engine/oracle.hpp"
#include "tests/engine/rig.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <sched.h>
#include <thread>

namespace dirtyring::test {
namespace {

using Clock = std::chrono::steady_clock;

std::uint64_t monotonic_ns()
{
    return static_cast<std::uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count());
}

// The walker's thread: takes operations, steps its shards, sleeps by the flags it raises.
class Walker
{
  public:
    explicit Walker(Rig &rig) : rig_(rig), thread_([this] { work(); }) {}
    ~Walker()
    {
        {
            const std::lock_guard lock(mutex_);
            stop_ = true;
            awake_ = true;
        }
        wake_up_.notify_one();
        thread_.join();
    }

    void submit(Op &op)
    {
        {
            const std::lock_guard lock(mutex_);
            inbox_.push_back(&op);
            awake_ = true;
        }
        wake_up_.notify_one();
    }

    // A doorbell or a kick.
    void ring()
    {
        {
            const std::lock_guard lock(mutex_);
            awake_ = true;
        }
        wake_up_.notify_one();
    }

  private:
    void work()
    {
        std::vector<Op *> taken;
        for (;;) {
            {
                const std::lock_guard lock(mutex_);
                if (stop_)
                    return;
                taken.swap(inbox_);
                awake_ = false;
            }
            for (Op *op : taken)
                rig_.shard(op->shard).submit(*op);
            bool worked = !taken.empty();
            taken.clear();
            for (unsigned i = 0; i < rig_.shards(); ++i)
                worked |= rig_.shard(i).step(monotonic_ns());
            if (worked)
                continue;
            sleep();
        }
    }

    void sleep()
    {
        const std::uint64_t now = monotonic_ns();
        bool busy = false;
        std::uint64_t until = UINT64_MAX;
        for (unsigned i = 0; i < rig_.shards(); ++i) {
            const service::Rest rest = rig_.shard(i).prepare_sleep(now);
            busy |= rest.busy;
            until = std::min(until, rest.until_ns);
        }
        if (busy) {
            sched_yield();
        } else {
            std::unique_lock lock(mutex_);
            // Without a time to wake at, only a peer ends this; a lost wake-up is found by whoever waits for a reply.
            if (until == UINT64_MAX)
                wake_up_.wait(lock, [this] { return awake_; });
            else if (until > now)
                wake_up_.wait_for(lock, std::chrono::nanoseconds(until - now), [this] { return awake_; });
        }
        for (unsigned i = 0; i < rig_.shards(); ++i)
            rig_.shard(i).wake();
    }

    Rig &rig_;
    std::mutex mutex_;
    std::condition_variable wake_up_;
    std::vector<Op *> inbox_;
    bool awake_ = false;
    bool stop_ = false;
    std::thread thread_;
};

struct Config {
    const char *name;
    dr_space space;
    unsigned shards;
    std::uint64_t capacity;
    std::uint64_t min_interval_ns;
    unsigned leaf_lg2_max;
    unsigned devices;
    unsigned format = iommu::AmdV1::id;

    friend void PrintTo(const Config &c, std::ostream *out) { *out << c.name; }
};

class Property : public testing::TestWithParam<Config>
{
};

class Play
{
  public:
    Play(const Config &c, std::uint64_t seed)
        : layout_{c.shards}, rig_({.format = c.format,
                                   .aperture_lg2 = layout_.aperture_lg2(),
                                   .shards = c.shards,
                                   .leaf_lg2_max = c.leaf_lg2_max,
                                   .space = c.space,
                                   .capacity = c.capacity,
                                   .min_interval_ns = c.min_interval_ns,
                                   .memory = Layout::memory,
                                   .devices = c.devices}),
          oracle_(rig_, layout_, c.devices), random_(seed), walker_(rig_)
    {
        rig_.deliver = [this](Op &op) { walker_.submit(op); };
        rig_.proceed = [this] {
            kick();
            sched_yield();
            return Clock::now() < patience_;
        };
    }

    void run(std::chrono::milliseconds length)
    {
        const auto until = Clock::now() + length;
        patient();
        ASSERT_EQ(rig_.enable(), 0);
        std::vector<std::thread> devices;
        for (unsigned d = 0; d < oracle_.devices(); ++d)
            devices.emplace_back([this, d, seed = random_()] { write(d, seed); });
        const auto enough = [this] { return maps_ > 0 && unmaps_ > 0 && syncs_ > 1; };
        const auto end = Clock::now() + std::chrono::seconds(100); // on a slow machine
        while ((Clock::now() < until || (!enough() && Clock::now() < end)) && !testing::Test::HasFatalFailure())
            act();
        stop_.store(true);
        for (std::thread &t : devices)
            t.join();
        if (!testing::Test::HasFatalFailure())
            sync();
        std::printf("[   counts ] %llu writes, %llu pins, %llu faults, %llu maps, %llu unmaps (%llu AGAIN), %llu "
                    "syncs; %llu runs, "
                    "%llu pages, %llu over-reported\n",
                    ull(oracle_.writes()), ull(pins_.load()), ull(faults_.load()), ull(maps_), ull(unmaps_),
                    ull(again_), ull(syncs_), ull(rig_.runs), ull(rig_.pages_reported), ull(rig_.over_reported));
        EXPECT_EQ(rig_.stray, 0u);
        EXPECT_GT(oracle_.writes(), 0u);
        EXPECT_GT(pins_.load(), 0u);
        EXPECT_GT(maps_, 0u);
        EXPECT_GT(unmaps_, 0u);
        EXPECT_GT(syncs_, 1u);
    }

  private:
    static unsigned long long ull(std::uint64_t n) { return n; }
    std::uint64_t below(std::uint64_t n) { return random_() % n; }
    void patient() { patience_ = Clock::now() + std::chrono::seconds(50); }
    void kick()
    {
        if (std::exchange(rig_.kicked, 0) != 0)
            walker_.ring();
    }

    // ---- devices

    void write(unsigned device, std::uint64_t seed)
    {
        std::mt19937_64 random(seed);
        std::deque<Pin> pins;
        const auto end_one = [&] {
            std::optional<Oracle::Write> landed;
            if (pins.front().write)
                landed = oracle_.land(device, pins.front());
            rig_.device(device).enter();
            rig_.device(device).unpin(pins.front().slot);
            if (rig_.device(device).leave() != 0)
                walker_.ring();
            if (landed)
                oracle_.complete(device, *landed);
            pins.pop_front();
        };
        while (!stop_.load(std::memory_order_relaxed)) {
            if (random() % 8 == 0) {
                const auto [block, page] = place(random);
                Pin pin = oracle_.pin(device, block, page, random() % 4 != 0);
                if (pin.bells != 0)
                    walker_.ring();
                if (pin.error == 0)
                    pins.push_back(std::move(pin));
                pins_.fetch_add(pin.error == 0 ? 1 : 0, std::memory_order_relaxed);
            }
            if (pins.size() > 8 || (!pins.empty() && random() % 16 == 0))
                end_one();
            Oracle::Write w = oracle_.begin(device);
            rig_.device(device).enter();
            for (std::uint64_t n = random() % 4 + 1; n > 0; --n) {
                const auto [block, page] = place(random);
                if (random() % 16 == 0) {
                    std::uint64_t word = 0; // sets A
                    rig_.device(device).read(layout_.iova(block) + page * page_size + device * Oracle::slot_size, &word,
                                             sizeof word);
                } else if (oracle_.write(device, w, block, page) != iommu::FaultReason::none) {
                    faults_.fetch_add(1, std::memory_order_relaxed);
                }
            }
            if (rig_.device(device).leave() != 0)
                walker_.ring();
            oracle_.complete(device, w);
            if (random() % 8 == 0)
                sched_yield();
        }
        while (!pins.empty())
            end_one();
    }

    static std::pair<unsigned, std::uint64_t> place(std::mt19937_64 &random)
    {
        const bool hot = random() % 4 != 0;
        const auto block = static_cast<unsigned>(random() % (hot ? 3 : Layout::blocks));
        return {block, random() % (hot ? 32 : Layout::block_size / page_size)};
    }

    // ---- the VMM

    void act()
    {
        patient();
        switch (below(20)) {
        case 0:
            return sync();
        case 1:
            return below(20) == 0 ? restart_tracking() : sync();
        case 2:
        case 3:
        case 4:
        case 5:
            for (std::uint64_t n = below(50); n > 0; --n)
                sched_yield();
            return;
        case 6:
        case 7:
        case 8:
        case 9:
            rig_.drain(static_cast<unsigned>(below(rig_.shards())), below(3) == 0 ? UINT64_MAX : below(6) + 1);
            return kick();
        default:
            return change_map();
        }
    }

    void sync()
    {
        const Oracle::Snapshot before = oracle_.completed();
        ASSERT_EQ(rig_.sync(), 0) << "hangs: " << rig_.describe();
        kick();
        ASSERT_EQ(oracle_.missing(before), 0u);
        ++syncs_;
    }

    void restart_tracking()
    {
        ASSERT_EQ(rig_.disable(), 0);
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        ASSERT_EQ(rig_.enable(), 0);
        oracle_.copy_all();
    }

    void change_map()
    {
        const auto block = static_cast<unsigned>(below(Layout::blocks));
        const std::uint64_t start = layout_.iova(block);
        const std::uint64_t end = start + Layout::block_size;
        const std::uint64_t at = start + below(Layout::block_size / page_size) * page_size;
        if (const auto e = rig_.ioas.first_in(at, at + page_size); e) {
            unmap(below(2) == 0 ? *e : iommu::Extent{start, end, 0, {}});
            return;
        }
        // The hole around it, or a piece of it.
        std::uint64_t from = start;
        for (auto e = rig_.ioas.first_in(start, at); e; e = rig_.ioas.first_in(from, at))
            from = e->end;
        const auto next = rig_.ioas.first_in(at, end);
        std::uint64_t to = next ? next->start : end;
        if (below(3) == 0) {
            from = at;
            to = std::min(to, at + (below(64) + 1) * page_size);
        }
        const auto place = static_cast<unsigned>(below(Layout::places));
        const iommu::Rights rights{true, below(10) != 0};
        ASSERT_EQ(rig_.map(from, to - from, Layout::oa(block, place) + (from - start), rights), 0);
        ++maps_;
    }

    void unmap(iommu::Extent e)
    {
        const std::uint64_t kind = below(8);
        const Harvest harvest = kind == 0 ? Harvest::discard : kind < 3 ? Harvest::deferred : Harvest::now;
        for (bool again = true; again;) {
            const Op &op = rig_.submit_unmap(e.start, e.end - e.start, harvest);
            ASSERT_TRUE(rig_.run(op, below(2) == 0)) << "hangs";
            ASSERT_TRUE(op.result == 0 || op.result == -EAGAIN) << op.result;
            if (harvest == Harvest::discard) {
                for (std::uint64_t at = op.start; at < op.reached;) {
                    const auto gone = rig_.ioas.first_in(at, op.reached);
                    if (!gone)
                        break;
                    const std::uint64_t first = std::max(at, gone->start);
                    at = std::min(gone->end, op.reached);
                    oracle_.forgive(gone->oa + (first - gone->start), at - first);
                }
            }
            rig_.note_unmapped(op);
            e.start = op.reached;
            again = op.result == -EAGAIN;
            again_ += again ? 1 : 0;
            if (again) {
                rig_.drain(op.shard, below(8) + 1);
                kick();
                if (below(4) == 0)
                    return; // the rest stays mapped
            }
        }
        ++unmaps_;
    }

    Layout layout_;
    Rig rig_;
    Oracle oracle_;
    std::mt19937_64 random_;
    std::atomic<bool> stop_{false};
    std::atomic<std::uint64_t> faults_{0};
    std::atomic<std::uint64_t> pins_{0};
    Clock::time_point patience_;
    std::uint64_t maps_ = 0;
    std::uint64_t unmaps_ = 0;
    std::uint64_t again_ = 0;
    std::uint64_t syncs_ = 0;
    Walker walker_; // ends before what it walks
};

TEST_P(Property, ReportedCoversWritten)
{
    const std::uint64_t seed = chosen_seed(std::random_device{}());
    const auto usual = std::chrono::seconds(GetParam().format == iommu::AmdV1::id ? 4 : 2);
    Play(GetParam(), seed).run(full_length() ? std::chrono::seconds(60) : usual);
}

INSTANTIATE_TEST_SUITE_P(Configurations, Property,
                         testing::Values(Config{"OaTinyRing", DR_SPACE_OA, 1, 8, 0, 30, 2},
                                         Config{"IovaTinyRing", DR_SPACE_IOVA, 1, 8, 0, 30, 2},
                                         Config{"OaFourShards", DR_SPACE_OA, 4, 16, 0, 21, 1},
                                         Config{"IovaFourShards", DR_SPACE_IOVA, 4, 16, 0, 30, 2},
                                         Config{"OaPaced", DR_SPACE_OA, 2, 64, 200'000, 30, 2},
                                         Config{"IovaSmallLeaves", DR_SPACE_IOVA, 2, 64, 50'000, 12, 1},
                                         Config{"VtdSs", DR_SPACE_OA, 1, 16, 0, 21, 2, iommu::VtdSs::id},
                                         Config{"SmmuV3S2", DR_SPACE_IOVA, 1, 16, 0, 21, 2, iommu::SmmuV3S2::id},
                                         Config{"SmmuV3S1", DR_SPACE_OA, 2, 16, 0, 30, 1, iommu::SmmuV3S1::id}),
                         [](const auto &info) { return std::string(info.param.name); });

} // namespace
} // namespace dirtyring::test
