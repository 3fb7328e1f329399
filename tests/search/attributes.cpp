#include "tests/search/attributes.hpp"

#include "iommu/geometry.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <bit>

namespace dirtyring::search {

Attributes::Attributes(Choices &choices)
    : format(static_cast<unsigned>(choices.next(4)) + 1), gib(choices.one_in(12)), always_on(choices.one_in(2)),
      optional(choices.one_in(4)), all_sizes(choices.one_in(2)), split(static_cast<dr_split>(choices.next(3))),
      collapse(choices.one_in(2)), how(static_cast<iommu::Break>(2 - choices.next(3))),
      space(choices.next(2) == 0 ? DR_SPACE_OA : DR_SPACE_IOVA), shards(1u << choices.next(3))
{
    const auto [by_itself, breaks, fewest_levels, most_levels] = iommu::with_format(format, [](auto f) {
        return std::tuple(bool{f.always_on}, f.nt != 0, unsigned{f.levels_min}, unsigned{f.levels_max});
    });
    optional = optional && !by_itself;
    always_on = always_on && !optional;
    how = breaks ? how : iommu::Break::none;
    slice_lg2 = gib ? 32 : 30;
    const unsigned needed =
        std::max(fewest_levels, iommu::levels_needed(slice_lg2 + static_cast<unsigned>(std::countr_zero(shards))));
    levels = std::min(needed + static_cast<unsigned>(choices.next(2)), most_levels);
    constexpr unsigned largest[] = {12, 21, 30};
    leaf_lg2_max = largest[choices.next(3)];
    capacity = 8ull << choices.next(4);
    constexpr std::uint64_t intervals[] = {0, 0, 5'000, 200'000};
    min_interval_ns = intervals[choices.next(4)];
    commands = 2u << choices.next(4);
    pins = static_cast<unsigned>(choices.next(5));
    devices = static_cast<unsigned>(choices.next(3)) + 1;
    constexpr service::Visit visits[] = {{}, {16, 64, 2}, {64, 256, 3}, {4, 16, 1}};
    visit = visits[choices.next(4)];
    if (gib)
        visit = {.lines = visit.lines == 4 ? 64 : visit.lines, .leaves = 4096, .slots = visit.slots};
    mortal = choices.one_in(2);
    destroys = choices.one_in(4);
    sleeps = choices.one_in(2);
    constexpr unsigned often[] = {0, 2, 8, 24};
    resizes = often[choices.next(4)];
    toggles = 1u << choices.next(5);
    wide = choices.one_in(3);
    head_start = static_cast<unsigned>(choices.next(3));
    short_of_memory = choices.one_in(4) && space == DR_SPACE_OA;
    slow = static_cast<unsigned>(choices.next(8)) - 4; // more than there are shards, mostly
    constexpr Reader readers[] = {Reader::steady, Reader::steady, Reader::waits, Reader::lazy};
    reader = readers[choices.next(4)];
    if (reader == Reader::lazy)
        capacity = 8;
}

std::string Attributes::text() const
{
    return fmt::format(
        "format {}{}{}{}{}, split {}, bbml {}, space {}, {} shards of 2^{}, {} levels, leaves up to 2^{}, "
        "ring {}{}, interval {} ns, {} commands, {} devices with {} pins, visits of {} lines and {} leaves{}{}{}{}{}{}",
        format, always_on ? ", always on" : "", optional ? ", optional" : "", all_sizes ? ", all sizes" : "",
        collapse ? ", collapse" : "", static_cast<unsigned>(split), static_cast<unsigned>(how),
        space == DR_SPACE_OA ? "OA" : "IOVA", shards, slice_lg2, levels, leaf_lg2_max, capacity,
        reader == Reader::lazy    ? ", seldom read"
        : reader == Reader::waits ? ", not read beyond a marker"
                                  : "",
        min_interval_ns, commands, devices, pins, visit.lines, visit.leaves, mortal ? ", the service dies" : "",
        destroys ? ", hwpts are destroyed" : "", sleeps ? ", all sleep" : "",
        short_of_memory ? ", short of memory" : "",
        gib    ? ", with a GiB"
        : wide ? ", wide"
               : "",
        head_start == 0   ? ""
        : head_start == 1 ? ", all is mapped at first"
                          : ", all is mapped and tracked at first");
}

Plan::Plan(const Attributes &a)
{
    // Of the places in the guest's memory: so that any leaf fits, or one of 64 KiB, or only small ones.
    constexpr std::uint64_t shifts[] = {0, 0, 16 * page_size, 3 * page_size};
    const std::uint64_t slice = 1ull << a.slice_lg2;
    aperture_ = slice * a.shards;
    for (std::uint64_t start = 0; start < aperture_; start += slice) {
        areas_.push_back(
            {start == 0 ? 0 : start + block_size / 2, block_size, {}}); // behind the one that reaches in here
        areas_.push_back({start + 2 * block_size, block_size, {}});     // in the same region
        const std::uint64_t last = start + slice - (start + slice < aperture_ ? block_size / 2 : block_size);
        areas_.push_back({last, block_size, {}});
    }
    const std::size_t n = areas_.size();
    for (std::size_t i = 0; i < n; ++i) {
        for (std::size_t place = 0; place < std::size(shifts); ++place)
            areas_[i].oas.push_back((i + 5 * place) % n * block_size + shifts[place]);
    }
    memory_ = (n + 1) * block_size;
    if (a.wide) { // leaves of 4 KiB here, too
        areas_.push_back({256 * MiB, 128 * MiB, {memory_ + page_size}});
        memory_ += 130 * MiB;
    }
    if (a.gib) { // leaves of 4 KiB, whatever the attributes say; or a leaf of 1 GiB
        memory_ = GiB;
        areas_.insert(areas_.begin(), {aperture_ - slice + GiB, GiB, {memory_ + page_size}});
        if (a.leaf_lg2_max == 30)
            areas_[0].oas.push_back(memory_);
        memory_ += GiB + 2 * MiB;
    }
}

const Plan::Area *Plan::area_of(std::uint64_t iova) const
{
    const auto found = std::find_if(areas_.begin(), areas_.end(),
                                    [&](const Area &a) { return a.iova <= iova && iova < a.iova + a.length; });
    return found == areas_.end() ? nullptr : &*found;
}

std::uint64_t Plan::hot_page(const Area &area, std::uint64_t choice)
{
    const std::uint64_t last = area.length / page_size - 1;
    const std::uint64_t pages[hot_pages] = {0, 1, 2, 9, 511, 512, last - 1, last};
    return pages[choice % hot_pages];
}

} // namespace dirtyring::search
