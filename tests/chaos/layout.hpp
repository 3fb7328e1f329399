// A guest's IOVA space and memory. Blocks of IOVA space are spread over the shards. Each may be mapped to a few places
// of the guest's memory, and each place be mapped by several blocks, so remapping and aliases happen all the time, yet
// a device can find out where its write went.
//
//             slice 0                              slice 1
//               |block 0|    |block 2|   …   |block    11|     |block 1|    |block 3|   …
//   full: ······|block 0|····|block 2|·······|block    11|     |block 1|
//
// Where there are several shards, the last block lies astride the first two slices. A guest that is full has all the
// rest of the first slice mapped, too, in leaves of 4 KiB: to its memory over and over, and for good.
#pragma once

#include "ring/control.h"
#include "ring/layout.h"

#include <bit>
#include <cstdint>
#include <string_view>

namespace dirtyring::chaos {

constexpr std::uint64_t page_size = DR_PAGE;
constexpr unsigned blocks = 12;
constexpr unsigned places = 3;
constexpr unsigned slice_lg2 = 30;
constexpr std::uint64_t slice_size = 1ull << slice_lg2;
constexpr std::uint64_t block_distance = 16ull << 20; // blocks share no region (iommu/layout.h)

struct Layout {
    std::string_view name;
    dr_format format;
    unsigned shards;
    dr_space space;
    std::uint32_t leaf_lg2_max;
    std::uint32_t ring_entries;
    std::uint64_t block_size;
    dr_split split;         // of leaves of all sizes, which are collapsed when tracking ends
    bool always_on = false; // devices set D while nobody tracks, too
    bool full = false;

    [[nodiscard]] std::uint64_t memory() const { return (blocks + 1) * block_size; }
    [[nodiscard]] std::uint64_t pages() const { return memory() / page_size; }
    [[nodiscard]] std::uint64_t block_pages() const { return block_size / page_size; }
    // So often the memory comes in the OA space, one behind the other: IOVAs of the full slice are their own OAs.
    [[nodiscard]] unsigned copies() const { return full ? static_cast<unsigned>(slice_size / memory() + 1) : 1; }
    [[nodiscard]] std::uint64_t oa_end() const { return copies() * memory(); }

    [[nodiscard]] unsigned aperture_lg2() const { return slice_lg2 + static_cast<unsigned>(std::countr_zero(shards)); }
    [[nodiscard]] bool astride(unsigned block) const { return shards > 1 && block == blocks - 1; }
    [[nodiscard]] std::uint64_t iova(unsigned block) const
    {
        if (astride(block))
            return slice_size - block_size / 2;
        return (std::uint64_t{block % shards} << slice_lg2) + (block / shards + 1) * block_distance;
    }
    // `blocks`: it lies in none.
    [[nodiscard]] unsigned block(std::uint64_t iova) const
    {
        if (shards > 1 && iova - this->iova(blocks - 1) < block_size)
            return blocks - 1;
        const std::uint64_t in_slice = iova & (slice_size - 1);
        const std::uint64_t row = in_slice / block_distance;
        const std::uint64_t number = (row - 1) * shards + (iova >> slice_lg2);
        const bool there = row > 0 && in_slice % block_distance < block_size && number < blocks;
        return there && !astride(static_cast<unsigned>(number)) ? static_cast<unsigned>(number) : blocks;
    }
    // Of the block's first byte. The last place is shifted, so that only small leaves fit.
    [[nodiscard]] std::uint64_t oa(unsigned block, unsigned place) const
    {
        return (block + 5 * place) % blocks * block_size + (place == places - 1 ? 3 * page_size : 0);
    }

    // Visits each OA that the IOVA may be mapped to.
    template <class Visit> void for_each_oa(std::uint64_t iova, Visit visit) const
    {
        const unsigned b = block(iova);
        if (b == blocks) {
            if (full && iova < slice_size)
                visit(iova);
            return;
        }
        for (unsigned place = 0; place < places; ++place)
            visit(oa(b, place) + (iova - this->iova(b)));
    }

    // Visits (start, end) of what lies between the blocks of a full slice.
    template <class Visit> void for_each_gap(Visit visit) const
    {
        for (std::uint64_t at = 0; full && at < iova(blocks - 1);) {
            const std::uint64_t start = at + (block(at) < blocks ? block_size : 0);
            for (at = start; at < iova(blocks - 1) && block(at) == blocks;)
                at += block_size;
            visit(start, at < iova(blocks - 1) ? at : iova(blocks - 1));
        }
    }
};

// Guests are of these kinds in turn. Where there is one ring, no other ring's call can stand in for one that is lost.
constexpr Layout layouts[] = {
    {"one-ring", DR_FORMAT_AMDV1, 1, DR_SPACE_OA, 12, 16, 64 * page_size, DR_SPLIT_NONE},
    {"eager", DR_FORMAT_AMDV1, 2, DR_SPACE_IOVA, 21, 16, 64 * page_size, DR_SPLIT_EAGER},
    {"lazy", DR_FORMAT_VTDSS, 2, DR_SPACE_IOVA, 21, 64, 512 * page_size, DR_SPLIT_LAZY},
    {"smmu", DR_FORMAT_SMMUV3_S2, 2, DR_SPACE_IOVA, 21, 16, 64 * page_size, DR_SPLIT_EAGER, true},
    {"full", DR_FORMAT_AMDV1, 2, DR_SPACE_OA, 12, 64, 512 * page_size, DR_SPLIT_NONE, true, true},
};

} // namespace dirtyring::chaos
