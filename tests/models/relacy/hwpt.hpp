// A guest with one slice, as small as it gets: the real shard, the real DMA threads, the real consumer, over static
// memory.
//
// What must hold is what the project promises: after a sync, the VMM's copy of every page is what devices have written.
#pragma once

#include "tests/models/relacy/suite.hpp"

#include "iommu/dma.hpp"
#include "iommu/format_amdv1.hpp"
#include "ring/consumer.hpp"
#include "ring/control.h"
#include "ring/producer.hpp"
#include "service/engine/shard.hpp"

#include <cstddef>
#include <cstring>
#include <memory>
#include <optional>

namespace dirtyring::model {

inline constexpr dr_translation_header geometry = iommu::make_geometry(DR_FORMAT_AMDV1, 30, 1, 3);
inline constexpr unsigned pages = 2; // of guest memory, from OA 0
inline constexpr unsigned devices_max = 2;
inline constexpr std::uint64_t page_size = DR_PAGE;

struct Memory {
    alignas(DR_PAGE) std::byte tables[geometry.tables_size];
    alignas(DR_PAGE) std::byte translation[geometry.translation_size];
    alignas(DR_PAGE) dr_cell cells[devices_max];
    dr_pin pins[devices_max]; // one a thread
    alignas(DR_PAGE) dr_ring_producer producer;
    std::uint64_t entries[16];
    alignas(DR_PAGE) dr_ring_consumer consumer;
    alignas(DR_PAGE) std::byte record[4 * page_size]; // its first extents
    std::uint64_t note;                               // of all operations
    alignas(DR_PAGE) std::byte guest[pages * page_size];

    [[nodiscard]] std::uint64_t &guest_word(std::uint64_t oa)
    {
        return *reinterpret_cast<std::uint64_t *>(guest + oa / page_size * page_size);
    }
    [[nodiscard]] dr_shard_control &control()
    {
        return *reinterpret_cast<dr_shard_control *>(translation + geometry.shard_controls);
    }
    [[nodiscard]] std::uint64_t &generation(std::uint64_t region = 0)
    {
        return reinterpret_cast<std::uint64_t *>(translation + geometry.generations)[region];
    }
    [[nodiscard]] iommu::Tables view() { return {tables, geometry}; }

    // The tables of the first GiB and of its first 2 MiB.
    static constexpr std::uint64_t first = iommu::first_table(geometry, 0);
    static constexpr std::uint64_t middle = first + iommu::first_number(geometry.slice_lg2, 1);
    static constexpr std::uint64_t lowest = first + iommu::first_number(geometry.slice_lg2, 0);
    [[nodiscard]] std::uint64_t &table_bits() { return view().table_bits(lowest / 64); }
    [[nodiscard]] std::uint64_t &line_word(std::uint64_t table = lowest) { return view().line_word(table); }
    [[nodiscard]] std::uint64_t &leaf(std::uint64_t index = 0) { return view().entries(lowest)[index]; }
};
inline Memory memory;

struct Op final : service::ShardOp {
    Op() { note = &memory.note; }
    void done() override { over = true; }
    bool over = false;
};

struct HwptOptions {
    unsigned devices = 1;
    bool pins = false;
    unsigned capacity = 16;
    std::uint64_t min_interval_ns = 1; // 0: rests until what is published is released
};

class Hwpt
{
  public:
    using Device = iommu::DmaThread<iommu::AmdV1>;

    explicit Hwpt(Words &shared, const HwptOptions &options = {}) : words(shared), options_(options)
    {
        std::memset(memory.tables, 0, geometry.table_pages);
        for (const std::uint64_t table : {std::uint64_t{0}, Memory::middle, Memory::lowest})
            std::memset(memory.view().entries(table), 0, page_size);
        std::memset(memory.translation, 0, sizeof memory - offsetof(Memory, translation));
        std::memcpy(memory.translation, &geometry, sizeof geometry);
        iommu::TranslationView::open(memory.translation, sizeof memory.translation, memory.tables, sizeof memory.tables,
                                     view_);
        guest_.add(0, sizeof memory.guest, memory.guest);

        dr_ring_header header{};
        header.kind = DR_RING_DIRTY;
        header.capacity = options.capacity;
        header.entry_size = sizeof(std::uint64_t);
        header.space = DR_SPACE_OA;
        ring::make_producer_region(&memory.producer, header);
        memory.consumer.armed = DR_DISARMED;
        consumer.emplace(&memory.consumer, &memory.producer, options.capacity);

        service::ShardConfig config;
        config.tables = memory.view();
        config.geometry = geometry;
        config.control = &memory.control();
        config.generations = &memory.generation();
        config.producer = &memory.producer;
        config.consumer = &memory.consumer;
        config.min_interval_ns = options.min_interval_ns;
        config.backing = {[](std::uint64_t, std::uint64_t) { return 0; }, [](std::uint64_t, std::uint64_t) {},
                          [](std::uint64_t) {}};
        config.record = {memory.record, geometry, [](std::uint64_t, std::uint64_t) { return 0; }};
        config.call = [this] { ++calls; };
        shard = service::make_shard(DR_FORMAT_AMDV1, std::move(config));
        for (unsigned i = 0; i < options.devices; ++i) {
            devices[i] = std::make_unique<Device>(view_, guest_, threads(i), 0);
            shard->add(threads(i));
        }
    }

    // Registers the words that the threads share. What came before is known to all of them.
    void share()
    {
        for (unsigned i = 0; i < pages; ++i)
            words.share(memory.guest_word(i * page_size));
        share_but_guest();
    }
    void share_but_guest()
    {
        words.own(memory.record, &memory.note + 1);
        words.share(memory.view().entries(0)[0]);
        words.share(memory.view().entries(Memory::middle)[0]);
        for (unsigned i = 0; i < pages; ++i)
            words.share(memory.leaf(i));
        words.share(memory.line_word());
        words.share(memory.table_bits());
        words.share(memory.generation());
        words.share(memory.control().asleep);
        words.share(memory.control().context);
        for (unsigned i = 0; i < options_.devices; ++i)
            words.share(memory.cells[i].count);
        words.share(memory.producer.head);
        words.share(memory.producer.staged);
        words.share(memory.producer.want_kick);
        words.share(memory.producer.pending);
        words.share(memory.producer.full_since);
        words.share(memory.consumer.tail);
        words.share(memory.consumer.armed);
        if (options_.pins)
            share_pins();
    }
    void share_pins()
    {
        for (unsigned i = 0; i < options_.devices; ++i) {
            words.share(memory.cells[i].pinned);
            words.share(memory.pins[i].count);
            words.share(memory.pins[i].start);
            words.share(memory.pins[i].last);
            words.share(memory.pins[i].write);
        }
        words.share(memory.control().closing);
        for (dr_closed &closed : memory.control().closed) {
            words.share(closed.count);
            for (unsigned i = 0; i < 2; ++i) {
                words.share(closed.range[i].start);
                words.share(closed.range[i].last);
            }
        }
    }

    // ---- walker

    bool step() { return shard->step(now += 1'000'000); }
    void work(Op &op)
    {
        shard->submit(op);
        while (!op.over)
            step();
    }
    void map(std::uint64_t iova, std::uint64_t length, std::uint64_t oa)
    {
        Op op;
        op.kind = Op::Kind::map;
        op.rights = {true, true};
        op.start = iova;
        op.end = iova + length;
        op.oa = oa;
        work(op);
    }
    void enable()
    {
        Op op;
        op.kind = Op::Kind::enable;
        work(op);
    }

    // ---- devices

    // A section. The shards to be rung.
    std::uint64_t write(unsigned device, std::uint64_t iova, std::uint64_t value)
    {
        devices[device]->enter();
        devices[device]->write(iova, &value, sizeof value);
        return devices[device]->leave();
    }

    void read(unsigned device, std::uint64_t iova)
    {
        std::uint64_t value;
        devices[device]->enter();
        devices[device]->read(iova, &value, sizeof value);
        static_cast<void>(devices[device]->leave());
    }

    // ---- VMM

    // Reads what is published and copies the pages. How many entries.
    std::uint64_t take(Site site)
    {
        const auto entries = consumer->peek();
        for (const std::uint64_t entry : entries) {
            for (std::uint64_t i = 0; !dr_is_marker(entry) && i < dr_run_length(entry); i += page_size)
                copy(dr_run_address(entry) + i, site);
        }
        if (!entries.empty())
            kicked |= consumer->release(entries.size());
        return entries.size();
    }
    void copy(std::uint64_t oa, Site site) { copies[oa / page_size] = words.read(memory.guest_word(oa), site); }

    // At the end: a sync, and the VMM reads up to its marker.
    void sync(Site site)
    {
        Op op;
        op.kind = Op::Kind::sync;
        shard->submit(op);
        while (!op.over) {
            step();
            take(site);
        }
        take(site);
    }
    [[nodiscard]] bool lost() const
    {
        for (unsigned i = 0; i < pages; ++i) {
            if (copies[i] != memory.guest_word(i * page_size))
                return true;
        }
        return false;
    }

    [[nodiscard]] iommu::DmaThreads threads(unsigned device) const
    {
        return {{memory.cells + device, 1}, {memory.pins + device, options_.pins ? 1u : 0u}};
    }

    Words &words;
    std::unique_ptr<service::Shard> shard;
    std::unique_ptr<Device> devices[devices_max];
    std::optional<ring::Consumer<std::uint64_t>> consumer;
    std::uint64_t copies[pages] = {};
    std::uint64_t now = 0; // ns
    unsigned calls = 0;
    bool kicked = false;

  private:
    HwptOptions options_;
    iommu::TranslationView view_;
    iommu::GuestMemory guest_;
};

} // namespace dirtyring::model
