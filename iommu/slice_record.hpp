// What the owner of a slice must know again after its process has died: which tables are linked, what is mapped,
// whether dirt is reported, and what it was in the middle of. Kept in memory that outlives the process and that no peer
// sees.
//
//    ┌──────────────────────────────────┐
//    │ header: extents ever in use,     │
//    │         reported, collapsing,    │  one page
//    │         unmarked                 │
//    │ occupied: a bit for each word    │  whole pages; set before and cleared after the first and last bit of its word
//    │ linked: a bit for each table     │  whole pages
//    │ extents: a slot for each         │
//    └──────────────────────────────────┘
//
// A killed process leaves what it had stored so far, thread by thread in the order of its releases: so each step is one
// store, and what a step needs is stored before. One thread, the owner's; read by anybody while there is no owner.
#pragma once

#include "iommu/extent_map.hpp"
#include "iommu/geometry.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace dirtyring::iommu {

struct ExtentRecord {
    std::uint64_t start;  // IOVA, bytes; moves up as an unmap goes on
    std::uint64_t end;    // half-open
    std::uint64_t offset; // OA - IOVA
    std::uint64_t state;  // of the slot; stored last
};
static_assert(sizeof(ExtentRecord) == 32, "a later worker reads it");

class SliceRecord
{
  public:
    static constexpr std::uint64_t extents_max = 1u << 20;

    // ExtentRecord::state
    static constexpr std::uint64_t used = 1u << 0;
    // All its leaves are there, or an unmap is taking them out; else a map has begun.
    static constexpr std::uint64_t whole = 1u << 1;
    static constexpr std::uint64_t continues = 1u << 2; // the same map as the extent that ends where it starts
    static constexpr std::uint64_t readable = 1u << 3;
    static constexpr std::uint64_t writable = 1u << 4;
    static constexpr unsigned leaf_shift = 8; // log2 of its largest leaf
    static constexpr std::uint64_t leaf_mask = 0xffull << leaf_shift;

    // Makes bytes [offset, offset + length) of the record exist; 0 or -errno.
    using MakePresent = std::function<int(std::uint64_t offset, std::uint64_t length)>;

    // Bytes of the record, whole pages; sparse.
    static constexpr std::uint64_t size(const dr_translation_header &h)
    {
        return extents_offset(h) + extents_max * sizeof(ExtentRecord);
    }

    // Of these, the first exist from the start; what else cannot be had is found out by reserve() and make_present().
    static constexpr std::uint64_t head_size(const dr_translation_header &h) { return linked_offset(h); }

    SliceRecord() = default;
    // `base`: zeroes, or what an owner before has left.
    SliceRecord(std::byte *base, const dr_translation_header &h, MakePresent make_present)
        : extents_used_(reinterpret_cast<std::uint64_t *>(base)),
          reported_(reinterpret_cast<std::uint64_t *>(base) + 1),
          collapsing_(reinterpret_cast<std::uint64_t *>(base) + 2),
          unmarked_(reinterpret_cast<std::uint64_t *>(base) + 3),
          occupied_(reinterpret_cast<std::uint64_t *>(base + page)),
          linked_(reinterpret_cast<std::uint64_t *>(base + linked_offset(h))),
          extents_(reinterpret_cast<ExtentRecord *>(base + extents_offset(h))), words_(shard_tables(h.slice_lg2) / 64),
          linked_offset_(linked_offset(h)), extents_offset_(extents_offset(h)), make_present_(std::move(make_present))
    {
    }

    // Devices may set D all the time; it is reported between ENABLE and DISABLE.
    [[nodiscard]] bool reported() const { return *reported_ != 0; }
    void set_reported(bool on) { store(*reported_, on ? 1 : 0); }

    // Leaves are to be collapsed, since reporting has ended.
    [[nodiscard]] bool collapsing() const { return *collapsing_ != 0; }
    void set_collapsing(bool on) { store(*collapsing_, on ? 1 : 0); }

    // The epoch of the unmap that may have taken leaves out and has not put its marker yet; 0: there is none.
    [[nodiscard]] std::uint64_t unmarked() const { return *unmarked_; }
    void set_unmarked(std::uint64_t epoch) { store(*unmarked_, epoch); }

    // ---- tables: one bit for each of the slice's numbers ----

    [[nodiscard]] std::uint64_t words() const { return words_; }
    // The first word from `i` on in which a bit is set; words(): there is none.
    [[nodiscard]] std::uint64_t next_word(std::uint64_t i) const
    {
        while (i < words_) {
            if (const std::uint64_t rest = occupied_[i / 64] >> (i % 64); rest != 0)
                return std::min(words_, i + static_cast<unsigned>(std::countr_zero(rest)));
            i = (i / 64 + 1) * 64;
        }
        return words_;
    }
    [[nodiscard]] std::uint64_t linked_word(std::uint64_t i) const { return linked_[i]; }
    // Reads no word that is not occupied: its page may not be there.
    [[nodiscard]] bool linked(std::uint64_t number) const
    {
        return (occupied_[number / 4096] & bit(number / 64)) != 0 && (linked_[number / 64] & bit(number)) != 0;
    }
    void link(std::uint64_t number)
    {
        store(occupied_[number / 4096], occupied_[number / 4096] | bit(number / 64));
        store(linked_[number / 64], linked_[number / 64] | bit(number));
    }
    void unlink(std::uint64_t number)
    {
        store(linked_[number / 64], linked_[number / 64] & ~bit(number));
        if (linked_[number / 64] == 0)
            store(occupied_[number / 4096], occupied_[number / 4096] & ~bit(number / 64));
    }
    // The bits of tables [first, first + count) can be set.
    int make_present(std::uint64_t first, std::uint64_t count)
    {
        return make_present_(linked_offset_ + first / 8, (first + count + 7) / 8 - first / 8);
    }

    // ---- extents ----

    // There are so many slots free, at most slots_at_once. 0 or -ENOMEM.
    int reserve(std::size_t slots)
    {
        if (free_.size() >= slots)
            return 0;
        const std::uint64_t upto = present_ + slots_at_once;
        if (upto > extents_max ||
            make_present_(extents_offset_ + present_ * sizeof(ExtentRecord), slots_at_once * sizeof(ExtentRecord)) != 0)
            return -ENOMEM;
        // From here on a restart looks at these slots, which are zero.
        for (std::uint64_t slot = upto; slot > present_; --slot)
            free_.push_back(static_cast<std::uint32_t>(slot - 1));
        present_ = upto;
        store(*extents_used_, present_);
        return 0;
    }

    // Reserved before. `how`: whole, continues. The slot.
    std::uint32_t add(const Extent &e, std::uint64_t how)
    {
        const std::uint32_t slot = free_.back();
        free_.pop_back();
        ExtentRecord &r = extents_[slot];
        r.start = e.start;
        r.end = e.end;
        r.offset = e.oa - e.start;
        store(r.state, used | how | (e.rights.read ? readable : 0) | (e.rights.write ? writable : 0) |
                           std::uint64_t{e.leaf_lg2} << leaf_shift);
        return slot;
    }
    void set_whole(std::uint32_t slot) { store(extents_[slot].state, extents_[slot].state | whole); }
    [[nodiscard]] bool goes_on(std::uint32_t slot) const { return (extents_[slot].state & continues) != 0; }
    // What it continued is being unmapped: what is mapped there next is another map.
    void part(std::uint32_t slot) { store(extents_[slot].state, extents_[slot].state & ~continues); }
    // The front of it is gone.
    void cut(std::uint32_t slot, std::uint64_t start) { store(extents_[slot].start, start); }
    void set_end(std::uint32_t slot, std::uint64_t end) { store(extents_[slot].end, end); }
    void set_limit(std::uint32_t slot, unsigned leaf_lg2)
    {
        store(extents_[slot].state, (extents_[slot].state & ~leaf_mask) | std::uint64_t{leaf_lg2} << leaf_shift);
    }
    void remove(std::uint32_t slot)
    {
        store(extents_[slot].state, 0);
        free_.push_back(slot);
    }

    // ---- after a restart ----

    struct Found {
        Extent extent; // tag: its slot
        bool whole;
        bool continues;
    };

    // Calls visit(Found) for each extent, in any order.
    template <class Visit> void for_each(Visit visit) const
    {
        const std::uint64_t slots = std::min(*extents_used_, extents_max);
        for (std::uint64_t slot = 0; slot < slots; ++slot) {
            const ExtentRecord &r = extents_[slot];
            if ((r.state & used) != 0)
                visit(Found{extent(static_cast<std::uint32_t>(slot)), (r.state & whole) != 0,
                            (r.state & continues) != 0});
        }
    }

    // Takes up the slots that an owner before has left. If it died while it made two pieces of an extent, or one of
    // two, they overlap: then the first one is right.
    void restore()
    {
        present_ = std::min(*extents_used_, extents_max);
        std::vector<std::uint32_t> by_start;
        for (std::uint64_t slot = present_; slot > 0; --slot) {
            if ((extents_[slot - 1].state & used) == 0)
                free_.push_back(static_cast<std::uint32_t>(slot - 1));
            else
                by_start.push_back(static_cast<std::uint32_t>(slot - 1));
        }
        std::sort(by_start.begin(), by_start.end(), [this](std::uint32_t a, std::uint32_t b) {
            return extents_[a].start != extents_[b].start ? extents_[a].start < extents_[b].start
                                                          : extents_[a].end > extents_[b].end;
        });
        std::uint64_t end = 0;
        for (const std::uint32_t slot : by_start) {
            if (extents_[slot].end <= end)
                remove(slot);
            else if (extents_[slot].start < end)
                cut(slot, end);
            end = std::max(end, extents_[slot].end);
        }
    }

  private:
    static constexpr std::uint64_t page = 1u << table_size_lg2;
    static constexpr std::uint64_t slots_at_once = page / sizeof(ExtentRecord);

    static constexpr std::uint64_t linked_offset(const dr_translation_header &h)
    {
        return page + round_up(shard_tables(h.slice_lg2) / 512, page);
    }
    static constexpr std::uint64_t extents_offset(const dr_translation_header &h)
    {
        return linked_offset(h) + round_up(shard_tables(h.slice_lg2) / 8, page);
    }
    [[nodiscard]] Extent extent(std::uint32_t slot) const
    {
        const ExtentRecord &r = extents_[slot];
        return {r.start,
                r.end,
                r.start + r.offset,
                {(r.state & readable) != 0, (r.state & writable) != 0},
                slot,
                static_cast<unsigned>((r.state & leaf_mask) >> leaf_shift)};
    }
    static constexpr std::uint64_t bit(std::uint64_t number) { return 1ull << (number % 64); }
    // Release: what was stored before is there when a restart finds this.
    static void store(std::uint64_t &word, std::uint64_t value)
    {
        std::atomic_ref(word).store(value, std::memory_order_release);
    }

    std::uint64_t *extents_used_ = nullptr; // slots that may be in use
    std::uint64_t *reported_ = nullptr;
    std::uint64_t *collapsing_ = nullptr;
    std::uint64_t *unmarked_ = nullptr;
    std::uint64_t *occupied_ = nullptr;
    std::uint64_t *linked_ = nullptr;
    ExtentRecord *extents_ = nullptr;
    std::uint64_t words_ = 0; // of linked_
    std::uint64_t linked_offset_ = 0;
    std::uint64_t extents_offset_ = 0;
    MakePresent make_present_;
    std::vector<std::uint32_t> free_; // slots
    std::uint64_t present_ = 0;       // slots that have memory
};

} // namespace dirtyring::iommu
