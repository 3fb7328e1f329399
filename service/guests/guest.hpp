// What one VMM has here. Made and owned by the control thread; walkers hold pointers from adopt to drop.
//
// Each part of it is made in the same order: its descriptors go into the store, then its slot of the record becomes
// valid, then walkers hear of it, then the reply goes out. And leaves in the reverse order: the walkers let it go, the
// slot is freed, the descriptors leave the store. A service that dies in between leaves descriptors without a slot,
// which the next one drops.
#pragma once

#include "ring/control.h"
#include "ring/region.hpp"
#include "ring/socket.hpp"
#include "service/commands/commands.hpp"
#include "service/guests/guest_record.hpp"
#include "service/guests/holdings.hpp"
#include "service/guests/hwpt.hpp"
#include "service/walkers/walker.hpp"

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <vector>

namespace dirtyring::service {

using Token = std::array<std::uint8_t, DR_TOKEN_BYTES>;

struct MemoryRegion {
    std::uint64_t oa;
    std::uint64_t length;
    std::uint64_t offset;
    ring::Fd fd; // passed on to devices, never mapped
};

// A device from its attach until its process is gone, and reported, or it has detached.
struct Device {
    DeviceSlot *slot;
    ring::Fd pidfd; // none: a keeper has dropped it, as the process was gone
    ring::Region cells;
    iommu::DmaThreads threads{}; // in cells
    Names names;
    bool leaving = false;
    std::size_t unreported = 0; // shards, once it is dead

    // `slot` is filled, but not taken yet if the device is new.
    static Result<std::shared_ptr<Device>> make(std::uint32_t guest, DeviceSlot &slot, ring::Fd pidfd,
                                                Holdings &holdings);
};

// A shard that waits for a thread of a device.
struct Stall {
    std::uint32_t hwpt;
    unsigned shard;
    std::uint32_t device;
};

// From here on the record is this process's; or it stays another's, which is named (0: one of another pid namespace).
// The lock is gone as soon as the process closes any descriptor of the file, so there is to be no second one.
std::optional<int> lock(int memfd);

struct Guest {
    ring::Region memfd; // of the record
    GuestRecord *record = nullptr;
    Names names; // all that belong to no hwpt and no device
    Walker *home;
    ring::Region front_end; // the VMM writes
    ring::Region service;   // we write
    ring::Fd kick;
    ring::Fd call;
    ring::Fd front_end_process;
    std::unique_ptr<Commands> commands;

    std::vector<MemoryRegion> memory;
    std::map<std::uint32_t, bool> ioases; // id; whether it has an hwpt
    std::map<std::uint32_t, std::unique_ptr<Hwpt>> hwpts;
    std::map<std::uint32_t, std::shared_ptr<Device>> devices;

    std::uint64_t connection = 0; // of the front-end; 0: none
    std::uint64_t lingering = 0;  // the timer that ends it; 0: none
    unsigned changes = 0;         // requests that walkers are working on
    std::vector<std::function<void()>> after_changes;
    std::vector<Stall> stalls;

    // A new one; its record is not valid yet.
    static Result<std::unique_ptr<Guest>> make(std::uint32_t number, const dr_guest_create &request,
                                               std::uint32_t sequence, Walker &home, Holdings &holdings);
    // One that was there before, but for its hwpts and devices.
    static Result<std::unique_ptr<Guest>> restore(ring::Region memfd, Walker &home, Holdings &holdings);

    [[nodiscard]] std::uint32_t number() const { return record->number; }
    [[nodiscard]] Token token() const { return std::to_array(record->token); }
    [[nodiscard]] std::uint64_t stall_ns() const;
    // With those of its hwpts and devices.
    [[nodiscard]] Names all_names() const;
    [[nodiscard]] dr_guest_status &status() const { return *service.map.as<dr_guest_status>(DR_GUEST_STATUS_OFFSET); }

    // Checks a region against those there are, keeps a descriptor of its memory, and takes a slot.
    Result<void> add_memory(const dr_memory_region &request, std::uint32_t sequence, int fd, Holdings &holdings);

  private:
    Result<void> assemble(Holdings &holdings);
};

} // namespace dirtyring::service
