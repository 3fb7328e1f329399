#include "tests/engine/rig.hpp"

#include "iommu/slice.hpp"
#include "ring/producer.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <sys/stat.h>

namespace dirtyring::test {

namespace {

constexpr unsigned patience = 100'000; // steps without end

void must(bool good, const char *what)
{
    if (!good) {
        std::fprintf(stderr, "rig: %s: %s\n", what, std::strerror(errno));
        std::abort();
    }
}

// The levels that were asked for, or as few as the format and the aperture allow.
unsigned levels_of(const RigOptions &options)
{
    return iommu::with_format(options.format, [&](auto f) {
        const unsigned fewest = std::max(unsigned{f.levels_min}, iommu::levels_needed(options.aperture_lg2));
        return options.levels == 0 ? fewest : options.levels;
    });
}

} // namespace

Memory::Memory(std::uint64_t size) : size_(size)
{
    void *base = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    must(base != MAP_FAILED, "mmap");
    data_ = static_cast<std::byte *>(base);
}

Memory::~Memory()
{
    ::munmap(data_, size_);
}

// Most of a test's time goes by here, and there is nothing else to see: whoever calls has looked where they copy, in
// memory of mmap's, around which ASan has no red zones.
#define DR_UNWATCHED __attribute__((no_sanitize("thread", "address", "undefined")))

// volatile: a loop over it does not become a call of memcpy, which TSan would look into.
DR_UNWATCHED std::uint64_t peek_word(const std::byte *at)
{
    return *reinterpret_cast<const volatile std::uint64_t *>(at);
}

DR_UNWATCHED bool copy_page(std::byte *to, const std::byte *from)
{
    const auto *in = reinterpret_cast<const volatile std::uint64_t *>(from);
    auto *out = reinterpret_cast<volatile std::uint64_t *>(to);
    bool differed = false;
    for (std::uint64_t i = 0; i < page_size / sizeof(std::uint64_t); ++i) {
        const std::uint64_t word = in[i];
        if (word != out[i]) {
            out[i] = word;
            differed = true;
        }
    }
    return differed;
}

Pin make_pin(Device &device, std::uint64_t iova, std::uint64_t length, bool write)
{
    Pin made;
    made.write = write;
    device.enter();
    made.error = device.pin(iova, length, write, made.slot, made.fault,
                            [&](std::byte *host, std::uint64_t n) { made.pieces.emplace_back(host, n); });
    made.bells = device.leave();
    return made;
}

Rig::Rig(const RigOptions &options)
    : geometry(iommu::make_geometry(options.format, options.aperture_lg2, options.shards, levels_of(options))),
      source(options.memory), destination(options.memory), options_(options), shards_(options.shards),
      retained_(options.shards, geometry.slice_lg2)
{
    deliver = [this](Op &op) { shard(op.shard).submit(op); };
    must(tables_region_.make("tables", geometry.tables_size, ring::Pages::sparse) == 0, "tables");
    must(translation_region_.make("translation", geometry.translation_size, ring::Pages::sparse) == 0, "translation");
    must(cells_region_.make("cells", options.devices * (sizeof(dr_cell) + options.pins * sizeof(dr_pin)),
                            ring::Pages::present) == 0,
         "cells");

    const iommu::Tables tables(tables_region_.map.data(), geometry);
    iommu::with_format(options.format, [&](auto f) { iommu::make_top_tables<decltype(f)>(geometry, tables); });
    std::memcpy(translation_region_.map.data(), &geometry, sizeof geometry);
    must(iommu::TranslationView::open(translation_region_.map.data(), geometry.translation_size,
                                      tables_region_.map.data(), geometry.tables_size, view) == 0,
         "geometry");
    must(guest.add(0, options.memory, source.data()), "guest memory");

    auto *controls = translation_region_.map.as<dr_shard_control>(geometry.shard_controls);
    for (unsigned i = 0; i < options.shards; ++i) {
        PerShard &s = shards_[i];
        controls[i].first_table = iommu::first_table(geometry, i);
        must(s.producer_region.make("producer", ring::producer_region_size(options.capacity, 8),
                                    ring::Pages::present) == 0,
             "ring");
        must(s.consumer_region.make("consumer", sizeof(dr_ring_consumer), ring::Pages::present) == 0, "ring");
        auto *producer = s.producer_region.map.as<dr_ring_producer>();
        auto *consumer = s.consumer_region.map.as<dr_ring_consumer>();
        dr_ring_header header{};
        header.kind = DR_RING_DIRTY;
        header.capacity = options.capacity;
        header.entry_size = 8;
        header.space = options.space;
        header.start = std::uint64_t{i} << geometry.slice_lg2;
        header.last = header.start + (1ull << geometry.slice_lg2) - 1;
        ring::make_producer_region(producer, header);
        consumer->armed = DR_DISARMED;
        s.consumer.emplace(consumer, producer, options.capacity);

        must(s.record.make("record", iommu::SliceRecord::size(geometry), ring::Pages::sparse) == 0, "record");
        make_shard(i, false);
    }
    for (unsigned i = 0; i < options.devices; ++i) {
        devices_.push_back(std::make_unique<Device>(view, guest, threads(i), 0));
        attach(i);
    }
}

void Rig::make_shard(unsigned i, bool restored)
{
    PerShard &s = shards_[i];
    service::ShardConfig config;
    config.tables = iommu::Tables(tables_region_.map.data(), geometry);
    config.geometry = geometry;
    config.index = i;
    config.control = translation_region_.map.as<dr_shard_control>(geometry.shard_controls) + i;
    config.generations = translation_region_.map.as<std::uint64_t>(geometry.generations);
    config.leaves = {options_.leaf_lg2_max, options_.all_sizes, options_.collapse, options_.split, options_.how};
    config.visit = options_.visit;
    config.producer = options_.tracked ? s.producer_region.map.as<dr_ring_producer>() : nullptr;
    config.consumer = options_.tracked ? s.consumer_region.map.as<dr_ring_consumer>() : nullptr;
    config.min_interval_ns = options_.min_interval_ns;
    const auto there = [this](ring::Region &region) {
        return [this, &region](std::uint64_t offset, std::uint64_t length) {
            if (present_steps == 0)
                return -ENOSPC;
            present_steps -= present_steps == UINT64_MAX ? 0 : 1;
            return region.make_present(offset, length);
        };
    };
    config.backing = {there(tables_region_),
                      [this](std::uint64_t offset, std::uint64_t length) { tables_region_.give_back(offset, length); },
                      [this](std::uint64_t offset) {
                          static_cast<void>(tables_region_.make_large(offset));
                          large_tables_.push_back(offset);
                      }};
    config.record = {s.record.map.data(), geometry, there(s.record)};
    config.restored = restored;
    config.stall_ns = options_.stall_ns;
    config.stalled = [&s](const dr_cell *cell) { s.stalled.push_back(cell); };
    config.call = [&s] { ++s.calls; };
    config.always_on = options_.always_on;
    s.shard = service::make_shard(options_.format, std::move(config));
    must(s.shard != nullptr, "format");
}

void Rig::restart(unsigned i)
{
    make_shard(i, true);
    const std::set<unsigned> dying = state(i).dying; // their cells are kept until all is reported
    for (unsigned d = 0; d < devices_.size(); ++d) {
        if (attached_.contains(d) || dying.contains(d))
            shard(i).add(threads(d));
        if (dying.contains(d))
            bury_at(i, d);
    }
    for (Op &op : ops_) {
        if (op.shard != i || op.over())
            continue;
        op.again = true;
        deliver(op);
    }
}

bool Rig::step_all()
{
    bool worked = false;
    for (unsigned i = 0; i < shards(); ++i)
        worked |= step(i);
    return worked;
}

bool Rig::settle()
{
    for (unsigned i = 0; i < patience; ++i) {
        if (!step_all())
            return true;
    }
    return false;
}

// ---- operations

template <class Visit> void Rig::for_slices(std::uint64_t iova, std::uint64_t length, Visit visit) const
{
    for (std::uint64_t at = iova, end = iova + length; at < end;) {
        const std::uint64_t upto = std::min(end, ((at >> geometry.slice_lg2) + 1) << geometry.slice_lg2);
        visit(at, upto - at);
        at = upto;
    }
}

template <class Over> bool Rig::wait_for(Over over)
{
    for (unsigned i = 0; !over(); ++i) {
        if (proceed ? !proceed() : i == patience)
            return false;
        if (!proceed)
            step_all();
    }
    return true;
}

Op &Rig::submit(unsigned shard, OpKind kind)
{
    Op &op = ops_.emplace_back();
    op.kind = kind;
    op.shard = shard;
    op.cookie = cookie;
    deliver(op);
    return op;
}

Op &Rig::submit_map(std::uint64_t iova, std::uint64_t length, std::uint64_t oa, iommu::Rights rights)
{
    Op &op = ops_.emplace_back();
    op.kind = OpKind::map;
    op.shard = shard_of(iova);
    op.start = iova;
    op.end = iova + length;
    op.oa = oa;
    op.rights = rights;
    retained_.map(iova, length, oa);
    deliver(op);
    return op;
}

Op &Rig::submit_unmap(std::uint64_t iova, std::uint64_t length, Harvest harvest)
{
    Op &op = ops_.emplace_back();
    op.kind = OpKind::unmap;
    op.harvest = harvest;
    op.shard = shard_of(iova);
    op.start = iova;
    op.end = iova + length;
    op.epoch = options_.space == DR_SPACE_IOVA ? ++epoch : 0;
    deliver(op);
    return op;
}

Op &Rig::submit_resize(OpKind kind, std::uint64_t iova, std::uint64_t length, unsigned lg2)
{
    Op &op = ops_.emplace_back();
    op.kind = kind;
    op.shard = shard_of(iova);
    op.start = iova;
    op.end = iova + length;
    op.leaf_lg2 = lg2;
    deliver(op);
    return op;
}

void Rig::note_mapped(const Op &op)
{
    ioas.insert({op.start, op.end, op.oa, op.rights});
}

void Rig::note_unmapped(const Op &op)
{
    ioas.erase(op.start, op.reached);
    retained_.unmapped(op.start, op.reached - op.start, op.told_epoch());
}

bool Rig::run(const Op &op, bool draining)
{
    return wait_for([&] {
        if (draining)
            drain(op.shard);
        return op.over();
    });
}

int Rig::map(std::uint64_t iova, std::uint64_t length, std::uint64_t oa, iommu::Rights rights)
{
    int result = 0;
    for_slices(iova, length, [&](std::uint64_t at, std::uint64_t n) {
        if (result != 0)
            return;
        const Op &op = submit_map(at, n, oa + (at - iova), rights);
        result = run(op) ? op.result : -ETIMEDOUT;
        if (result == 0)
            note_mapped(op);
    });
    return result;
}

int Rig::unmap(std::uint64_t iova, std::uint64_t length, Harvest harvest)
{
    int result = 0;
    for_slices(iova, length, [&](std::uint64_t at, std::uint64_t n) {
        const std::uint64_t end = at + n;
        unsigned tries = 0;
        do {
            const Op &op = submit_unmap(at, end - at, harvest);
            result = run(op) ? op.result : -ETIMEDOUT;
            note_unmapped(op);
            at = op.reached;
            drain(op.shard);
        } while (result == -EAGAIN && ++tries < 10'000);
    });
    return result;
}

int Rig::resize(OpKind kind, std::uint64_t iova, std::uint64_t length, unsigned lg2)
{
    int result = 0;
    for_slices(iova, length, [&](std::uint64_t at, std::uint64_t n) {
        const Op &op = submit_resize(kind, at, n, lg2);
        if (result == 0)
            result = run(op) ? op.result : -ETIMEDOUT;
    });
    return result;
}

int Rig::enable()
{
    for (unsigned i = 0; i < shards(); ++i) {
        if (const Op &op = submit(i, OpKind::enable); !run(op))
            return -ETIMEDOUT;
    }
    copy_all();
    return 0;
}

int Rig::disable()
{
    for (unsigned i = 0; i < shards(); ++i) {
        if (const Op &op = submit(i, OpKind::disable); !run(op))
            return -ETIMEDOUT;
    }
    return 0;
}

int Rig::sync()
{
    ++cookie;
    std::vector<const Op *> ops;
    for (unsigned i = 0; i < shards(); ++i)
        ops.push_back(&submit(i, OpKind::sync));
    const bool over = wait_for([&] {
        drain();
        return std::all_of(ops.begin(), ops.end(),
                           [&](const Op *op) { return op->over() && state(op->shard).synced == cookie; });
    });
    return over ? 0 : -ETIMEDOUT;
}

// ---- consumer

std::uint64_t Rig::drain(unsigned shard, std::uint64_t max)
{
    std::uint64_t n = 0;
    ring::Consumer<std::uint64_t> &c = consumer(shard);
    max = std::min(max, options_.capacity); // a walker may refill it as fast as it is read
    while (n < max) {
        const auto entries = c.peek(max - n);
        if (entries.empty())
            break;
        for (const std::uint64_t e : entries)
            take(shard, e);
        n += entries.size();
        if (c.release(entries.size()))
            kicked |= 1ull << shard;
    }
    return n;
}

std::uint64_t Rig::drain()
{
    std::uint64_t n = 0;
    for (unsigned i = 0; i < shards(); ++i)
        n += drain(i);
    return n;
}

void Rig::take(unsigned shard, std::uint64_t entry)
{
    if (logging)
        log.push_back(entry);
    if (dr_is_marker(entry)) {
        switch (dr_marker_kind(entry)) {
        case DR_MARKER_SYNC:
            state(shard).synced = dr_marker_payload(entry);
            break;
        case DR_MARKER_EPOCH:
            state(shard).passed = dr_marker_payload(entry);
            retained_.passed(shard, dr_marker_payload(entry));
            break;
        case DR_MARKER_END:
            state(shard).ended = true;
            break;
        default:
            ++stray;
        }
        return;
    }
    ++runs;
    if (options_.space == DR_SPACE_OA) {
        copy(dr_run_address(entry), dr_run_length(entry));
    } else if (!retained_.translate(shard, dr_run_address(entry), dr_run_length(entry),
                                    [&](std::uint64_t oa, std::uint64_t length) { copy(oa, length); })) {
        ++stray;
    }
}

void Rig::copy(std::uint64_t oa, std::uint64_t length)
{
    if (oa >= source.size() || length > source.size() - oa) {
        ++stray;
        return;
    }
    for (std::uint64_t at = oa; at < oa + length; at += page_size) {
        ++pages_reported;
        over_reported += copy_page(destination.data() + at, source.data() + at) ? 0 : 1;
    }
}

void Rig::copy_all()
{
    for (const std::uint64_t oa : written_)
        copy_page(destination.data() + oa, source.data() + oa);
}

// ---- devices

iommu::DmaThreads Rig::threads(unsigned device)
{
    return {{cells_region_.map.as<dr_cell>() + device, 1},
            {cells_region_.map.as<dr_pin>(options_.devices * sizeof(dr_cell)) + device * options_.pins, options_.pins}};
}

iommu::DmaFault Rig::write_inside(unsigned device, std::uint64_t iova, std::uint64_t length)
{
    for (std::uint64_t at = iova; at < iova + length;) { // noted before: a test may change the map while it goes on
        const auto e = ioas.first_in(at, iova + length);
        if (!e)
            break;
        for (at = std::max(at, e->start); at < std::min(e->end, iova + length); at = (at / page_size + 1) * page_size)
            written_.insert((e->oa + (at - e->start)) / page_size * page_size);
    }
    std::vector<std::uint64_t> data((length + 7) / 8, 0);
    for (std::uint64_t &word : data)
        word = ++stamp_;
    return this->device(device).write(iova, data.data(), length);
}

iommu::DmaFault Rig::write(unsigned device, std::uint64_t iova, std::uint64_t length)
{
    this->device(device).enter();
    const iommu::DmaFault fault = write_inside(device, iova, length);
    rung |= this->device(device).leave();
    return fault;
}

iommu::DmaFault Rig::read(unsigned device, std::uint64_t iova, std::uint64_t length)
{
    buffer_.resize((length + 7) / 8);
    this->device(device).enter();
    const iommu::DmaFault fault = this->device(device).read(iova, buffer_.data(), length);
    rung |= this->device(device).leave();
    return fault;
}

Pin Rig::pin(unsigned device, std::uint64_t iova, std::uint64_t length, bool write)
{
    Pin made = make_pin(this->device(device), iova, length, write);
    rung |= made.bells;
    return made;
}

void Rig::land(const Pin &pin)
{
    for (const std::span<std::byte> piece : pin.pieces) {
        const auto oa = static_cast<std::uint64_t>(piece.data() - source.data());
        for (std::uint64_t at = oa / page_size * page_size; at < oa + piece.size(); at += page_size)
            written_.insert(at);
        for (std::uint64_t at = 0; at + sizeof stamp_ <= piece.size(); at += sizeof stamp_) { // of any alignment
            ++stamp_;
            std::memcpy(piece.data() + at, &stamp_, sizeof stamp_);
        }
    }
}

iommu::DmaFault Rig::unpin(unsigned device, const Pin &pin)
{
    this->device(device).enter();
    const iommu::DmaFault fault = this->device(device).unpin(pin.slot);
    rung |= this->device(device).leave();
    return fault;
}

void Rig::attach(unsigned device)
{
    attached_.insert(device);
    for (PerShard &s : shards_)
        s.shard->add(threads(device));
}

void Rig::detach(unsigned device)
{
    attached_.erase(device);
    for (PerShard &s : shards_)
        s.shard->remove(threads(device));
}

void Rig::detach_in_vain(unsigned device)
{
    detach(device);
    attached_.insert(device);
}

void Rig::bury(unsigned device)
{
    attached_.erase(device);
    for (unsigned i = 0; i < shards(); ++i)
        bury_at(i, device);
}

void Rig::bury_at(unsigned i, unsigned device)
{
    shards_[i].dying.insert(device);
    shard(i).bury(threads(device), [this, i, device] { shards_[i].dying.erase(device); });
}

// ---- oracle

std::uint64_t Rig::lost() const
{
    std::uint64_t n = 0;
    for (const std::uint64_t oa : written_)
        n += std::memcmp(source.data() + oa, destination.data() + oa, page_size) != 0 ? 1 : 0;
    return n;
}

std::uint64_t Rig::tables_bytes() const
{
    struct stat status;
    must(::fstat(tables_region_.fd.get(), &status) == 0, "fstat");
    return static_cast<std::uint64_t>(status.st_blocks) * 512;
}

std::uint64_t *Rig::entry(std::uint64_t iova, unsigned level) const
{
    std::uint64_t table = geometry.root;
    for (unsigned l = geometry.root_level; l > level; --l) {
        const iommu::Entry e = decode(view.tables().entries(table)[iommu::entry_index(iova, l)], l);
        if (e.kind != iommu::EntryKind::table)
            return nullptr;
        table = e.address;
    }
    return view.tables().entries(table) + iommu::entry_index(iova, level);
}

Rig::Walked Rig::leaf(std::uint64_t iova) const
{
    for (unsigned level = 0; level <= std::min(geometry.root_level, iommu::leaf_level_max); ++level) {
        const std::uint64_t *e = entry(iova, level);
        if (e != nullptr && decode(*e, level).kind == iommu::EntryKind::leaf)
            return {*e, decode(*e, level)};
    }
    return {};
}

bool Rig::is_dirty(std::uint64_t iova) const
{
    return iommu::with_format(options_.format, [&](auto f) { return f.dirty(leaf(iova).entry); });
}

bool Rig::is_accessed(std::uint64_t iova) const
{
    const std::uint64_t entry = leaf(iova).entry;
    return iommu::with_format(options_.format, [&](auto f) { return f.accessed(entry, false) == entry; });
}

std::uint64_t Rig::translates_to(std::uint64_t iova) const
{
    const iommu::Entry e = leaf(iova).leaf;
    return e.address + (iova & ((1ull << e.lg2) - 1));
}

iommu::Entry Rig::decode(std::uint64_t entry, unsigned level) const
{
    return iommu::with_format(options_.format, [&](auto f) { return f.decode(entry, level); });
}

std::string Rig::describe()
{
    std::string text = "cookie " + std::to_string(cookie);
    for (unsigned i = 0; i < shards(); ++i) {
        const auto *p = reinterpret_cast<const std::byte *>(producer_memory(i));
        text += "; shard " + std::to_string(i) + ": synced " + std::to_string(state(i).synced) + ", tail " +
                std::to_string(consumer(i).tail()) + ", head " +
                std::to_string(peek_word(p + offsetof(dr_ring_producer, head))) + ", staged " +
                std::to_string(peek_word(p + offsetof(dr_ring_producer, staged))) + ", want_kick " +
                std::to_string(peek_word(p + offsetof(dr_ring_producer, want_kick)));
    }
    return text;
}

// ---- sleep

void SleepyWalker::wake()
{
    for (unsigned i = 0; i < rig_.shards(); ++i)
        rig_.shard(i).wake();
    rig_.kicked = 0;
    rig_.rung = 0;
}

bool SleepyWalker::prepare()
{
    bool busy = false;
    until_ = UINT64_MAX;
    for (unsigned i = 0; i < rig_.shards(); ++i) {
        const service::Rest rest = rig_.shard(i).prepare_sleep(rig_.now);
        busy |= rest.busy;
        until_ = std::min(until_, rest.until_ns);
    }
    return !busy;
}

bool SleepyWalker::run()
{
    for (unsigned i = 0; i < patience; ++i) {
        wake();
        if (!rig_.settle())
            return false;
        if (prepare())
            return true;
    }
    return false;
}

bool SleepyWalker::run_until_idle()
{
    for (unsigned i = 0; i < 1000; ++i) {
        if (rig_.kicked == 0 && rig_.rung == 0) {
            if (until_ == UINT64_MAX)
                return true;
            rig_.now = std::max(rig_.now, until_);
        }
        if (!run())
            return false;
    }
    return false;
}

} // namespace dirtyring::test
