// The producer's half of a ring: reserve, stage, publish. No system calls, no allocation; one thread.
//
// The consumer's region is hostile memory: its words are loaded once, checked, and only the copy is used.
#pragma once

#include "ring/layout.h"

#include <atomic>
#include <bit>
#include <cassert>
#include <cstdint>
#include <span>

namespace dirtyring::ring {

template <class Entry> class Producer
{
  public:
    // `mine` is writable and carries a whole header; its indices are taken up from there. `promised`: slots past head
    // that were seen free before a restart, at most the capacity.
    Producer(dr_ring_producer *mine, dr_ring_consumer *peer, std::uint64_t promised = 0)
        : mine_(mine), peer_(peer), entries_(reinterpret_cast<Entry *>(mine + 1)), capacity_(mine->header.capacity),
          head_(mine->head), staged_(mine->staged), tail_(head_ - capacity_ + promised)
    {
        assert(std::has_single_bit(capacity_) && mine->header.entry_size == sizeof(Entry));
        refresh();
    }

    [[nodiscard]] std::uint64_t capacity() const { return capacity_; }
    [[nodiscard]] std::uint64_t staged() const { return staged_; }
    [[nodiscard]] std::uint64_t head() const { return head_; }

    // Free slots past `staged`.
    [[nodiscard]] std::uint64_t room()
    {
        refresh();
        return capacity_ - (staged_ - tail_);
    }

    // True when the consumer has released all that was published.
    [[nodiscard]] bool released()
    {
        refresh();
        return tail_ == head_;
    }

    // True once a tail outside [last seen, head] was met; it was ignored.
    [[nodiscard]] bool peer_broke_rules() const { return broken_; }

    // Where entries go, until the next stage(): slot `ahead` is that many entries past `staged`; ahead < room(). By
    // itself, since entries may be what the compiler takes for the producer's members.
    class Slots
    {
      public:
        Slots(Entry *entries, std::uint64_t first, std::uint64_t mask) : entries_(entries), first_(first), mask_(mask)
        {
        }
        void put(std::uint64_t ahead, const Entry &entry) const { entries_[(first_ + ahead) & mask_] = entry; }
        // The same slot, and how many lie in a row from there on before the ring's memory begins anew.
        [[nodiscard]] std::span<Entry> row(std::uint64_t ahead) const
        {
            const std::uint64_t at = (first_ + ahead) & mask_;
            return {entries_ + at, mask_ + 1 - at};
        }

      private:
        Entry *entries_;
        std::uint64_t first_;
        std::uint64_t mask_;
    };
    [[nodiscard]] Slots slots() const { return {entries_, staged_, capacity_ - 1}; }
    void put(std::uint64_t ahead, const Entry &entry) { slots().put(ahead, entry); }

    // The entry below `staged`; there has been one.
    [[nodiscard]] const Entry &last() const { return entries_[(staged_ - 1) & (capacity_ - 1)]; }

    // Makes the first n slots past `staged` part of what a restart publishes.
    void stage(std::uint64_t n)
    {
        staged_ += n;
        word(mine_->staged).store(staged_, std::memory_order_release); // R2
    }

    // Takes back what is staged and not published.
    void unstage()
    {
        staged_ = head_;
        word(mine_->staged).store(staged_, std::memory_order_release); // R2
    }

    // Makes all that is staged visible. True: the consumer asked to be called.
    [[nodiscard]] bool publish()
    {
        const std::uint64_t before = head_;
        head_ = staged_;
        word(mine_->head).store(head_, std::memory_order_seq_cst);                      // R3, R4
        const std::uint64_t armed = word(peer_->armed).load(std::memory_order_seq_cst); // R4
        return armed - before - 1 < head_ - before;                                     // armed in (before, head]
    }

    // Asks the consumer for a kick at its next release, or takes the wish back. After asking, look at room() again.
    void want_kick(bool wanted)
    {
        word(mine_->want_kick).store(wanted ? 1 : 0, std::memory_order_seq_cst); // R5
    }

    // Statistics that the consumer may read.
    void report_pending(std::uint64_t lines, std::uint64_t full_since_ns)
    {
        word(mine_->pending).store(lines, std::memory_order_relaxed);
        word(mine_->full_since).store(full_since_ns, std::memory_order_relaxed);
    }

  private:
    static std::atomic_ref<std::uint64_t> word(std::uint64_t &w) { return std::atomic_ref(w); }

    void refresh()
    {
        // R1 and, after want_kick, R5: seq_cst includes the acquire.
        const std::uint64_t tail = word(peer_->tail).load(std::memory_order_seq_cst);
        if (tail - tail_ <= head_ - tail_) {
            tail_ = tail;
        } else {
            broken_ = true;
        }
    }

    dr_ring_producer *mine_;
    dr_ring_consumer *peer_;
    Entry *entries_;
    std::uint64_t capacity_;
    std::uint64_t head_;
    std::uint64_t staged_;
    std::uint64_t tail_; // last good one; at first the oldest that could be
    bool broken_ = false;
};

// Fills in the header of a zeroed producer region; the version comes last (R6).
inline void make_producer_region(dr_ring_producer *region, dr_ring_header header)
{
    header.magic = DR_RING_MAGIC;
    header.version = 0;
    region->header = header;
    std::atomic_ref(region->header.version).store(DR_RING_VERSION, std::memory_order_release); // R6
}

// Bytes of a producer region, whole pages.
inline std::uint64_t producer_region_size(std::uint64_t capacity, std::uint64_t entry_size)
{
    return (DR_PAGE + capacity * entry_size + DR_PAGE - 1) & ~std::uint64_t{DR_PAGE - 1};
}

// A region of `size` bytes is that of a ring whose entries have `entry_size` bytes.
inline bool is_producer_region(const dr_ring_producer &region, std::uint64_t size, std::uint64_t entry_size)
{
    const dr_ring_header &h = region.header;
    return h.magic == DR_RING_MAGIC && h.version == DR_RING_VERSION && h.entry_size == entry_size &&
           std::has_single_bit(h.capacity) && h.capacity <= size / entry_size &&
           producer_region_size(h.capacity, entry_size) == size;
}

// Its producer before can have left it so: no more is staged than there are slots.
inline bool has_whole_indices(const dr_ring_producer &region)
{
    return region.staged - region.head <= region.header.capacity;
}

} // namespace dirtyring::ring
