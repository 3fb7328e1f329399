// What the next worker must know of a guest, in a memfd that outlives this one and that no peer sees.
//
//    ┌─────────────────────────────────────────────────┐
//    │ header: who the guest is; version last          │
//    │ memory    slot i: the region added as the i-th  │
//    │ ioases    ┐                                     │
//    │ hwpts     ├ slots in any order                  │
//    │ devices   ┘                                     │
//    ├─────────────────────────────────────────────────┤ whole pages
//    │ command journal (command_journal.hpp)           │
//    └─────────────────────────────────────────────────┘
//
// A killed process leaves what it had stored so far, in the order of its release stores: a slot's state is stored last
// and says that the rest of it is whole, and that all its descriptors are in the store. The control thread writes, but
// for HwptRecord and the journal, which are the home walker's.
//
// A request is known again by its sequence. It is noted in the header before the slot is taken, so that a slot is never
// newer.
#pragma once

#include "ring/control.h"
#include "service/commands/command_journal.hpp"
#include "service/guests/capabilities.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace dirtyring::service {

inline constexpr std::size_t objects_max = 64; // ioases and hwpts of a guest
inline constexpr std::size_t devices_max = 64; // of a guest

struct MemorySlot {
    std::uint64_t state;
    std::uint32_t sequence;
    std::uint32_t reserved;
    std::uint64_t oa;
    std::uint64_t length;
    std::uint64_t offset;
};

struct IoasSlot {
    std::uint64_t state;
    std::uint32_t sequence;
    std::uint32_t id;
};

struct HwptSlot {
    std::uint64_t state;
    std::uint32_t sequence;
    std::uint32_t id;
    dr_hwpt_alloc request;
    HwptRecord tracking;
};

struct DeviceSlot {
    std::uint64_t state;
    std::uint32_t id;
    std::uint32_t hwpt;
    std::int32_t pid;
    std::uint32_t threads;
    std::uint32_t pins; // of each thread
    std::uint32_t reserved;
    std::uint64_t key;
    Capabilities can;
};

struct GuestRecord {
    static constexpr std::uint64_t magic_expected = 0x7473657567727264ull; // "drguest" of ours
    static constexpr std::uint64_t version_expected = 1;

    std::uint64_t magic;
    std::uint64_t version; // stored last; 0: not made yet, or given up
    std::uint32_t number;  // of the guest, in the names of its descriptors
    std::uint32_t command_entries;
    std::uint8_t token[DR_TOKEN_BYTES];
    std::uint8_t secret[DR_TOKEN_BYTES];
    std::uint32_t linger_ms;
    std::uint32_t stall_ms;
    std::uint32_t next_id;
    std::uint32_t sequence;  // of the last request that changed the guest
    std::uint64_t destroyed; // by the last DESTROY: id << 32 | sequence; the object has no slot or is on its way out
    std::uint64_t front_end; // how often the guest was taken over: names the descriptor of the front-end's process
    std::uint64_t front_end_pid;
    std::uint64_t left; // 1: the front-end has closed its connection

    std::array<MemorySlot, DR_GUEST_REGIONS_MAX> memory;
    std::array<IoasSlot, objects_max> ioases;
    std::array<HwptSlot, objects_max> hwpts;
    std::array<DeviceSlot, devices_max> devices;

    static constexpr std::size_t journal_offset();
    static constexpr std::size_t size(std::uint32_t command_entries)
    {
        return journal_offset() + command_entries * sizeof(CommandRecord);
    }

    // An id that no object of the guest has had.
    [[nodiscard]] std::uint32_t new_id()
    {
        const std::uint32_t id = next_id;
        std::atomic_ref(next_id).store(id + 1, std::memory_order_release);
        return id;
    }

    // Before the slot of what it has made is taken.
    void change(std::uint32_t by) { std::atomic_ref(sequence).store(by, std::memory_order_release); }

    // Did a slot that has this sequence get it from this very request, and not 2^32 requests ago?
    [[nodiscard]] bool has_seen(std::uint32_t request) const
    {
        return static_cast<std::int32_t>(sequence - request) >= 0;
    }
};

static_assert(sizeof(MemorySlot) == 40 && sizeof(IoasSlot) == 16 && sizeof(HwptSlot) == 88 && sizeof(DeviceSlot) == 80,
              "a later worker reads them");
static_assert(offsetof(GuestRecord, memory) == 104, "a later worker reads it");

constexpr std::size_t GuestRecord::journal_offset()
{
    return (sizeof(GuestRecord) + DR_PAGE - 1) / DR_PAGE * DR_PAGE;
}

// ---- slots -------------------------------------------------------------------------------------------------------

enum SlotState : std::uint64_t { slot_free = 0, slot_taken = 1 };

template <class Slots> auto *free_slot(Slots &slots)
{
    const auto it = std::find_if(slots.begin(), slots.end(), [](const auto &s) { return s.state == slot_free; });
    return it == slots.end() ? nullptr : &*it;
}

// The slot that is taken and of which `matches` is true; nullptr: there is none.
template <class Slots, class Matches> auto *find_slot(Slots &slots, Matches matches)
{
    const auto it =
        std::find_if(slots.begin(), slots.end(), [&](const auto &s) { return s.state == slot_taken && matches(s); });
    return it == slots.end() ? nullptr : &*it;
}

template <class Slots> auto *slot_of_id(Slots &slots, std::uint32_t id)
{
    return find_slot(slots, [&](const auto &s) { return s.id == id; });
}

// The slot that the same request has taken before, when its reply was lost.
template <class Slots> auto *slot_of_request(const GuestRecord &record, Slots &slots, std::uint32_t sequence)
{
    return record.has_seen(sequence) ? find_slot(slots, [&](const auto &s) { return s.sequence == sequence; })
                                     : nullptr;
}

template <class Slot> void take_slot(Slot &slot, Slot filled)
{
    filled.state = slot_free;
    slot = filled;
    std::atomic_ref(slot.state).store(slot_taken, std::memory_order_release);
}

template <class Slot> void free_slot_again(Slot &slot)
{
    std::atomic_ref(slot.state).store(slot_free, std::memory_order_release);
}

} // namespace dirtyring::service
