// The two halves of a ring, and what becomes of a peer that breaks the rules.
#include "ring/consumer.hpp"
#include "ring/producer.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace dirtyring::ring {
namespace {

struct Memory {
    explicit Memory(std::uint64_t capacity, std::uint64_t at = 0)
        : words(producer_region_size(capacity, 8) / sizeof(dr_ring_producer)), producer(words.data())
    {
        dr_ring_header header{};
        header.kind = DR_RING_DIRTY;
        header.capacity = capacity;
        header.entry_size = 8;
        producer->head = producer->staged = consumer.tail = at;
        consumer.armed = DR_DISARMED;
        make_producer_region(producer, header);
    }
    std::vector<dr_ring_producer> words; // the first is the region's page, entries follow
    dr_ring_producer *producer;
    dr_ring_consumer consumer{};
};

using P = Producer<std::uint64_t>;
using C = Consumer<std::uint64_t>;

void stage(P &p, std::uint64_t first, std::uint64_t n)
{
    for (std::uint64_t i = 0; i < n; ++i)
        p.put(i, first + i);
    p.stage(n);
}

// Wherever the indices begin.
class Ring : public testing::TestWithParam<std::uint64_t>
{
};

TEST_P(Ring, FillsEmptiesAndWraps)
{
    Memory m(8, GetParam());
    P p(m.producer, &m.consumer);
    C c(&m.consumer, m.producer, 8);
    std::uint64_t next = 0;
    std::uint64_t expected = 0;
    for (unsigned round = 0; round < 40; ++round) {
        const std::uint64_t n = round % 9;
        EXPECT_EQ(p.room(), 8u);
        stage(p, next, n);
        next += n;
        EXPECT_EQ(p.room(), 8 - n);
        EXPECT_TRUE(c.peek().empty()) << "staged is not published";
        EXPECT_FALSE(p.publish());
        std::uint64_t seen = 0;
        for (auto e = c.peek(); !e.empty(); e = c.peek()) {
            for (const std::uint64_t value : e)
                EXPECT_EQ(value, expected++);
            seen += e.size();
        }
        EXPECT_EQ(seen, n);
        EXPECT_EQ(p.released(), n == 0);
        EXPECT_FALSE(c.release(seen));
        EXPECT_TRUE(p.released());
    }
    EXPECT_FALSE(p.peer_broke_rules());
    EXPECT_FALSE(c.peer_broke_rules());
}

TEST_P(Ring, PeekHasACursorOfItsOwn)
{
    Memory m(8, GetParam());
    P p(m.producer, &m.consumer);
    C c(&m.consumer, m.producer, 8);
    stage(p, 10, 5);
    static_cast<void>(p.publish());
    std::uint64_t seen = 0;
    while (seen < 3)
        seen += c.peek(1).size();
    EXPECT_EQ(p.room(), 3u);
    static_cast<void>(c.release(2));
    EXPECT_EQ(p.room(), 5u);
    C again(&m.consumer, m.producer, 8); // a consumer that reconnects
    EXPECT_EQ(again.peek(1)[0], 12u);
}

// armed at every distance from the head, for every size of a batch.
TEST_P(Ring, CallsExactlyWhenHeadReachesTheEventIndex)
{
    for (std::uint64_t armed = 0; armed < 12; ++armed) {
        for (std::uint64_t batch = 0; batch <= 8; ++batch) {
            Memory m(8, GetParam());
            P p(m.producer, &m.consumer);
            m.consumer.armed = GetParam() + armed;
            stage(p, 0, batch);
            EXPECT_EQ(p.publish(), armed >= 1 && armed <= batch) << armed << ' ' << batch;
            EXPECT_FALSE(p.publish()) << "once";
        }
    }
}

TEST_P(Ring, ArmingLooksAgain)
{
    Memory m(8, GetParam());
    P p(m.producer, &m.consumer);
    C c(&m.consumer, m.producer, 8);
    EXPECT_TRUE(c.arm());
    stage(p, 0, 1);
    EXPECT_TRUE(p.publish());
    EXPECT_FALSE(c.arm()) << "there is something";
    EXPECT_EQ(c.peek().size(), 1u);
    EXPECT_TRUE(c.arm());
    c.disarm();
    stage(p, 0, 1);
    EXPECT_FALSE(p.publish());
}

TEST_P(Ring, KicksWhileTheProducerAsks)
{
    Memory m(8, GetParam());
    P p(m.producer, &m.consumer);
    C c(&m.consumer, m.producer, 8);
    stage(p, 0, 8);
    static_cast<void>(p.publish());
    std::uint64_t n = c.peek().size();
    EXPECT_FALSE(c.release(1));
    p.want_kick(true);
    EXPECT_TRUE(c.release(n - 1));
    p.want_kick(false);
    n = c.peek().size();
    EXPECT_FALSE(c.release(n));
}

TEST_P(Ring, TakesUpWhereItWas)
{
    Memory m(8, GetParam());
    {
        P p(m.producer, &m.consumer);
        stage(p, 0, 3);
        static_cast<void>(p.publish());
        stage(p, 3, 2); // a crash here
    }
    P p(m.producer, &m.consumer);
    C c(&m.consumer, m.producer, 8);
    EXPECT_EQ(p.room(), 3u);
    static_cast<void>(p.publish());
    std::uint64_t expected = 0;
    for (auto e = c.peek(); !e.empty(); e = c.peek()) {
        for (const std::uint64_t value : e)
            EXPECT_EQ(value, expected++);
    }
    EXPECT_EQ(expected, 5u);
}

TEST_P(Ring, HostileTailIsIgnored)
{
    Memory m(8, GetParam());
    P p(m.producer, &m.consumer);
    stage(p, 0, 4);
    static_cast<void>(p.publish());
    m.consumer.tail = GetParam() + 2;
    EXPECT_EQ(p.room(), 6u);
    for (const std::uint64_t off : {1ull, 0ull, 5ull, 8ull, 1ull << 62, ~0ull - 9}) { // back, or past the head
        m.consumer.tail = GetParam() + off;
        EXPECT_EQ(p.room(), 6u) << off;
        EXPECT_FALSE(p.released());
    }
    EXPECT_TRUE(p.peer_broke_rules());
    m.consumer.tail = GetParam() + 4;
    EXPECT_EQ(p.room(), 8u);
}

TEST_P(Ring, HostileTailFromTheStart)
{
    Memory m(8, GetParam());
    m.consumer.tail = GetParam() + 1;
    P p(m.producer, &m.consumer);
    EXPECT_EQ(p.room(), 0u) << "nothing is known to be free";
    EXPECT_TRUE(p.peer_broke_rules());
}

// A ring whose head was ever wrong is dead: also when the head is mended, and its consumer sleeps.
TEST_P(Ring, HostileHeadEndsIt)
{
    for (const std::uint64_t off : {9ull, 1ull << 40, ~0ull}) {
        Memory m(8, GetParam());
        C c(&m.consumer, m.producer, 8);
        m.producer->head = GetParam() + off;
        EXPECT_TRUE(c.peek().empty()) << off;
        EXPECT_TRUE(c.peer_broke_rules());
        EXPECT_TRUE(c.arm()) << "nothing will come";
        m.producer->head = GetParam() + 3;
        EXPECT_TRUE(c.peek().empty());
    }
}

TEST_P(Ring, HeadBehindWhatWasPeekedEndsIt)
{
    Memory m(8, GetParam());
    C c(&m.consumer, m.producer, 8);
    m.producer->head = GetParam() + 3;
    std::uint64_t seen = 0;
    for (auto e = c.peek(); !e.empty(); e = c.peek())
        seen += e.size();
    EXPECT_EQ(seen, 3u);
    m.producer->head = GetParam() + 2;
    EXPECT_TRUE(c.peek().empty());
    EXPECT_TRUE(c.peer_broke_rules());
}

INSTANTIATE_TEST_SUITE_P(From, Ring, testing::Values(0u, 5u, 0xffff'fffdu, INT64_MAX - 2ull),
                         [](const auto &info) { return "Index" + std::to_string(info.index); });

// Both sides sleep by their flags; nobody oversleeps.
TEST(RingThreads, NoWakeUpIsLost)
{
    constexpr std::uint64_t total = 200'000;
    Memory m(8);
    std::atomic<std::uint64_t> calls{0};
    std::atomic<std::uint64_t> kicks{0};
    std::thread producer([&] {
        P p(m.producer, &m.consumer);
        for (std::uint64_t next = 0; next < total;) {
            const std::uint64_t n = std::min(p.room(), total - next);
            if (n == 0) {
                const std::uint64_t before = kicks.load();
                p.want_kick(true);
                if (p.room() == 0)
                    kicks.wait(before);
                p.want_kick(false);
                continue;
            }
            stage(p, next, n);
            next += n;
            if (p.publish()) {
                calls.fetch_add(1);
                calls.notify_one();
            }
        }
    });
    C c(&m.consumer, m.producer, 8);
    for (std::uint64_t expected = 0; expected < total;) {
        const auto entries = c.peek();
        if (entries.empty()) {
            const std::uint64_t before = calls.load();
            if (c.arm())
                calls.wait(before);
            c.disarm();
            continue;
        }
        for (const std::uint64_t e : entries)
            ASSERT_EQ(e, expected++);
        if (c.release(entries.size())) {
            kicks.fetch_add(1);
            kicks.notify_one();
        }
    }
    producer.join();
}

TEST(Entry, RunsAndMarkers)
{
    EXPECT_FALSE(dr_is_marker(dr_run(5, false, 1)));
    EXPECT_EQ(dr_run_address(dr_run(5, false, 2047)), 5u << 12);
    EXPECT_EQ(dr_run_length(dr_run(5, false, 2047)), 2047u << 12);
    EXPECT_EQ(dr_run_length(dr_run(512, true, 2047)), 2047ull << 21);
    EXPECT_EQ(dr_run_address(dr_run((1ull << 52) - 1, true, 1)), ~0ull << 12);
    for (const std::uint64_t payload : {0ull, 1ull, (1ull << DR_PAYLOAD_BITS) - 1}) {
        const std::uint64_t e = dr_marker(DR_MARKER_SYNC, payload);
        EXPECT_TRUE(dr_is_marker(e));
        EXPECT_EQ(dr_marker_kind(e), DR_MARKER_SYNC);
        EXPECT_EQ(dr_marker_payload(e), payload);
    }
}

} // namespace
} // namespace dirtyring::ring
