// Who wrote what, and whether the VMM has it. Devices that know nothing of each other write to slots of their own in
// each page, every word of a slot the number of the write, which only grows: what the VMM's copy holds must be at least
// as new as the last write that was complete before its sync.
#pragma once

#include "tests/engine/rig.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

namespace dirtyring::test {

// Blocks of IOVA space, spread over the shards. Each may be mapped to a few places of the guest's memory, and each
// place be mapped by several blocks, so that remapping and aliases happen all the time, yet a device can find out where
// its write went.
struct Layout {
    static constexpr std::uint64_t block_size = 4 * MiB;
    static constexpr unsigned blocks = 16;
    static constexpr unsigned places = 3;
    static constexpr std::uint64_t memory = (blocks + 1) * block_size;

    unsigned shards = 1;

    [[nodiscard]] std::uint64_t iova(unsigned block) const
    {
        return (block % shards) * GiB + (block / shards) * 2 * block_size;
    }
    // Of the block's first byte. The last place is shifted, so that only small leaves fit.
    [[nodiscard]] static std::uint64_t oa(unsigned block, unsigned place)
    {
        return (block + 7 * place) % blocks * block_size + (place == places - 1 ? 3 * page_size : 0);
    }
    [[nodiscard]] unsigned aperture_lg2() const { return 30 + static_cast<unsigned>(std::countr_zero(shards)); }
};

class Oracle
{
  public:
    static constexpr std::uint64_t slot_size = 512;
    static constexpr std::uint64_t pages = Layout::memory / page_size;

    Oracle(Rig &rig, Layout layout, unsigned devices) : rig_(rig), layout_(layout), journals_(devices)
    {
        for (Journal &j : journals_)
            j.done = std::make_unique<std::atomic<std::uint64_t>[]>(pages);
    }

    // ---- the device's side; each device from one thread

    struct Write {
        std::uint64_t stamp = 0;
        std::vector<std::uint64_t> oas; // of the pages it reached
    };

    // A write to the device's slot in the page, within a section. The fault, if any.
    iommu::FaultReason write(unsigned device, Write &w, unsigned block, std::uint64_t page)
    {
        const std::uint64_t offset = page * page_size + device * slot_size;
        for (unsigned place = 0; place < Layout::places; ++place)
            touch((Layout::oa(block, place) + offset) / page_size);
        std::uint64_t data[slot_size / 8];
        std::fill(std::begin(data), std::end(data), w.stamp);
        const iommu::DmaFault f = rig_.device(device).write(layout_.iova(block) + offset, data, slot_size);
        if (f.reason != iommu::FaultReason::none)
            return f.reason;
        for (unsigned place = 0; place < Layout::places; ++place) {
            const std::uint64_t oa = Layout::oa(block, place) + offset;
            if (peek_word(rig_.source.data() + oa) == w.stamp)
                w.oas.push_back(oa / page_size);
        }
        return f.reason;
    }
    // The device's slot in the page, as asynchronous DMA.
    Pin pin(unsigned device, unsigned block, std::uint64_t page, bool write)
    {
        return make_pin(rig_.device(device), layout_.iova(block) + page * page_size + device * slot_size, slot_size,
                        write);
    }
    // Its data arrives, as a write of its own that is complete when the pin is given back.
    Write land(unsigned device, const Pin &pin)
    {
        Write w = begin(device);
        std::uint64_t data[slot_size / 8];
        std::fill(std::begin(data), std::end(data), w.stamp);
        w.oas.push_back(static_cast<std::uint64_t>(pin.pieces.front().data() - rig_.source.data()) / page_size);
        touch(w.oas.back());
        std::memcpy(pin.pieces.front().data(), data, slot_size);
        return w;
    }

    Write begin(unsigned device)
    {
        const std::uint64_t stamp = journals_[device].issued.fetch_add(1, std::memory_order_seq_cst) + 1;
        return {stamp, {}};
    }
    // After the section.
    void complete(unsigned device, const Write &w)
    {
        for (const std::uint64_t page : w.oas)
            journals_[device].done[page].store(w.stamp, std::memory_order_release);
        journals_[device].writes.fetch_add(w.oas.size(), std::memory_order_relaxed);
    }

    // ---- the VMM's side

    // What was complete at this moment: the last write of a device to a page.
    struct Complete {
        unsigned device;
        std::uint64_t page;
        std::uint64_t stamp;
    };
    using Snapshot = std::vector<Complete>;
    [[nodiscard]] Snapshot completed() const
    {
        Snapshot s;
        for_each_touched([&](std::uint64_t page) {
            for (unsigned d = 0; d < journals_.size(); ++d) {
                if (const std::uint64_t stamp = journals_[d].done[page].load(std::memory_order_acquire); stamp != 0)
                    s.push_back({d, page, stamp});
            }
        });
        return s;
    }

    // Nobody asks any more for what was written to these pages up to now: the memory is going away.
    void forgive(std::uint64_t oa, std::uint64_t length)
    {
        for (Journal &j : journals_) {
            const std::uint64_t upto = j.issued.load(std::memory_order_seq_cst);
            for (std::uint64_t page = oa / page_size; page < (oa + length) / page_size; ++page)
                j.forgiven[page] = upto;
        }
    }

    // Slots of the VMM's copy that are older than the snapshot.
    [[nodiscard]] std::uint64_t missing(const Snapshot &s) const
    {
        std::uint64_t n = 0;
        for (const Complete &c : s) {
            if (c.stamp <= journals_[c.device].forgiven[c.page])
                continue;
            const auto *slot = reinterpret_cast<const std::uint64_t *>(rig_.destination.data() + c.page * page_size +
                                                                       c.device * slot_size);
            n += std::any_of(slot, slot + slot_size / 8, [&](std::uint64_t word) { return word < c.stamp; }) ? 1 : 0;
        }
        return n;
    }

    [[nodiscard]] unsigned devices() const { return static_cast<unsigned>(journals_.size()); }

    [[nodiscard]] std::uint64_t writes() const
    {
        std::uint64_t n = 0;
        for (const Journal &j : journals_)
            n += j.writes.load(std::memory_order_relaxed);
        return n;
    }

    // Copies everything: tracking has just begun.
    void copy_all()
    {
        for_each_touched([&](std::uint64_t page) {
            copy_page(rig_.destination.data() + page * page_size, rig_.source.data() + page * page_size);
        });
    }

  private:
    // Most of the memory is never written, and nobody needs to look at that.
    static constexpr std::uint64_t piece = 64; // pages

    // Before it is written.
    void touch(std::uint64_t page) { touched_[page / piece].store(true, std::memory_order_relaxed); }

    template <class Call> void for_each_touched(Call call) const
    {
        for (std::uint64_t i = 0; i < pages / piece; ++i) {
            if (!touched_[i].load(std::memory_order_acquire))
                continue;
            for (std::uint64_t page = i * piece; page < (i + 1) * piece; ++page)
                call(page);
        }
    }

    struct Journal {
        std::unique_ptr<std::atomic<std::uint64_t>[]> done; // by page: the last write complete
        std::vector<std::uint64_t> forgiven = std::vector<std::uint64_t>(pages, 0);
        std::atomic<std::uint64_t> issued{0};
        std::atomic<std::uint64_t> writes{0};
    };

    Rig &rig_;
    Layout layout_;
    std::vector<Journal> journals_;
    std::array<std::atomic<bool>, pages / piece> touched_{};
};

// From DIRTYRING_SEED, or the given one; printed.
std::uint64_t chosen_seed(std::uint64_t otherwise);
// DIRTYRING_FULL=1: the soak at its full length.
bool full_length();

} // namespace dirtyring::test
