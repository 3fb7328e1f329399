// Maps that come and go at random, in each format, against a list of them: what each page leads to, with which rights,
// and by a leaf of which size.
#include "tests/engine/each_format.hpp"
#include "tests/engine/oracle.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <iterator>
#include <map>
#include <random>

namespace dirtyring::test {
namespace {

constexpr std::uint64_t P = page_size;

struct Map {
    std::uint64_t start;
    std::uint64_t end;
    std::uint64_t oa;
    iommu::Rights rights;
};

class RandomMaps : public EachFormat
{
};
EACH_FORMAT(RandomMaps);

class Space
{
  public:
    Space(std::uint64_t seed, bool all_sizes)
        : random_(seed), shards_(below(2) == 0 ? 1u : 4u), limit_(below(3) == 0 ? 21u : 30u),
          rig_({.aperture_lg2 = aperture_lg2,
                .shards = shards_,
                .leaf_lg2_max = limit_,
                .all_sizes = all_sizes,
                .memory = MiB}),
          sizes_(iommu::with_format(default_format, [&](auto f) { return iommu::leaf_sizes<decltype(f)>(all_sizes); }))
    {
    }

    // Maps a place that is free, or unmaps a range. Then a look around what has changed, and anywhere.
    void act()
    {
        if (maps_.empty() || below(3) != 0)
            map();
        else
            unmap();
        for (unsigned i = 0; i < 16; ++i)
            expect_as_listed(below(1ull << aperture_lg2) & -P);
    }

    void unmap_all()
    {
        ASSERT_EQ(rig_.unmap(0, 1ull << aperture_lg2), 0);
        maps_.clear();
        for (unsigned i = 0; i < 1000; ++i)
            expect_as_listed(below(1ull << aperture_lg2) & -P);
    }

  private:
    static constexpr unsigned aperture_lg2 = 33;

    std::uint64_t below(std::uint64_t n) { return random_() % n; }

    void map()
    {
        const unsigned granule_lg2[] = {12, 12, 16, 21, 30};
        const std::uint64_t granule = 1ull << granule_lg2[below(std::size(granule_lg2))];
        const std::uint64_t start = below((1ull << aperture_lg2) / granule) * granule;
        const std::uint64_t free = until(start) - start;
        const std::uint64_t length = std::min((1 + below(700)) * granule, free);
        if (length == 0)
            return;
        const unsigned oa_lg2[] = {12, 16, 21, 22, 30};
        const unsigned same_below = oa_lg2[below(std::size(oa_lg2))]; // bits that the OA has in common with the IOVA
        const std::uint64_t oa =
            (below(1ull << (40 - same_below)) << same_below) | (start & ((1ull << same_below) - 1));
        const iommu::Rights rights = {true, below(3) != 0};
        ASSERT_EQ(rig_.map(start, length, oa, rights), 0);
        maps_[start] = {start, start + length, oa, rights};
        look_around(start, start + length);
    }

    // From anywhere to the end of a map.
    void unmap()
    {
        const Map last = std::next(maps_.begin(), static_cast<std::ptrdiff_t>(below(maps_.size())))->second;
        const std::uint64_t reach = below(4) == 0 ? below(1ull << 31) & -P : 0;
        auto first = maps_.lower_bound(last.start - std::min(reach, last.start));
        const std::uint64_t start = std::min(first->first, last.start);
        ASSERT_EQ(rig_.unmap(start, last.end - start), 0);
        while (first != maps_.end() && first->first < last.end)
            first = maps_.erase(first);
        look_around(start, last.end);
    }

    // Where the map behind begins; `from` itself if it is mapped.
    [[nodiscard]] std::uint64_t until(std::uint64_t from) const
    {
        const auto behind = maps_.upper_bound(from);
        if (behind != maps_.begin() && std::prev(behind)->second.end > from)
            return from;
        return behind == maps_.end() ? 1ull << aperture_lg2 : behind->first;
    }

    void look_around(std::uint64_t start, std::uint64_t end)
    {
        const std::uint64_t middle = (start + (end - start) / 2) & -P;
        for (const std::uint64_t iova : {start - P, start, start + P, middle, end - 2 * P, end - P, end})
            expect_as_listed(iova);
        for (unsigned i = 0; i < 16; ++i)
            expect_as_listed((start + below(end - start)) & -P);
    }

    void expect_as_listed(std::uint64_t iova)
    {
        if (iova >> aperture_lg2 != 0)
            return;
        const auto behind = maps_.upper_bound(iova);
        const Map *map =
            behind != maps_.begin() && std::prev(behind)->second.end > iova ? &std::prev(behind)->second : nullptr;
        const iommu::Entry leaf = walk(iova);
        ASSERT_EQ(leaf.kind == iommu::EntryKind::leaf, map != nullptr) << std::hex << iova;
        if (map == nullptr)
            return;
        ASSERT_EQ(leaf.address + (iova & ((1ull << leaf.lg2) - 1)), map->oa + (iova - map->start)) << std::hex << iova;
        ASSERT_EQ(leaf.rights.write, map->rights.write) << std::hex << iova;
        ASSERT_EQ(leaf.lg2, best(*map, iova)) << std::hex << iova;
    }

    // The entry at which a walk from the root ends.
    [[nodiscard]] iommu::Entry walk(std::uint64_t iova) const
    {
        for (unsigned level = rig_.geometry.root_level;; --level) {
            const std::uint64_t *entry = rig_.entry(iova, level);
            const iommu::Entry e = entry != nullptr ? rig_.decode(*entry, level) : iommu::Entry{};
            if (e.kind != iommu::EntryKind::table || level == 0)
                return e;
        }
    }

    // The largest size whose block around iova lies in the map, and at an OA that is a multiple of it.
    [[nodiscard]] unsigned best(const Map &map, std::uint64_t iova) const
    {
        unsigned lg2 = limit_;
        for (;; --lg2) {
            const std::uint64_t size = 1ull << lg2;
            const std::uint64_t block = iova & -size;
            if ((sizes_ >> lg2 & 1) != 0 && block >= map.start && block + size <= map.end &&
                ((map.oa - map.start) & (size - 1)) == 0)
                return lg2;
        }
    }

    std::mt19937_64 random_;
    unsigned shards_;
    unsigned limit_;
    Rig rig_;
    std::uint64_t sizes_;
    std::map<std::uint64_t, Map> maps_; // by start
};

TEST_P(RandomMaps, AreAsListed)
{
    const std::uint64_t first = chosen_seed(1);
    for (std::uint64_t seed = first; seed < first + (full_length() ? 200 : 10); ++seed) {
        Space space(seed, seed % 2 == 0);
        for (unsigned i = 0; i < 200; ++i) {
            space.act();
            ASSERT_FALSE(HasFatalFailure()) << "DIRTYRING_SEED=" << seed << ", act " << i;
        }
        space.unmap_all();
        ASSERT_FALSE(HasFatalFailure()) << "DIRTYRING_SEED=" << seed;
    }
}

} // namespace
} // namespace dirtyring::test
