// An hwpt in this process for benchmarks: one shard, one device thread, one consumer; the caller steps the shard.
#pragma once

#include "iommu/dma.hpp"
#include "iommu/format_amdv1.hpp"
#include "iommu/slice.hpp"
#include "iommu/summary.hpp"
#include "ring/consumer.hpp"
#include "ring/control.h"
#include "ring/producer.hpp"
#include "ring/region.hpp"
#include "service/engine/shard.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <system_error>

namespace dirtyring::perf {

struct DoneOp final : service::ShardOp {
    void done() override { finished = true; }
    bool finished = false;
};

struct BenchOptions {
    std::uint64_t ring_entries = 1 << 16;
    std::size_t pins = 0; // slots
    unsigned leaf_lg2 = DR_PAGE_LG2;
    std::uint64_t min_interval_ns = 0; // 0: paced by the consumer's releases
    bool always_on = false;
};

// 2^memory_lg2 bytes of IOVA space from 0, mapped, tracked. Every GiB of it leads to the same GiB of guest memory, so
// that a large guest costs its tables only: they are what is measured.
class BenchHwpt
{
  public:
    explicit BenchHwpt(unsigned memory_lg2, const BenchOptions &options = {})
        : h_(iommu::make_geometry(DR_FORMAT_AMDV1, memory_lg2, 1, std::max(3u, iommu::levels_needed(memory_lg2)))),
          memory_bytes_(1ull << memory_lg2), pins_(options.pins)
    {
        must(tables_.make("bench-tables", h_.tables_size, ring::Pages::sparse));
        must(translation_.make("bench-translation", h_.translation_size, ring::Pages::present));
        must(producer_.make("bench-producer", ring::producer_region_size(options.ring_entries, 8),
                            ring::Pages::present));
        must(consumer_region_.make("bench-consumer", sizeof(dr_ring_consumer), ring::Pages::present));
        must(cells_.make("bench-cells", sizeof(dr_cell) + pins_ * sizeof(dr_pin), ring::Pages::present));
        const iommu::Tables view(tables_.map.data(), h_);
        iommu::make_top_tables<iommu::AmdV1>(h_, view);
        *translation_.map.as<dr_translation_header>() = h_;
        auto *controls = translation_.map.as<dr_shard_control>(h_.shard_controls);
        controls[0].first_table = iommu::first_table(h_, 0);

        dr_ring_header header{};
        header.kind = DR_RING_DIRTY;
        header.capacity = options.ring_entries;
        header.entry_size = 8;
        header.space = DR_SPACE_IOVA;
        ring::make_producer_region(producer_.map.as<dr_ring_producer>(), header);

        service::ShardConfig config;
        config.tables = view;
        config.geometry = h_;
        config.control = controls;
        config.generations = translation_.map.as<std::uint64_t>(h_.generations);
        config.producer = producer_.map.as<dr_ring_producer>();
        config.consumer = consumer_region_.map.as<dr_ring_consumer>();
        config.leaves.leaf_lg2_max = options.leaf_lg2;
        config.min_interval_ns = options.min_interval_ns;
        config.always_on = options.always_on;
        const auto there = [](ring::Region &region) {
            return
                [&region](std::uint64_t offset, std::uint64_t length) { return region.make_present(offset, length); };
        };
        config.backing = {there(tables_),
                          [this](std::uint64_t offset, std::uint64_t length) { tables_.give_back(offset, length); },
                          [this](std::uint64_t offset) { static_cast<void>(tables_.make_large(offset)); }};
        must(record_.make("bench-record", iommu::SliceRecord::size(h_), ring::Pages::sparse));
        config.record = {record_.map.data(), h_, there(record_)};
        config.call = [] {};
        shard_ = service::make_shard(DR_FORMAT_AMDV1, std::move(config));
        shard_->add(threads());
        consumer_ = std::make_unique<ring::Consumer<std::uint64_t>>(
            consumer_region_.map.as<dr_ring_consumer>(), producer_.map.as<dr_ring_producer>(), options.ring_entries);

        must(guest_.make("bench-guest", guest_bytes, ring::Pages::sparse));
        memory_.add(0, guest_bytes, guest_.map.data());
        iommu::TranslationView translation_view;
        must(iommu::TranslationView::open(translation_.map.data(), translation_.map.size(), tables_.map.data(),
                                          tables_.map.size(), translation_view));
        dma_ = std::make_unique<iommu::DmaThread<iommu::AmdV1>>(translation_view, memory_, threads(), 0);

        for (std::uint64_t at = 0; at < memory_bytes_; at += guest_bytes) {
            DoneOp map;
            map.kind = service::ShardOp::Kind::map;
            map.start = at;
            map.end = std::min(at + guest_bytes, memory_bytes_);
            map.rights = {true, true};
            run(map);
        }
        DoneOp enable;
        enable.kind = service::ShardOp::Kind::enable;
        run(enable);
    }

    void run(DoneOp &op)
    {
        shard_->submit(op);
        while (!op.finished)
            shard_->step(++now_);
    }

    // One step at this time, and what it published is taken.
    void step_and_consume(std::uint64_t now_ns)
    {
        shard_->step(now_ns);
        for (auto entries = consumer_->peek(); !entries.empty(); entries = consumer_->peek())
            (void)consumer_->release(entries.size());
    }

    // Steps until a round finds nothing; how many pages the consumer read. min_interval 0: paced by its releases.
    std::uint64_t sweep_and_consume()
    {
        std::uint64_t pages = 0;
        sweep_and_visit([&](std::uint64_t, std::uint64_t n) { pages += n; });
        return pages;
    }

    // The same; each(first page, pages) for each run.
    template <class Each> void sweep_and_visit(Each each)
    {
        for (;;) {
            const bool worked = shard_->step(++now_);
            for (auto entries = consumer_->peek(); !entries.empty(); entries = consumer_->peek()) {
                for (const std::uint64_t entry : entries)
                    each(dr_run_address(entry) >> DR_PAGE_LG2, dr_run_length(entry) >> DR_PAGE_LG2);
                (void)consumer_->release(entries.size());
            }
            if (!worked)
                return;
        }
    }

    // Steps until the consumer sees a run, and takes it.
    void step_until_published()
    {
        auto entries = consumer_->peek();
        for (; entries.empty(); entries = consumer_->peek())
            shard_->step(++now_);
        (void)consumer_->release(entries.size());
    }

    // Makes the page dirty as a device does, by a write of 8 bytes.
    void dirty(std::uint64_t iova)
    {
        const std::uint64_t data = iova;
        dma_->enter();
        if (dma_->write(iova, &data, sizeof data).reason != iommu::FaultReason::none)
            std::abort();
        (void)dma_->leave();
    }

    // The same without data and without an IOTLB, so that what was swept by somebody else than our walker can be
    // dirtied again.
    void mark_dirty(std::uint64_t page)
    {
        const std::uint64_t table = first_leaf_table() + page / iommu::table_entries;
        const auto entry = static_cast<unsigned>(page % iommu::table_entries);
        const iommu::Tables view = tables();
        std::atomic_ref(view.entries(table)[entry])
            .fetch_or(iommu::AmdV1::accessed_bit | iommu::AmdV1::dirty_bit, std::memory_order_seq_cst);
        (void)iommu::mark_line(view, table, entry);
    }

    // 8 entries, without the summary.
    void make_line_clean(std::uint64_t line)
    {
        std::uint64_t *entries = tables().entries(first_leaf_table()) + line * iommu::line_entries;
        for (unsigned i = 0; i < iommu::line_entries; ++i)
            entries[i] &= ~iommu::AmdV1::dirty_bit;
    }

    // The whole of it, whatever the summary says.
    void owe_full_scan()
    {
        shard_->bury(threads(), [] {});
        shard_->add(threads());
    }

    service::Shard &shard() { return *shard_; }
    iommu::DmaThread<iommu::AmdV1> &dma() { return *dma_; }
    [[nodiscard]] std::uint64_t pages() const { return memory_bytes_ >> DR_PAGE_LG2; }
    std::uint64_t tick() { return ++now_; }

    // ---- for peers that go over the same tables

    [[nodiscard]] const dr_translation_header &geometry() const { return h_; }
    [[nodiscard]] iommu::Tables tables() const { return {tables_.map.data(), h_}; }

    // Of shared memory that is there besides table pages and the ring.
    [[nodiscard]] std::uint64_t tracking_bytes() const
    {
        std::uint64_t tables = 0;
        for (unsigned level = 0; level <= h_.root_level; ++level)
            tables += iommu::covering(h_.aperture_lg2, iommu::entry_lg2(level + 1));
        return present(tables_) - (tables << iommu::table_size_lg2) + present(translation_) + present(record_);
    }

  private:
    static std::uint64_t present(const ring::Region &region)
    {
        struct stat status {
        };
        ::fstat(region.fd.get(), &status);
        return static_cast<std::uint64_t>(status.st_blocks) * 512;
    }

    [[nodiscard]] iommu::DmaThreads threads() const
    {
        return {{cells_.map.as<dr_cell>(), 1}, {cells_.map.as<dr_pin>(sizeof(dr_cell)), pins_}};
    }

    [[nodiscard]] std::uint64_t first_leaf_table() const
    {
        return iommu::first_table(h_, 0) + iommu::first_number(h_.slice_lg2, 0);
    }

    static void must(int error)
    {
        if (error != 0)
            throw std::system_error(-error, std::generic_category(), "benchmark hwpt");
    }

    static constexpr std::uint64_t guest_bytes = 1ull << 30;

    dr_translation_header h_;
    ring::Region tables_;
    ring::Region record_;
    ring::Region translation_;
    ring::Region producer_;
    ring::Region consumer_region_;
    ring::Region cells_;
    ring::Region guest_;
    iommu::GuestMemory memory_;
    std::uint64_t memory_bytes_;
    std::size_t pins_;
    std::unique_ptr<service::Shard> shard_;
    std::unique_ptr<ring::Consumer<std::uint64_t>> consumer_;
    std::unique_ptr<iommu::DmaThread<iommu::AmdV1>> dma_;
    std::uint64_t now_ = 0;
};

} // namespace dirtyring::perf
