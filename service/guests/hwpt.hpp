// A page table with its rings: regions, descriptors, and a shard for each slice.
#pragma once

#include "iommu/slice_record.hpp"
#include "ring/control.h"
#include "ring/region.hpp"
#include "service/commands/commands.hpp"
#include "service/engine/shard.hpp"
#include "service/guests/guest_record.hpp"
#include "service/guests/holdings.hpp"
#include "service/walkers/walker.hpp"

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace dirtyring::service {

// One shard with its regions and descriptors.
struct ShardHome {
    ring::Region producer;
    ring::Region consumer;
    ring::Fd call;     // service → VMM
    ring::Fd doorbell; // VMM and devices → owner
    std::unique_ptr<Shard> shard;
    Walker *owner = nullptr;
};

struct HwptPlan {
    std::uint32_t guest; // its number
    std::uint32_t id;
    dr_hwpt_alloc request;
    std::uint64_t stall_ns;
    std::function<void(unsigned shard, const dr_cell *)> stalled;         // see ShardConfig
    std::function<void(unsigned shard, std::uint64_t offset)> make_large; // see Backing
};

struct Hwpt {
    HwptSlot *slot = nullptr;
    bool tracks;   // it has rings
    bool required; // and no device that cannot be tracked
    dr_translation_header geometry;
    ring::Region tables;
    ring::Region translation;
    ring::Region records; // of the slices
    std::vector<ShardHome> shards;
    Names names;
    unsigned devices = 0;

    // Checks the request and makes or restores all of it; the shards are not adopted yet.
    static Result<std::unique_ptr<Hwpt>> make(const HwptPlan &plan, const std::vector<Walker *> &owners,
                                              Holdings &holdings);

    [[nodiscard]] dr_hwpt reply() const;
    // For the home walker; when the hwpt has its slot.
    [[nodiscard]] HwptRoute route() const;
    // Holds on to the hwpt, not to what is in the record.
    [[nodiscard]] iommu::SliceRecord slice_record(std::uint32_t shard) const;

  private:
    Result<void> make_regions(const HwptPlan &plan, Holdings &holdings);
    // Of shard 0, by its number: its entries, its summary and its place in the record.
    bool make_table_present(std::uint64_t number);
    Result<void> make_shard_home(const HwptPlan &plan, std::uint32_t index, Walker &owner, Holdings &holdings);
};

} // namespace dirtyring::service
