// When a walker lets an agent nap, and what wakes it. Time is what the test says; bells are eventfds.
#include "service/walkers/walker.hpp"
#include "tests/engine/hook.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <sys/eventfd.h>
#include <unistd.h>
#include <vector>

namespace dirtyring::test {
namespace {

using service::Rest;

// Counts what it is asked.
struct ToldAgent final : service::Agent {
    ToldAgent() : Agent(Turn::second) {}

    bool works = false;
    Rest rest;
    unsigned steps = 0;
    unsigned sleeps = 0;
    unsigned wakes = 0;

    bool step(std::uint64_t) override
    {
        ++steps;
        static_cast<void>(stirred_.take());
        return works;
    }
    Rest prepare_sleep(std::uint64_t) override
    {
        ++sleeps;
        return rest;
    }
    void wake() override { ++wakes; }
};

// A walker with two agents, of which one always has work.
class Naps : public testing::Test
{
  protected:
    Naps()
    {
        busy.works = true;
        walker.adopt(busy, busy_bell.get());
        walker.adopt(idle, bell.get());
        now = service::monotonic_ns();
    }
    ~Naps() override
    {
        walker.drop(idle);
        walker.drop(busy);
    }

    void pass(std::uint64_t ns)
    {
        for (const std::uint64_t until = now + ns; now < until; now += 10'000)
            walker.do_work(now);
    }
    void fall_asleep()
    {
        pass(2 * ms);
        ASSERT_EQ(idle.sleeps, 1u);
        idle.steps = 0;
    }
    void ring() { ASSERT_EQ(::eventfd_write(bell.get(), 1), 0); }
    // The kernel tells of a bell when it comes to it.
    bool woken_soon()
    {
        for (unsigned i = 0; i < 500 && idle.wakes == 0; ++i) {
            walker.do_work(now);
            ::usleep(1000);
        }
        return idle.wakes > 0;
    }

    static constexpr std::uint64_t ms = 1'000'000;

    ring::Fd busy_bell{::eventfd(0, EFD_CLOEXEC)};
    ring::Fd bell{::eventfd(0, EFD_CLOEXEC)};
    ToldAgent busy;
    ToldAgent idle;
    service::Walker walker;
    std::uint64_t now = 0;
};

TEST_F(Naps, BeginAfterAMillisecond)
{
    pass(ms / 2);
    EXPECT_EQ(idle.sleeps, 0u);
    EXPECT_GT(idle.steps, 10u);
    fall_asleep();
    pass(ms);
    EXPECT_EQ(idle.steps, 0u);
    EXPECT_EQ(idle.wakes, 0u);
    EXPECT_EQ(busy.sleeps, 0u);
}

TEST_F(Naps, EndWithABell)
{
    fall_asleep();
    ring();
    EXPECT_TRUE(woken_soon());
    pass(ms / 2);
    EXPECT_GT(idle.steps, 0u);
}

TEST_F(Naps, EndWithEachBell)
{
    for (unsigned i = 1; i <= 3; ++i) {
        pass(2 * ms);
        ASSERT_EQ(idle.sleeps, i);
        idle.wakes = 0;
        ring();
        ASSERT_TRUE(woken_soon()) << i;
        pass(10'000);
    }
}

TEST_F(Naps, EndInTime)
{
    idle.rest.until_ns = now + 5 * ms;
    fall_asleep();
    pass(2 * ms);
    EXPECT_EQ(idle.steps, 0u);
    pass(2 * ms);
    EXPECT_EQ(idle.wakes, idle.steps);
    EXPECT_GT(idle.steps, 0u);
}

TEST_F(Naps, EndWithWhatItsOwnerGives)
{
    fall_asleep();
    idle.stirred().set();
    pass(10'000);
    EXPECT_EQ(idle.wakes, 1u);
    EXPECT_EQ(idle.steps, 1u);
}

TEST_F(Naps, AreNotForTheBusy)
{
    idle.rest.busy = true;
    pass(3 * ms);
    EXPECT_GT(idle.sleeps, 1u);
    EXPECT_EQ(idle.wakes, idle.sleeps);
    EXPECT_GT(idle.steps, 250u);
}

TEST_F(Naps, WouldLastForeverWithoutBells)
{
    const Breaking breaking(Rule::nap_ignores_bell);
    fall_asleep();
    ring();
    EXPECT_FALSE(woken_soon());
}

// More bells than the completion queue has room for: each is heard, no round goes on for ever, and each is heard again.
TEST(ManyBells, RungBetweenTwoRoundsAreAllHeard)
{
    constexpr unsigned count = 700;
    service::Walker walker;
    std::deque<ToldAgent> agents(count);
    std::vector<ring::Fd> bells;
    for (ToldAgent &agent : agents) {
        bells.emplace_back(::eventfd(0, EFD_CLOEXEC));
        ASSERT_TRUE(bells.back());
        walker.adopt(agent, bells.back().get());
    }
    std::uint64_t now = service::monotonic_ns();
    for (unsigned round = 1; round <= 3; ++round) {
        const auto all = [&](auto what) { return std::all_of(agents.begin(), agents.end(), what); };
        for (unsigned i = 0; i < 1000 && !all([&](const ToldAgent &s) { return s.sleeps > s.wakes; }); ++i)
            walker.do_work(now += 1'000'000);
        for (const ring::Fd &bell : bells)
            ASSERT_EQ(::eventfd_write(bell.get(), 1), 0);
        for (unsigned i = 0; i < 5000 && !all([&](const ToldAgent &s) { return s.wakes >= round; }); ++i) {
            walker.do_work(now);
            ::usleep(1000);
        }
        EXPECT_TRUE(all([&](const ToldAgent &s) { return s.wakes >= round; })) << round;
    }
    for (ToldAgent &agent : agents)
        walker.drop(agent);
}

} // namespace
} // namespace dirtyring::test
