#include "client/check/played_service_hwpt.hpp"

#include <algorithm>
#include <random>

namespace dirtyring::check {
namespace {

using iommu::AmdV1;

constexpr std::uint64_t leaves_per_table = iommu::table_entries;
constexpr std::uint64_t gib = 1ull << 30;

std::uint64_t load(std::uint64_t &w)
{
    return word(w).load(std::memory_order_seq_cst);
}

} // namespace

PlayedHwpt::PlayedHwpt(Stage &stage, Leaves leaves)
    : PlayedService(stage), leaves_(leaves), geometry_(iommu::make_geometry(DR_FORMAT_AMDV1, 31, 2))
{
    const std::uint64_t memory = leaves == Leaves::small ? pages * page : gib;
    must(tables_.make("tables", geometry_.tables_size, ring::Pages::sparse), "tables");
    must(translation_.make("translation", geometry_.translation_size, ring::Pages::present), "a translation region");
    must(memory_.make("guest-memory", memory, ring::Pages::sparse), "the guest's memory");
    for (std::uint32_t shard = 0; shard < geometry_.shards; ++shard)
        bells_.push_back(event());
    build(leaves);
    header() = geometry_;
    control().context = AmdV1::context(true);
    for (std::uint64_t i = 0; i < gib >> DR_REGION_LG2; ++i)
        generation(i) = 1000 + i;

    std::mt19937_64 random(1);
    std::string token;
    for (std::uint8_t &byte : expected_.token) {
        byte = static_cast<std::uint8_t>(random());
        token += fmt::format("{:02x}", byte);
    }
    expected_.hwpt = 2;
    placeholders = {{"{token}", token}, {"{hwpt}", "2"}};
}

void PlayedHwpt::build(Leaves leaves)
{
    const iommu::Tables t = tables();
    first_ = iommu::first_table(geometry_, 0) + iommu::first_number(geometry_.slice_lg2, 1);
    constexpr iommu::Rights both{true, true};
    if (leaves == Leaves::one_of_1_gib) {
        root() = AmdV1::leaf(oa_base, iommu::largest_leaf_lg2, both);
        return;
    }
    root() = AmdV1::table(first_, 1);
    for (std::uint64_t i = 0; i < pages / leaves_per_table; ++i) {
        t.entries(first_)[i] = AmdV1::table(first_ + 1 + i, 0);
        for (std::uint64_t n = 0; n < leaves_per_table; ++n)
            t.entries(first_ + 1 + i)[n] =
                AmdV1::leaf(oa_base + (i * leaves_per_table + n) * page, iommu::granule_lg2, both);
    }
}

// ---- requests -------------------------------------------------------------------------------------------------------

Answer PlayedHwpt::answer(Request &request)
{
    if (request.number == DR_DEVICE_ATTACH)
        return attach(request.as<dr_device_attach>());
    if (request.number != DR_DEVICE_DETACH || kind != Kind::device)
        throw Refuse{EPROTO, "this request is for connections of another kind"};
    const auto slots_now = slots();
    if (inside() || std::any_of(slots_now.begin(), slots_now.end(), [](auto &p) { return (load(p.count) & 1) != 0; }))
        throw Refuse{EBUSY, "a thread is inside a section or holds a pin"};
    changed_at_detach_ = differing();
    remember(changed_at_detach_);
    detached = true;
    kind = Kind::greeted;
    return answer_of(dr_empty{});
}

Answer PlayedHwpt::attach(const dr_device_attach &request)
{
    if (kind != Kind::greeted || threads != 0)
        throw Refuse{EBUSY, "a device has attached already"};
    if (std::memcmp(request.token, expected_.token, sizeof request.token) != 0)
        throw Refuse{EACCES, "no guest has this token"};
    if (request.hwpt != expected_.hwpt)
        throw Refuse{ENOENT, "no such hwpt"};
    if (request.threads == 0 || request.threads > DR_DEVICE_THREADS_MAX ||
        request.pins > DR_DEVICE_PINS_MAX / request.threads || (request.flags & DR_DEVICE_CAN_TRACK) == 0 ||
        (request.formats & DR_FORMAT_BIT(DR_FORMAT_AMDV1)) == 0 || request.name[0] == '\0')
        throw Refuse{EINVAL, "expected 1 to 64 threads, at most 4096 pins, DR_DEVICE_CAN_TRACK, a device that walks "
                             "amdv1, and a name"};
    threads = request.threads;
    pins = request.pins;
    kind = Kind::device;
    must(cells_.make("cells", threads * (sizeof(dr_cell) + pins * sizeof(dr_pin)), ring::Pages::present), "cells");
    dr_device device{};
    device.id = 3;
    device.shards = geometry_.shards;
    device.regions = 1;
    device.region[0] = {oa_base, memory_.map.size(), 0};
    std::vector<Fd> fds;
    fds.push_back(copy_of(tables_.fd));
    fds.push_back(read_only(translation_));
    fds.push_back(copy_of(cells_.fd));
    for (const Fd &bell : bells_)
        fds.push_back(copy_of(bell));
    fds.push_back(copy_of(memory_.fd));
    return answer_of(device, std::move(fds));
}

void PlayedHwpt::start_and_attach()
{
    start();
    if (!comes([&] { return threads != 0; }))
        throw Broken(fmt::format("the program did not attach; {}; {}", last_request(), subject.state()));
}

// ---- what is shared -------------------------------------------------------------------------------------------------

dr_shard_control &PlayedHwpt::control(unsigned shard) const
{
    return translation_.map.as<dr_shard_control>(geometry_.shard_controls)[shard];
}

std::uint64_t &PlayedHwpt::generation(std::uint64_t region) const
{
    return translation_.map.as<std::uint64_t>(geometry_.generations)[region];
}

unsigned PlayedHwpt::leaf_index(std::uint64_t page_number) const
{
    return leaves_ == Leaves::small ? static_cast<unsigned>(page_number % leaves_per_table) : 0;
}

std::uint64_t &PlayedHwpt::leaf(std::uint64_t page_number) const
{
    if (leaves_ == Leaves::one_of_1_gib)
        return root();
    return tables().entries(first_ + 1 + page_number / leaves_per_table)[leaf_index(page_number)];
}

std::uint64_t PlayedHwpt::summary_word(std::uint64_t page_number) const
{
    return leaves_ == Leaves::small ? first_ + 1 + page_number / leaves_per_table : iommu::first_table(geometry_, 0);
}

std::span<dr_pin> PlayedHwpt::slots() const
{
    return {cells_.map.as<dr_pin>(threads * sizeof(dr_cell)), std::size_t{threads} * pins};
}

bool PlayedHwpt::inside() const
{
    const auto all = cells();
    return std::any_of(all.begin(), all.end(), [](dr_cell &c) { return (load(c.count) & 1) != 0; });
}

bool PlayedHwpt::dirty(std::uint64_t page_number) const
{
    return AmdV1::dirty(load(leaf(page_number)));
}

bool PlayedHwpt::line_bit(std::uint64_t page_number) const
{
    const std::uint64_t bits = load(tables().line_word(summary_word(page_number)));
    return (bits >> leaf_index(page_number) / iommu::line_entries & 1) != 0;
}

bool PlayedHwpt::table_bit(std::uint64_t page_number) const
{
    const std::uint64_t w = summary_word(page_number);
    return (load(tables().table_bits(w / 64)) >> w % 64 & 1) != 0;
}

bool PlayedHwpt::any_table_bit() const
{
    for (std::uint64_t i = 0; i < geometry_.tables / 64; ++i) {
        if (load(tables().table_bits(i)) != 0)
            return true;
    }
    return false;
}

void PlayedHwpt::fill_summary() const
{
    for (std::uint64_t p = 0; p < pages; p += iommu::line_entries)
        iommu::mark_line(tables(), summary_word(p), leaf_index(p));
}

bool PlayedHwpt::entries_touched() const
{
    constexpr std::uint64_t bits = AmdV1::accessed_bit | AmdV1::dirty_bit;
    std::uint64_t seen = load(root());
    for (std::uint64_t p = 0; p < pages && leaves_ == Leaves::small; ++p)
        seen |= load(leaf(p)) | load(tables().entries(first_)[p / leaves_per_table]);
    return (seen & bits) != 0;
}

std::uint64_t PlayedHwpt::sections() const
{
    std::uint64_t n = 0;
    for (dr_cell &cell : cells())
        n += load(cell.count);
    return n;
}

bool PlayedHwpt::has_pinned() const
{
    const auto all = slots();
    return std::any_of(all.begin(), all.end(), [](dr_pin &p) { return load(p.count) != 0; });
}

bool PlayedHwpt::gave_back() const
{
    const auto all = slots();
    return std::any_of(all.begin(), all.end(), [](dr_pin &p) { return load(p.count) > 1; });
}

bool PlayedHwpt::pinned(std::uint64_t page_number) const
{
    const auto all = slots();
    return std::any_of(all.begin(), all.end(), [&](dr_pin &p) {
        const std::uint64_t count = load(p.count);
        const bool covers = load(p.start) / page <= page_number && page_number <= load(p.last) / page;
        return (count & 1) != 0 && covers && load(p.write) != 0 && load(p.count) == count;
    });
}

// ---- as the service does --------------------------------------------------------------------------------------------

void PlayedHwpt::clean() const
{
    const iommu::Tables t = tables();
    for (std::uint64_t i = 0; i < geometry_.tables / 64; ++i)
        iommu::take_bits(t.table_bits(i));
    for (std::uint64_t p = 0; p < pages; p += leaves_per_table)
        iommu::take_bits(t.line_word(summary_word(p)));
    for (std::uint64_t p = 0; p < pages; ++p) {
        if (dirty(p))
            AmdV1::make_clean(leaf(p));
    }
}

void PlayedHwpt::advance() const
{
    for (std::uint64_t i = 0; i < gib >> DR_REGION_LG2; ++i)
        iommu::advance(generation(i));
}

void PlayedHwpt::grace()
{
    std::vector<iommu::SampledCell> sampled;
    for (dr_cell &cell : cells())
        sampled.emplace_back(&cell);
    const auto passed = [&] {
        return std::all_of(sampled.begin(), sampled.end(), [](const auto &c) { return c.passed(); });
    };
    if (passed())
        return;
    const bool still = subject.still();
    subject.go_on();
    const bool over = comes(passed) || subject.ended();
    context_.need(over, "D-13", "a section", fmt::format("its cell stays odd: {}", context_.nothing()), "it ends");
    if (still)
        subject.hold_still();
}

void PlayedHwpt::sweep()
{
    clean();
    advance();
    grace();
    remember(changed());
}

// ---- what the program does ------------------------------------------------------------------------------------------

void PlayedHwpt::burst(std::chrono::microseconds time)
{
    subject.go_on();
    serve_for(time);
    subject.hold_still();
    serve();
}

// Memory is sparse: what nobody has touched costs nothing.
Pages PlayedHwpt::differing() const
{
    Pages all;
    const auto next = [&](std::uint64_t p, int whence) {
        const off_t at = ::lseek(memory_.fd.get(), static_cast<off_t>(p * page), whence);
        return at < 0 ? pages : std::min(pages, static_cast<std::uint64_t>(at) / page);
    };
    for (std::uint64_t p = next(0, SEEK_DATA); p < pages; p = next(p, SEEK_DATA)) {
        for (const std::uint64_t end = next(p, SEEK_HOLE); p < end; ++p) {
            if (std::memcmp(memory_.map.data() + p * page, remembered(p).data(), page) != 0)
                all.insert(all.end(), p);
        }
    }
    std::atomic_thread_fence(std::memory_order_seq_cst); // what is loaded now is not older
    return all;
}

const PlayedHwpt::Content &PlayedHwpt::remembered(std::uint64_t page_number) const
{
    static constexpr Content zeroes{};
    const auto found = remembered_.find(page_number);
    return found == remembered_.end() ? zeroes : found->second;
}

void PlayedHwpt::remember(const Pages &changed)
{
    if (detached)
        return changed_at_detach_.clear();
    for (const std::uint64_t p : changed)
        std::memcpy(remembered_[p].data(), memory_.map.data() + p * page, page);
}

} // namespace dirtyring::check
