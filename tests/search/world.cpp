#include "tests/search/world.hpp"

#include "iommu/slice.hpp"

#include <bit>
#include <cstring>

namespace dirtyring::search {

DirtyRing::DirtyRing(const Attributes &a, unsigned index)
    : capacity(a.capacity), producer(ring::producer_region_size(a.capacity, 8)), consumer(sizeof(dr_ring_consumer)),
      reader(peer(), mine(), a.capacity)
{
    dr_ring_header header{};
    header.kind = DR_RING_DIRTY;
    header.capacity = a.capacity;
    header.entry_size = 8;
    header.space = a.space;
    header.start = std::uint64_t{index} << a.slice_lg2;
    header.last = header.start + (1ull << a.slice_lg2) - 1;
    ring::make_producer_region(mine(), header);
    peer()->armed = DR_DISARMED;
}

void DirtyRing::look()
{
    const auto *entries = reinterpret_cast<const std::uint64_t *>(mine() + 1);
    for (; looked < mine()->head; ++looked) {
        const std::uint64_t e = entries[looked & (capacity - 1)];
        behind_end |= ends > 0;
        if (!dr_is_marker(e))
            broke_quiet |= looked >= quiet_from;
        else if (dr_marker_kind(e) == DR_MARKER_SYNC)
            ++syncs[dr_marker_payload(e)];
        else if (dr_marker_kind(e) == DR_MARKER_EPOCH)
            ++epochs[dr_marker_payload(e)];
        else if (dr_marker_kind(e) == DR_MARKER_END)
            ++ends;
    }
}

HwptWorld::HwptWorld(const Attributes &a, std::uint32_t number)
    : id(number), geometry(iommu::make_geometry(
                      a.format, a.slice_lg2 + static_cast<unsigned>(std::countr_zero(a.shards)), a.shards, a.levels)),
      tables(geometry.tables_size), translation(geometry.translation_size), retained(a.shards, a.slice_lg2),
      unlinked(a.shards)
{
    const iommu::Tables all(tables.data(), geometry);
    iommu::with_format(a.format, [&](auto f) { iommu::make_top_tables<decltype(f)>(geometry, all); });
    std::memcpy(translation.data(), &geometry, sizeof geometry);
    if (iommu::TranslationView::open(translation.data(), geometry.translation_size, tables.data(), geometry.tables_size,
                                     view) != 0)
        std::abort();
    for (unsigned i = 0; i < a.shards; ++i) {
        control(i)->first_table = iommu::first_table(geometry, i);
        records.push_back(std::make_unique<Memory>(iommu::SliceRecord::size(geometry)));
        rings.push_back(std::make_unique<DirtyRing>(a, i));
    }
}

iommu::SliceRecord HwptWorld::slice_record(unsigned shard, std::function<int()> make_present)
{
    return {records[shard]->data(), geometry,
            [make = std::move(make_present)](std::uint64_t, std::uint64_t) { return make(); }};
}

World::World(Choices &drawn, Coverage &covered, bool telling)
    : choices(drawn), coverage(covered), attributes(drawn), plan(attributes), source(plan.memory()),
      destination(plan.memory()), submissions(DR_RING_SUBMISSION, attributes.commands),
      completions(DR_RING_COMPLETION, attributes.commands), journal(attributes.commands), telling_(telling)
{
    static_cast<void>(guest.add(0, plan.memory(), source.data()));
    make_hwpt();
}

void World::make_hwpt()
{
    hwpt = std::make_unique<HwptWorld>(attributes, next_id++);
}

bool World::copy(std::uint64_t oa, std::uint64_t length)
{
    if (oa >= plan.memory() || length > plan.memory() - oa)
        return false;
    for (auto page = touched_.lower_bound(oa / page_size); page != touched_.end() && *page * page_size < oa + length;
         ++page)
        test::copy_page(destination.data() + *page * page_size, source.data() + *page * page_size);
    return true;
}

} // namespace dirtyring::search
