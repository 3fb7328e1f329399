// The consumer's half of a ring: peek, release, arm. No system calls, no allocation; one thread.
//
// The producer's region may be hostile memory (the service consumes submissions): its words are loaded once and checked,
// and the capacity is the caller's, not the header's.
#pragma once

#include "ring/layout.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <span>

namespace dirtyring::ring {

template <class Entry> class Consumer
{
  public:
    // Continues at `mine->tail`. `capacity` is a power of two.
    Consumer(dr_ring_consumer *mine, dr_ring_producer *peer, std::uint64_t capacity)
        : mine_(mine), peer_(peer), entries_(reinterpret_cast<const Entry *>(peer + 1)), capacity_(capacity),
          tail_(mine->tail)
    {
    }

    // Published entries that lie together, in place. They stay until released.
    [[nodiscard]] std::span<const Entry> peek()
    {
        const std::uint64_t head = word(peer_->head).load(std::memory_order_acquire); // R3
        const std::uint64_t count = head - tail_;
        if (count > capacity_) {
            broken_ = true;
            return {};
        }
        const std::uint64_t slot = tail_ & (capacity_ - 1);
        return {entries_ + slot, std::min(count, capacity_ - slot)};
    }

    // True once a head outside [tail, tail + capacity] was met; nothing is peeked from such a one.
    [[nodiscard]] bool peer_broke_rules() const { return broken_; }

    // Gives back the first n entries peeked. True: the producer waits for room and wants to be kicked.
    [[nodiscard]] bool release(std::uint64_t n)
    {
        tail_ += n;
        word(mine_->tail).store(tail_, std::memory_order_seq_cst);             // R1, R5
        return word(peer_->want_kick).load(std::memory_order_seq_cst) != 0;    // R5
    }

    // Asks for a call at the next entry. True: there is none yet, so sleep; false: look again.
    [[nodiscard]] bool arm()
    {
        word(mine_->armed).store(tail_ + 1, std::memory_order_seq_cst);        // R4
        return word(peer_->head).load(std::memory_order_seq_cst) == tail_;     // R4
    }

    // Takes the wish of arm() back. Relaxed: a call too many does no harm.
    void disarm() { word(mine_->armed).store(DR_DISARMED, std::memory_order_relaxed); }

    [[nodiscard]] std::uint64_t tail() const { return tail_; }

  private:
    static std::atomic_ref<std::uint64_t> word(std::uint64_t &w) { return std::atomic_ref(w); }

    dr_ring_consumer *mine_;
    dr_ring_producer *peer_;
    const Entry *entries_;
    std::uint64_t capacity_;
    std::uint64_t tail_;
    bool broken_ = false;
};

} // namespace dirtyring::ring
