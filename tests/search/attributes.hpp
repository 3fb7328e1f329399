// What a schedule runs on: the attributes of its hwpts, and how lively its parties are.
#pragma once

#include "iommu/formats.hpp"
#include "ring/control.h"
#include "service/engine/shard.hpp"
#include "tests/search/choices.hpp"

#include <cstdint>
#include <string>
#include <vector>

namespace dirtyring::search {

inline constexpr std::uint64_t page_size = DR_PAGE;
inline constexpr std::uint64_t MiB = 1ull << 20;
inline constexpr std::uint64_t GiB = 1ull << 30;
inline constexpr std::uint64_t block_size = 4 * MiB;
inline constexpr std::uint64_t block_pages = block_size / page_size;

// How the VMM reads dirty rings: as it comes; behind the marker of a SYNC no further before that completes; seldom, as
// its completions, so that they fill.
enum class Reader { steady, waits, lazy };

struct Attributes {
    explicit Attributes(Choices &choices);
    [[nodiscard]] std::string text() const;

    unsigned format;
    bool gib; // the last slice has a GiB, which one command maps, or all but its end
    bool always_on;
    bool optional; // tracking: devices that cannot set D may attach
    bool all_sizes;
    dr_split split;
    bool collapse;
    iommu::Break how;
    dr_space space;
    unsigned shards;
    unsigned slice_lg2;
    unsigned levels;
    unsigned leaf_lg2_max;
    std::uint64_t capacity; // of a ring
    std::uint64_t min_interval_ns;
    std::uint32_t commands; // capacity of their rings
    unsigned pins;
    unsigned devices;
    service::Visit visit;
    // How many in 64 of their chances are taken.
    bool mortal;   // the service dies
    bool destroys; // hwpts
    unsigned slow; // a shard that takes few steps, if there is one of this number
    bool sleeps;   // everybody, whenever there is nothing to do
    unsigned resizes;
    unsigned toggles;     // of tracking
    bool wide;            // slice 0 has an area with so many tables that a pass takes many visits
    bool short_of_memory; // for tables, now and then. OA space only: a map that fails has no epoch
    Reader reader;
    unsigned head_start; // 1: everything is mapped and devices are attached; 2: and tracking is on
};

// Where maps go: blocks of 4 MiB in each slice, the last one of which reaches into the next slice, or to the end of the
// space, and one GiB. Each block has a few places in the guest's memory and shares each with others, so that remaps and
// aliases happen all the time, yet a device can find out where its write went.
class Plan
{
  public:
    explicit Plan(const Attributes &a);

    struct Area {
        std::uint64_t iova;
        std::uint64_t length;
        std::vector<std::uint64_t> oas; // places of the first byte
    };
    [[nodiscard]] const std::vector<Area> &areas() const { return areas_; }
    // The area of an IOVA; nullptr: none.
    [[nodiscard]] const Area *area_of(std::uint64_t iova) const;
    [[nodiscard]] std::uint64_t memory() const { return memory_; }
    [[nodiscard]] std::uint64_t aperture() const { return aperture_; }
    // One of the few pages of an area that devices write most.
    [[nodiscard]] static std::uint64_t hot_page(const Area &area, std::uint64_t choice);
    static constexpr std::uint64_t hot_pages = 8;

  private:
    std::vector<Area> areas_;
    std::uint64_t memory_;
    std::uint64_t aperture_;
};

} // namespace dirtyring::search
