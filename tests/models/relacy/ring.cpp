// Entries (R1, R3) and the header (R6), as plain memory.
#include "tests/models/relacy/suites.hpp"

#include "ring/consumer.hpp"
#include "ring/producer.hpp"

#include <cstring>
#include <optional>

namespace dirtyring::model {

namespace {

constexpr std::uint64_t capacity = 2;

struct Memory {
    dr_ring_producer producer;
    std::uint64_t entries[capacity];
    dr_ring_consumer consumer;
};
Memory memory;

// The producer fills the ring again and again; the consumer reads each entry in its slot and gives it back.
class Ring : public Execution<Ring, 2>
{
  public:
    void prepare()
    {
        std::memset(static_cast<void *>(&memory), 0, sizeof memory);
        dr_ring_header header{};
        header.capacity = capacity;
        header.entry_size = sizeof(std::uint64_t);
        ring::make_producer_region(&memory.producer, header);
        memory.consumer.armed = DR_DISARMED;
        producer.emplace(&memory.producer, &memory.consumer);
        consumer.emplace(&memory.consumer, &memory.producer, capacity);
        for (std::uint64_t &entry : memory.entries)
            words.share_plain(entry);
        words.share(memory.producer.head);
        words.share(memory.producer.staged);
        words.share(memory.producer.want_kick);
        words.share(memory.consumer.tail);
        words.share(memory.consumer.armed);
    }

    void run(unsigned thread)
    {
        if (thread == 0) {
            for (unsigned i = 0; i < 12 && put_ < 4; ++i) {
                if (producer->room() > 0) {
                    producer->put(0, ++put_);
                    producer->stage(1);
                    static_cast<void>(producer->publish());
                } else {
                    pause();
                }
            }
            return;
        }
        for (unsigned i = 0; i < 12 && taken_ < 4; ++i) {
            const auto entries = consumer->peek();
            for (const std::uint64_t &entry : entries)
                require(words.read(entry, here()) == ++taken_, "another entry");
            if (!entries.empty())
                static_cast<void>(consumer->release(entries.size()));
            else
                pause();
        }
    }

    void judge() { require(!producer->peer_broke_rules() && !consumer->peer_broke_rules(), "an index went astray"); }

  private:
    std::optional<ring::Producer<std::uint64_t>> producer;
    std::optional<ring::Consumer<std::uint64_t>> consumer;
    std::uint64_t put_ = 0;
    std::uint64_t taken_ = 0;
};

// The service makes a ring, and a VMM that maps it reads the header as client/rings.cpp does.
class Header : public Execution<Header, 2>
{
  public:
    void prepare()
    {
        std::memset(static_cast<void *>(&memory), 0, sizeof memory);
        dr_ring_header &header = memory.producer.header;
        words.share_plain(header.magic);
        words.share_plain(header.kind);
        words.share_plain(header.capacity);
        words.share_plain(header.entry_size);
        words.share_plain(header.last);
        words.share(header.version);
    }

    void run(unsigned thread)
    {
        dr_ring_header &shared = memory.producer.header;
        if (thread == 0) {
            dr_ring_header header{};
            header.kind = DR_RING_DIRTY;
            header.capacity = capacity;
            header.entry_size = sizeof(std::uint64_t);
            header.last = UINT64_MAX;
            ring::make_producer_region(&shared_region(), header);
            return;
        }
        if (std::atomic_ref(shared.version).load(std::memory_order_acquire) != DR_RING_VERSION)
            return;
        require(words.read(shared.magic, here()) == DR_RING_MAGIC && words.read(shared.kind, here()) == DR_RING_DIRTY &&
                    words.read(shared.capacity, here()) == capacity &&
                    words.read(shared.entry_size, here()) == sizeof(std::uint64_t) &&
                    words.read(shared.last, here()) == UINT64_MAX,
                "half a header");
    }

    void judge() {}

  private:
    static dr_ring_producer &shared_region() { return memory.producer; }
};

} // namespace

Suite ring()
{
    using enum std::memory_order;
    using enum Access;
    const void *head = &memory.producer.head;
    const void *tail = &memory.consumer.tail;
    return {"ring",
            "R1 R3",
            50000,
            3,
            simulate<Ring>,
            {
                {"head_relaxed", "R3", Rule::none, {{head, store, relaxed}}},
                {"peek_relaxed", "R3", Rule::none, {{head, load, relaxed, acquire}}},
                {"tail_relaxed", "R1", Rule::none, {{tail, store, relaxed}}},
                {"room_relaxed", "R1", Rule::none, {{tail, load, relaxed}}},
            }};
}

Suite header()
{
    using enum std::memory_order;
    using enum Access;
    const void *version = &memory.producer.header.version;
    return {"header",
            "R6",
            10000,
            3,
            simulate<Header>,
            {
                {"version_relaxed", "R6", Rule::none, {{version, store, relaxed, release}}},
                {"check_relaxed", "R6", Rule::none, {{version, load, relaxed, acquire}}},
            }};
}

} // namespace dirtyring::model
