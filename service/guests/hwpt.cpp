#include "service/guests/hwpt.hpp"

#include "iommu/formats.hpp"
#include "iommu/slice.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <string>
#include <utility>

namespace dirtyring::service {

namespace {

static_assert(iommu::shards_max == DR_SHARDS_MAX);
static_assert(iommu::large_page == ring::large_page);

// A generation is touched where something is mapped only; beyond this many bytes they come into being then.
constexpr std::uint64_t translation_present_max = 16ull << 20;

static_assert(iommu::AmdV1::id == DR_FORMAT_AMDV1 && iommu::VtdSs::id == DR_FORMAT_VTDSS);
static_assert(iommu::SmmuV3S2::id == DR_FORMAT_SMMUV3_S2 && iommu::SmmuV3S1::id == DR_FORMAT_SMMUV3_S1);

// The levels of an hwpt, given the format's range; 0: none will do.
unsigned levels_of(const dr_hwpt_alloc &r, unsigned min, unsigned max)
{
    const unsigned fewest = std::max(min, iommu::levels_needed(r.aperture_lg2));
    const unsigned levels = r.levels == 0 ? fewest : r.levels;
    return levels >= fewest && levels <= max ? levels : 0;
}

unsigned levels_of(const dr_hwpt_alloc &r)
{
    return iommu::with_format(r.format, [&](auto f) { return levels_of(r, f.levels_min, f.levels_max); });
}

// Its hardware may have to see leaves gone before it sees others there.
bool breaks(std::uint32_t format)
{
    return iommu::with_format(format, [](auto f) { return f.nt != 0; });
}

// Of a format that is known.
Result<void> check_flags(const dr_hwpt_alloc &r)
{
    constexpr std::uint32_t known =
        DR_HWPT_DIRTY_TRACKING | DR_HWPT_ALWAYS_ON | DR_HWPT_ALL_SIZES | DR_HWPT_COLLAPSE | DR_HWPT_DIRTY_OPTIONAL;
    if ((r.flags & ~known) != 0)
        return refusal(EINVAL, fmt::format("flags {:#x} of the hwpt: only {:#x} are known", r.flags, known));
    const bool required = (r.flags & DR_HWPT_DIRTY_TRACKING) != 0;
    const bool optional = (r.flags & DR_HWPT_DIRTY_OPTIONAL) != 0;
    if ((r.flags & DR_HWPT_ALWAYS_ON) != 0 && !required)
        return refusal(EINVAL, fmt::format("flags {:#x} of the hwpt: DR_HWPT_ALWAYS_ON ({:#x}) without "
                                           "DR_HWPT_DIRTY_TRACKING ({:#x})",
                                           r.flags, DR_HWPT_ALWAYS_ON, DR_HWPT_DIRTY_TRACKING));
    if (optional && required)
        return refusal(EINVAL, fmt::format("flags {:#x} of the hwpt: expected one of DR_HWPT_DIRTY_TRACKING ({:#x}) "
                                           "and DR_HWPT_DIRTY_OPTIONAL ({:#x})",
                                           r.flags, DR_HWPT_DIRTY_TRACKING, DR_HWPT_DIRTY_OPTIONAL));
    if (optional && iommu::with_format(r.format, [](auto f) { return f.always_on; }))
        return refusal(EINVAL, fmt::format("flags {:#x} of the hwpt: DR_HWPT_DIRTY_OPTIONAL ({:#x}) in {}, where "
                                           "devices set Dirty from the start",
                                           r.flags, DR_HWPT_DIRTY_OPTIONAL, format_names(DR_FORMAT_BIT(r.format))));
    return {};
}

Result<void> check_geometry(const dr_hwpt_alloc &r)
{
    if (r.aperture_lg2 < iommu::aperture_lg2_min || r.aperture_lg2 > iommu::aperture_lg2_max)
        return refusal(EINVAL, fmt::format("aperture_lg2 is {}, expected {} to {}", r.aperture_lg2,
                                           iommu::aperture_lg2_min, iommu::aperture_lg2_max));
    if (levels_of(r) == 0)
        return iommu::with_format(r.format, [&](auto f) -> Result<void> {
            return refusal(EINVAL,
                           fmt::format("levels is {}, expected {} to {}, which {} has and 2^{} bytes need", r.levels,
                                       std::max(unsigned{f.levels_min}, iommu::levels_needed(r.aperture_lg2)),
                                       unsigned{f.levels_max}, f.name, r.aperture_lg2));
        });
    const unsigned shards_most = iommu::shards_most(r.aperture_lg2);
    if (!std::has_single_bit(r.shards) || r.shards > shards_most)
        return refusal(
            EINVAL, fmt::format("shards is {}, expected a power of two up to {} (each slice holds 1 GiB or everything)",
                                r.shards, shards_most));
    return {};
}

Result<void> check(const dr_hwpt_alloc &r)
{
    if (!iommu::knows_format(r.format))
        return refusal(EOPNOTSUPP, fmt::format("format {} is not known here, expected one of {}", r.format,
                                               format_names(UINT32_MAX)));
    if (auto ok = check_flags(r); !ok)
        return ok;
    if (auto ok = check_geometry(r); !ok)
        return ok;
    if (r.leaf_lg2_max != 12 && r.leaf_lg2_max != 21 && r.leaf_lg2_max != 30)
        return refusal(EINVAL, fmt::format("leaf_lg2_max is {}, expected 12, 21 or 30", r.leaf_lg2_max));
    if (r.split > DR_SPLIT_LAZY)
        return refusal(EINVAL, fmt::format("split is {}, expected 0 (none), 1 (eager) or 2 (lazy)", r.split));
    if (r.bbml > (breaks(r.format) ? 2 : 0))
        return refusal(EINVAL, fmt::format("bbml is {}, expected 0 to 2 of SMMUv3 formats, 0 of others", r.bbml));
    if (r.space != DR_SPACE_IOVA && r.space != DR_SPACE_OA)
        return refusal(EINVAL, fmt::format("space is {}, expected 0 (iova) or 1 (oa)", r.space));
    if (!std::has_single_bit(r.ring_entries) || r.ring_entries < DR_CAPACITY_MIN || r.ring_entries > DR_CAPACITY_MAX)
        return refusal(EINVAL, fmt::format("ring_entries is {}, expected a power of two from {} to {}", r.ring_entries,
                                           DR_CAPACITY_MIN, DR_CAPACITY_MAX));
    return {};
}

// Takes the value out of a result, or says why there is none.
template <class T> Result<void> move_to(T &to, Result<T> from)
{
    if (!from)
        return tl::unexpected(std::move(from.error()));
    to = std::move(*from);
    return {};
}

} // namespace

Result<std::unique_ptr<Hwpt>> Hwpt::make(const HwptPlan &plan, const std::vector<Walker *> &owners, Holdings &holdings)
{
    const dr_hwpt_alloc &request = plan.request;
    if (auto ok = check(request); !ok)
        return tl::unexpected(ok.error());
    auto hwpt = std::make_unique<Hwpt>();
    hwpt->required = (request.flags & DR_HWPT_DIRTY_TRACKING) != 0;
    hwpt->tracks = hwpt->required || (request.flags & DR_HWPT_DIRTY_OPTIONAL) != 0;
    hwpt->geometry = iommu::make_geometry(request.format, request.aperture_lg2, request.shards, levels_of(request));
    if (auto ok = hwpt->make_regions(plan, holdings); !ok)
        return tl::unexpected(ok.error());
    for (std::uint32_t i = 0; i < request.shards; ++i) {
        if (auto ok = hwpt->make_shard_home(plan, i, *owners[i % owners.size()], holdings); !ok)
            return tl::unexpected(ok.error());
    }
    if (!holdings.restored()) {
        auto *header = hwpt->translation.map.as<dr_translation_header>();
        *header = hwpt->geometry;
        header->version = 0;
        // Last, as R6 of the rings: who maps the region before the attach reply has brought it here sees no half
        // header.
        std::atomic_ref(header->version).store(hwpt->geometry.version, std::memory_order_release);
    }
    return hwpt;
}

Result<void> Hwpt::make_regions(const HwptPlan &plan, Holdings &holdings)
{
    const dr_translation_header &h = geometry;
    const auto make = [&](ring::Region &region, char kind, const char *label, std::uint64_t size) {
        return move_to(region, holdings.region(kept_name(kind, plan.guest, plan.id), label, size, ring::Pages::sparse));
    };
    const std::uint64_t record_size = iommu::SliceRecord::size(h);
    if (auto ok = make(tables, 'T', "dirtyring-tables", h.tables_size); !ok)
        return ok;
    if (auto ok = make(translation, 'X', "dirtyring-translation", h.translation_size); !ok)
        return ok;
    if (auto ok = make(records, 'R', "dirtyring-slice-records", h.shards * record_size); !ok)
        return ok;
    if (holdings.restored())
        return {};
    bool present = tables.make_present(h.table_pages, h.top_tables << iommu::table_size_lg2) == 0 &&
                   translation.make_present(0, std::min(h.translation_size, translation_present_max)) == 0;
    for (std::uint32_t i = 0; i < h.shards; ++i)
        present = present && records.make_present(i * record_size, iommu::SliceRecord::head_size(h)) == 0;
    for (unsigned level = h.root_level; level < iommu::top_level; ++level) // a root of the slice's own, see Slice
        present = present && make_table_present(iommu::first_number(h.slice_lg2, level));
    if (!present)
        return refusal(ENOMEM, "no memory for the top tables and generations");
    iommu::with_format(h.format,
                       [&](auto f) { iommu::make_top_tables<decltype(f)>(h, iommu::Tables(tables.map.data(), h)); });
    auto *controls = translation.map.as<dr_shard_control>(h.shard_controls);
    for (std::uint32_t i = 0; i < h.shards; ++i)
        controls[i].first_table = iommu::first_table(h, i);
    return {};
}

bool Hwpt::make_table_present(std::uint64_t number)
{
    const std::uint64_t table = iommu::first_table(geometry, 0) + number;
    return tables.make_present(geometry.table_pages + (table << iommu::table_size_lg2), 1u << iommu::table_size_lg2) ==
               0 &&
           tables.make_present(geometry.line_words + table * 8, 8) == 0 &&
           tables.make_present(geometry.table_bits + table / 8, 1) == 0 && slice_record(0).make_present(number, 1) == 0;
}

Result<void> Hwpt::make_shard_home(const HwptPlan &plan, std::uint32_t index, Walker &owner, Holdings &holdings)
{
    const dr_hwpt_alloc &request = plan.request;
    const dr_translation_header &h = geometry;
    const auto name = [&](char kind) { return kept_name(kind, plan.guest, plan.id, index); };
    ShardHome &home = shards.emplace_back();
    home.owner = &owner;
    if (auto ok = move_to(home.doorbell, holdings.eventfd(name('B'))); !ok)
        return ok;
    if (auto ok = move_to(home.call, holdings.eventfd(name('C'))); !ok)
        return ok;
    if (tracks) {
        const std::uint64_t size = ring::producer_region_size(request.ring_entries, sizeof(std::uint64_t));
        if (auto ok =
                move_to(home.producer, holdings.region(name('H'), "dirtyring-producer", size, ring::Pages::present));
            !ok)
            return ok;
        if (auto ok = move_to(home.consumer, holdings.region(name('U'), "dirtyring-consumer", sizeof(dr_ring_consumer),
                                                             ring::Pages::present));
            !ok)
            return ok;
        auto *producer = home.producer.map.as<dr_ring_producer>();
        if (holdings.restored()) {
            if (!ring::is_producer_region(*producer, size, sizeof(std::uint64_t)) ||
                !ring::has_whole_indices(*producer))
                return refusal(EINVAL,
                               fmt::format("ring {} of its hwpt {} has {} entries, head {} and staged {}", index,
                                           plan.id, producer->header.capacity, producer->head, producer->staged));
            // Release: whoever sees another session finds what the service before it has left.
            std::atomic_ref(producer->session).store(producer->session + 1, std::memory_order_release);
        } else {
            dr_ring_header header{};
            header.kind = DR_RING_DIRTY;
            header.capacity = request.ring_entries;
            header.entry_size = sizeof(std::uint64_t);
            header.space = request.space;
            header.start = std::uint64_t{index} << h.slice_lg2;
            header.last = header.start + ((1ull << h.slice_lg2) - 1);
            ring::make_producer_region(producer, header);
        }
    }
    ShardConfig config;
    config.tables = iommu::Tables(tables.map.data(), h);
    config.geometry = h;
    config.index = index;
    config.control = translation.map.as<dr_shard_control>(h.shard_controls) + index;
    config.generations = translation.map.as<std::uint64_t>(h.generations);
    config.leaves = {request.leaf_lg2_max, (request.flags & DR_HWPT_ALL_SIZES) != 0,
                     (request.flags & DR_HWPT_COLLAPSE) != 0, static_cast<dr_split>(request.split),
                     breaks(request.format) ? static_cast<iommu::Break>(request.bbml) : iommu::Break::none};
    config.producer = tracks ? home.producer.map.as<dr_ring_producer>() : nullptr;
    config.consumer = tracks ? home.consumer.map.as<dr_ring_consumer>() : nullptr;
    config.always_on = (request.flags & DR_HWPT_ALWAYS_ON) != 0;
    config.min_interval_ns = std::uint64_t{request.min_interval_us} * 1000;
    config.backing.make_present = [this](std::uint64_t offset, std::uint64_t length) {
        return tables.make_present(offset, length);
    };
    config.backing.give_back = [this](std::uint64_t offset, std::uint64_t length) { tables.give_back(offset, length); };
    config.backing.make_large = [make_large = plan.make_large, index](std::uint64_t offset) {
        make_large(index, offset);
    };
    config.call = [&owner, fd = home.call.get()] { owner.call(fd); };
    config.record = slice_record(index);
    config.restored = holdings.restored();
    config.stall_ns = plan.stall_ns;
    config.stalled = [stalled = plan.stalled, index](const dr_cell *cell) { stalled(index, cell); };
    home.shard = make_shard(request.format, std::move(config));
    return {};
}

dr_hwpt Hwpt::reply() const
{
    return {0, slot->id, geometry.shards, geometry.slice_lg2};
}

HwptRoute Hwpt::route() const
{
    const dr_hwpt_alloc &request = slot->request;
    const unsigned largest = std::min(request.leaf_lg2_max, iommu::entry_lg2(geometry.root_level));
    const std::uint64_t sizes =
        iommu::bits_between(iommu::granule_lg2, largest + 1) & iommu::with_format(request.format, [&](auto f) {
            return iommu::leaf_sizes<decltype(f)>((request.flags & DR_HWPT_ALL_SIZES) != 0);
        });
    const unsigned oa_lg2 = iommu::with_format(geometry.format, [](auto f) { return unsigned{f.oa_lg2}; });
    const bool epochs = slot->request.space == DR_SPACE_IOVA;
    HwptRoute route{slot->request.ioas, geometry.aperture_lg2, geometry.slice_lg2, oa_lg2, sizes, tracks, epochs, {},
                    &slot->tracking};
    for (const ShardHome &s : shards)
        route.shards.push_back({s.shard.get(), &s.owner->inbox()});
    return route;
}

iommu::SliceRecord Hwpt::slice_record(std::uint32_t shard) const
{
    const std::uint64_t at = shard * iommu::SliceRecord::size(geometry);
    return {records.map.data() + at, geometry, [this, at](std::uint64_t offset, std::uint64_t length) {
                return records.make_present(at + offset, length);
            }};
}

} // namespace dirtyring::service
