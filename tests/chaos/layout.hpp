// A guest's IOVA space and memory. Blocks of IOVA space are spread over the shards. Each may be mapped to a few places of the guest's
// memory, and each place be mapped by several blocks, so remapping and aliases happen all the time, yet a device can find out
// where its write went.
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
constexpr std::uint64_t block_distance = 16ull << 20; // blocks share no region (iommu/layout.h)

struct Layout {
    std::string_view name;
    unsigned shards;
    dr_space space;
    std::uint32_t leaf_lg2_max;
    std::uint32_t ring_entries;
    std::uint64_t block_size;
    dr_split split; // of leaves of all sizes, which are collapsed when tracking ends

    [[nodiscard]] std::uint64_t memory() const { return (blocks + 1) * block_size; }
    [[nodiscard]] std::uint64_t pages() const { return memory() / page_size; }
    [[nodiscard]] std::uint64_t block_pages() const { return block_size / page_size; }

    [[nodiscard]] unsigned aperture_lg2() const { return slice_lg2 + static_cast<unsigned>(std::countr_zero(shards)); }
    [[nodiscard]] std::uint64_t iova(unsigned block) const
    {
        return (std::uint64_t{block % shards} << slice_lg2) + (block / shards) * block_distance;
    }
    // Of an IOVA within a block.
    [[nodiscard]] unsigned block(std::uint64_t iova) const
    {
        const std::uint64_t in_slice = iova & ((1ull << slice_lg2) - 1);
        return static_cast<unsigned>(in_slice / block_distance * shards + (iova >> slice_lg2));
    }
    // Of the block's first byte. The last place is shifted, so that only small leaves fit.
    [[nodiscard]] std::uint64_t oa(unsigned block, unsigned place) const
    {
        return (block + 5 * place) % blocks * block_size + (place == places - 1 ? 3 * page_size : 0);
    }
};

// Guests are of these kinds in turn. Where there is one ring, no other ring's call can stand in for one that is lost.
constexpr Layout layouts[] = {
    {"OA, one ring", 1, DR_SPACE_OA, 12, 16, 64 * page_size, DR_SPLIT_NONE},
    {"IOVA", 2, DR_SPACE_IOVA, 21, 16, 64 * page_size, DR_SPLIT_EAGER},
    {"IOVA, 2 MiB leaves", 2, DR_SPACE_IOVA, 21, 64, 512 * page_size, DR_SPLIT_LAZY},
};

} // namespace dirtyring::chaos
