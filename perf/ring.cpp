// The ring beside boost::lockfree::spsc_queue and rte_ring, 8-byte elements. On one core: the instructions of both
// halves. Between two: how long an element is on its way, beside a cache line that two cores write in turn.
#include "perf/figures.hpp"
#include "ring/consumer.hpp"
#include "ring/producer.hpp"
#include "ring/region.hpp"

#include <boost/lockfree/spsc_queue.hpp>
#include <fmt/format.h>
#include <rte_ring.h>
#include <rte_ring_elem.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <thread>

namespace {

using namespace dirtyring;
using namespace dirtyring::perf;

constexpr std::uint64_t capacity = 4096;
constexpr std::size_t batch_max = 256;

volatile std::uint64_t sink; // what was read is used

// ---- each with the two halves that it offers: write n elements from `first` on; read what is there, at most n,
// summing up

// In place on both sides: entries are built in the ring and read from it.
class DirtyRing
{
  public:
    DirtyRing() : producer_(make(producer_region_, consumer_region_)), consumer_(mine(), peer(), capacity) {}

    void write(std::uint64_t first, std::uint64_t n)
    {
        if (producer_.room() < n)
            throw Failure("the ring is full");
        const auto slots = producer_.slots();
        for (std::uint64_t done = 0; done < n;) {
            const auto row = slots.row(done);
            const std::uint64_t end = std::min(n, done + row.size());
            for (std::uint64_t &slot : row.first(end - done))
                slot = first + done++;
        }
        producer_.stage(n);
        (void)producer_.publish();
    }

    std::uint64_t read(std::uint64_t n, std::uint64_t &sum)
    {
        const auto entries = consumer_.peek(n);
        for (const std::uint64_t entry : entries)
            sum += entry;
        if (!entries.empty())
            (void)consumer_.release(entries.size());
        return entries.size();
    }

    // One entry, and its publication either as it is or without the question whether to call. Nobody reads: it is
    // overwritten.
    void publish_one(bool ask)
    {
        producer_.put(0, 1);
        producer_.stage(1);
        if (ask)
            sink = producer_.publish();
        else
            std::atomic_ref(peer()->head).store(producer_.staged(), std::memory_order_seq_cst);
    }

    static constexpr const char *name = "dirtyring";

  private:
    dr_ring_consumer *mine() { return consumer_region_.map.as<dr_ring_consumer>(); }
    dr_ring_producer *peer() { return producer_region_.map.as<dr_ring_producer>(); }

    static ring::Producer<std::uint64_t> make(ring::Region &p, ring::Region &c)
    {
        if (p.make("bench", ring::producer_region_size(capacity, 8), ring::Pages::present) != 0 ||
            c.make("bench", sizeof(dr_ring_consumer), ring::Pages::present) != 0)
            throw Failure("no memory for the ring");
        dr_ring_header header{};
        header.capacity = capacity;
        header.entry_size = 8;
        ring::make_producer_region(p.map.as<dr_ring_producer>(), header);
        c.map.as<dr_ring_consumer>()->armed = DR_DISARMED;
        return {p.map.as<dr_ring_producer>(), c.map.as<dr_ring_consumer>()};
    }

    ring::Region producer_region_;
    ring::Region consumer_region_;
    ring::Producer<std::uint64_t> producer_;
    ring::Consumer<std::uint64_t> consumer_;
};

class BoostSpsc
{
  public:
    void write(std::uint64_t first, std::uint64_t n)
    {
        for (std::uint64_t i = 0; i < n; ++i)
            buffer_[i] = first + i;
        queue_.push(buffer_.data(), n);
    }

    std::uint64_t read(std::uint64_t, std::uint64_t &sum)
    {
        return queue_.consume_all([&](std::uint64_t element) { sum += element; });
    }

    static constexpr const char *name = "boost spsc_queue";

  private:
    std::array<std::uint64_t, batch_max> buffer_{};
    boost::lockfree::spsc_queue<std::uint64_t> queue_{capacity}; // known at run time only, as those of the others
};

class RteRing
{
  public:
    RteRing()
    {
        const auto size = static_cast<std::size_t>(rte_ring_get_memsize_elem(8, capacity));
        memory_.reset(std::aligned_alloc(RTE_CACHE_LINE_SIZE, size));
        if (rte_ring_init(ring(), "bench", capacity, RING_F_SP_ENQ | RING_F_SC_DEQ) != 0)
            throw Failure("rte_ring cannot be made");
    }

    void write(std::uint64_t first, std::uint64_t n)
    {
        for (std::uint64_t i = 0; i < n; ++i)
            in_[i] = first + i;
        rte_ring_sp_enqueue_bulk_elem(ring(), in_.data(), 8, static_cast<unsigned>(n), nullptr);
    }

    std::uint64_t read(std::uint64_t n, std::uint64_t &sum)
    {
        const unsigned got = rte_ring_sc_dequeue_burst_elem(ring(), out_.data(), 8, static_cast<unsigned>(n), nullptr);
        for (unsigned i = 0; i < got; ++i)
            sum += out_[i];
        return got;
    }

    static constexpr const char *name = "rte_ring";

  private:
    rte_ring *ring() { return static_cast<rte_ring *>(memory_.get()); }

    std::unique_ptr<void, decltype(&std::free)> memory_{nullptr, &std::free};
    std::array<std::uint64_t, batch_max> in_{};
    std::array<std::uint64_t, batch_max> out_{}; // of another core
};

// Two lines and nothing else: what any of them needs at least.
class Line
{
  public:
    void write(std::uint64_t first, std::uint64_t) { line_.store(first, std::memory_order_release); }
    std::uint64_t read(std::uint64_t, std::uint64_t &sum)
    {
        const std::uint64_t now = line_.load(std::memory_order_acquire);
        sum += now;
        return now == std::exchange(seen_, now) ? 0 : 1;
    }

  private:
    alignas(DR_LINE_PAIR) std::atomic<std::uint64_t> line_{0};
    alignas(DR_LINE_PAIR) std::uint64_t seen_ = 0;
};

// ---- figures

// M/s through one core.
template <class Ring> double throughput(Ring &ring, std::uint64_t batch, std::uint64_t batches)
{
    std::uint64_t sum = 0;
    const double ns = timed([&] {
        for (std::uint64_t i = 0; i < batches; ++i) {
            ring.write(i * batch, batch);
            for (std::uint64_t left = batch; left > 0;)
                left -= ring.read(left, sum);
        }
    });
    sink = sum;
    const std::uint64_t elements = batches * batch;
    if (sum != elements * (elements - 1) / 2)
        throw Failure(fmt::format("{} has lost elements", Ring::name));
    return static_cast<double>(elements) / ns * 1e3;
}

void measure_throughput(Session &session, std::uint64_t batch)
{
    const std::uint64_t batches = session.pick(1u, 1u << 22, 1u << 23) / batch + 1;
    DirtyRing ours;
    BoostSpsc boost;
    RteRing rte;
    const auto samples = in_turns(session.turns(), {[&] { return throughput(ours, batch, batches); },
                                                    [&] { return throughput(boost, batch, batches); },
                                                    [&] { return throughput(rte, batch, batches); }});
    for (const auto &[name, peer] : {std::pair{BoostSpsc::name, 1u}, std::pair{RteRing::name, 2u}})
        session.add(Figure{.name = fmt::format("ring, batches of {}, beside {}", batch, name),
                           .unit = "M/s",
                           .ours = samples[0],
                           .peer = Other{name, samples[peer]},
                           .ratio = Ratio::ours_to_peer,
                           .goal = Goal::ratio_at_least(1.5)});
}

// ns one way: an element goes there, another comes back. The median of a hundred there and back: now and then one of
// two has lost its core.
template <class Ring> double one_way(unsigned hundreds)
{
    const auto there = std::make_unique<Ring>();
    const auto back = std::make_unique<Ring>();
    std::thread other([&] {
        pin_to_core(1);
        std::uint64_t sum = 0;
        for (std::uint64_t i = 1; i <= hundreds * 100ull; ++i) {
            while (there->read(1, sum) == 0) {
            }
            back->write(i, 1);
        }
    });
    Samples samples;
    std::uint64_t sum = 0;
    std::uint64_t next = 0;
    for (unsigned n = 0; n < hundreds; ++n) {
        samples.push_back(timed([&] {
            for (unsigned i = 0; i < 100; ++i) {
                there->write(++next, 1);
                while (back->read(1, sum) == 0) {
                }
            }
        }));
    }
    other.join();
    sink = sum;
    return median(samples) / 200;
}

void measure_one_way(Session &session)
{
    const char *name = "ring, one way";
    if (cores() < 2)
        return session.skip(name, "needs two cores");
    const unsigned hundreds = session.pick(1u, 2'000u, 5'000u);
    const auto samples = in_turns(session.turns(), {[&] { return one_way<DirtyRing>(hundreds); },
                                                    [&] { return one_way<RteRing>(hundreds); },
                                                    [&] { return one_way<Line>(hundreds); }});
    session.add(Figure{.name = name,
                       .unit = "ns",
                       .ours = samples[0],
                       .peer = Other{RteRing::name, samples[1]},
                       .limit = Other{"a line", samples[2]},
                       .ratio = Ratio::ours_to_limit,
                       .goal = Goal::ratio_at_most(1.3)});
}

// Peek, read every entry, release: all that a consumer does, of a ring that is full each time.
void measure_consumer(Session &session)
{
    const unsigned rounds = session.pick(1u, 1000u, 4000u);
    DirtyRing ring;
    const auto samples = in_turns(session.turns(), {[&] {
                                      double ns = 0;
                                      std::uint64_t sum = 0;
                                      for (unsigned i = 0; i < rounds; ++i) {
                                          ring.write(0, capacity);
                                          ns += timed([&] {
                                              while (ring.read(batch_max, sum) > 0) {
                                              }
                                          });
                                      }
                                      sink = sum;
                                      return ns / static_cast<double>(rounds * capacity);
                                  }});
    session.add(Figure{.name = "consumer, an entry", .unit = "ns", .ours = samples[0], .goal = Goal::at_most(2.2)});
}

// What it costs a producer to find that nobody wants to be called.
void measure_suppressed_call(Session &session)
{
    const std::uint64_t entries = session.pick(1u, 1u << 22, 1u << 23);
    DirtyRing asks;
    DirtyRing does_not;
    const auto publish = [entries](DirtyRing &ring, bool ask) {
        const double ns = timed([&] {
            for (std::uint64_t i = 0; i < entries; ++i)
                ring.publish_one(ask);
        });
        return ns / static_cast<double>(entries);
    };
    const auto samples =
        in_turns(session.turns(), {[&] { return publish(asks, true); }, [&] { return publish(does_not, false); }});
    Samples difference;
    for (std::size_t i = 0; i < samples[0].size(); ++i)
        difference.push_back(samples[0][i] - samples[1][i]);
    session.add(Figure{.name = "suppressed call", .unit = "ns", .ours = difference, .goal = Goal::at_most(2)});
}

void measure_rings(Session &session)
{
    measure_throughput(session, 32);
    measure_throughput(session, 256);
    measure_one_way(session);
    measure_consumer(session);
    measure_suppressed_call(session);
}

} // namespace

int main(int argc, char **argv)
{
    return run(argc, argv, measure_rings);
}
