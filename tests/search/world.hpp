// Everything that outlives a worker: the guest's memory and the VMM's copy, hwpts with their tables and rings,
// command rings and journal,
// devices' cells, and what peers have rung. And what all parties of a schedule share: its choices, its clock, what
// went wrong.
#pragma once

#include "client/retained_map.hpp"
#include "iommu/any_dma.hpp"
#include "iommu/slice_record.hpp"
#include "ring/consumer.hpp"
#include "ring/producer.hpp"
#include "service/commands/command_journal.hpp"
#include "tests/engine/rig.hpp"
#include "tests/search/attributes.hpp"
#include "tests/search/coverage.hpp"

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace dirtyring::search {

using test::Memory;

struct Finding {
    std::string kind; // few words, the same for the same fault
    std::string text;
};

template <class Entry> struct CommandRing {
    CommandRing(dr_ring_kind kind, std::uint64_t capacity)
        : words(ring::producer_region_size(capacity, sizeof(Entry)) / sizeof(dr_ring_producer)), producer(words.data())
    {
        dr_ring_header header{};
        header.kind = kind;
        header.capacity = capacity;
        header.entry_size = sizeof(Entry);
        ring::make_producer_region(producer, header);
        consumer.armed = DR_DISARMED;
    }
    CommandRing(const CommandRing &) = delete;
    std::vector<dr_ring_producer> words;
    dr_ring_producer *producer;
    dr_ring_consumer consumer{};
};

// A dirty ring, how its consumer stands, and what a spectator has seen in it.
struct DirtyRing {
    DirtyRing(const Attributes &a, unsigned index);
    DirtyRing(const DirtyRing &) = delete;

    [[nodiscard]] dr_ring_producer *mine() const { return reinterpret_cast<dr_ring_producer *>(producer.data()); }
    [[nodiscard]] dr_ring_consumer *peer() const { return reinterpret_cast<dr_ring_consumer *>(consumer.data()); }
    [[nodiscard]] std::uint64_t room() const { return capacity - (mine()->staged - peer()->tail); }
    // Looks at what was published since; before anything of it is released.
    void look();

    std::uint64_t capacity;
    Memory producer;
    Memory consumer;
    ring::Consumer<std::uint64_t> reader;
    bool asleep = false; // the consumer
    bool called = false;
    bool rung = false;            // its shard's doorbell
    bool ended = false;           // the end marker was read
    std::set<std::uint64_t> read; // cookies
    std::uint64_t fresh_from = 0; // runs from this index on are of the tracking that goes on
    // The spectator.
    std::uint64_t looked = 0;
    std::map<std::uint64_t, unsigned> syncs; // cookie, how often
    std::map<std::uint64_t, unsigned> epochs;
    unsigned ends = 0;
    bool behind_end = false;               // something was
    std::uint64_t quiet_from = UINT64_MAX; // no run may come from this index on
    bool broke_quiet = false;
    bool full_at_end = false; // there was no room for an end marker
};

// An hwpt: its regions, rings, and record.
struct HwptWorld {
    HwptWorld(const Attributes &a, std::uint32_t id);
    HwptWorld(const HwptWorld &) = delete;

    // make_present: of its memory.
    [[nodiscard]] iommu::SliceRecord slice_record(unsigned shard, std::function<int()> make_present);
    [[nodiscard]] dr_shard_control *control(unsigned shard) const
    {
        return reinterpret_cast<dr_shard_control *>(translation.data() + geometry.shard_controls) + shard;
    }
    [[nodiscard]] unsigned shard_of(std::uint64_t iova) const
    {
        return static_cast<unsigned>(iova >> geometry.slice_lg2);
    }

    std::uint32_t id;
    dr_translation_header geometry;
    Memory tables;
    Memory translation;
    std::vector<std::unique_ptr<Memory>> records;
    iommu::TranslationView view;
    service::HwptRecord record{};
    std::vector<std::unique_ptr<DirtyRing>> rings;
    RetainedMap retained;
    std::deque<std::pair<unsigned, std::uint64_t>> large_wished; // shard, offset
    bool destroying = false;                                     // recorded: a restart goes through with it
    unsigned lives = 0;                                          // workers that have had it
    std::vector<bool> unlinked;                                  // by shard: a table, and it may still be walked
};

// The cells and slots of a device. They stay until every shard has forgotten them.
struct DeviceMemory {
    DeviceMemory(std::uint32_t number, unsigned pins)
        : id(number), memory(sizeof(dr_cell) + std::max(1u, pins) * sizeof(dr_pin)), pins_(pins)
    {
    }
    [[nodiscard]] iommu::DmaThreads threads() const
    {
        return {{reinterpret_cast<dr_cell *>(memory.data()), 1},
                {reinterpret_cast<dr_pin *>(memory.data() + sizeof(dr_cell)), pins_}};
    }
    std::uint32_t id;
    Memory memory;
    bool capable = true; // of setting D
  private:
    unsigned pins_;
};

class World
{
  public:
    World(Choices &drawn, Coverage &covered, bool telling);
    World(const World &) = delete;

    static constexpr std::uint32_t ioas = 1;

    void wrong(const char *kind, const std::string &text)
    {
        if (!finding)
            finding = Finding{kind, text};
    }
    // What the step at hand does, in words; make() is called if somebody listens.
    template <class Make> void say(Make make)
    {
        if (!telling_)
            return;
        if (!told.empty())
            told += "; ";
        told += make();
    }

    void make_hwpt();

    // How things stand, for the coverage; about an IOVA's slice, or all.
    std::function<std::uint64_t(std::optional<std::uint64_t>)> states;
    void met(Event e, std::optional<std::uint64_t> iova = std::nullopt) { coverage.met(e, states(iova)); }

    // ---- the guest's memory

    void touch(std::uint64_t oa) { touched_.insert(oa / page_size); }
    // Those pages of [oa, oa + length) that were ever written. False: there is no such memory.
    bool copy(std::uint64_t oa, std::uint64_t length);
    void copy_all() { static_cast<void>(copy(0, plan.memory())); }

    // 0, or -ENOMEM where memory is short and the schedule says so.
    int make_present() { return short_of_memory && choices.one_in(8) ? -ENOMEM : 0; }

    Choices &choices;
    Coverage &coverage;
    Attributes attributes;
    Plan plan;
    std::optional<Finding> finding;
    std::string told;

    Memory source;
    Memory destination;
    iommu::GuestMemory guest;
    CommandRing<dr_command> submissions;
    CommandRing<dr_completion> completions;
    std::vector<service::CommandRecord> journal;
    std::unique_ptr<HwptWorld> hwpt;
    std::vector<std::unique_ptr<HwptWorld>> gone;                   // destroyed: their consumers may still read
    std::map<std::uint32_t, std::unique_ptr<DeviceMemory>> devices; // that have a slot
    bool short_of_memory = false;                                   // now
    bool kicked = false;                                            // the command ring
    bool vmm_called = false;
    std::uint64_t now = 1'000'000'000; // ns
    std::uint64_t lives = 0;
    std::uint32_t next_id = 2;
    std::uint64_t time = 0; // goes on with each event that is compared with others

  private:
    bool telling_;
    std::set<std::uint64_t> touched_;
};

} // namespace dirtyring::search
