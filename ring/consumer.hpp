// The consumer's half of a ring: peek, release, arm. No system calls, no allocation; one thread.
//
// The producer's region may be hostile memory (the service consumes submissions): its words are loaded once and
// checked, and the capacity is the caller's, not the header's.
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
        : Consumer(mine, peer, capacity, mine->tail)
    {
    }
    // Continues at `tail`, which the next release stores.
    Consumer(dr_ring_consumer *mine, dr_ring_producer *peer, std::uint64_t capacity, std::uint64_t tail)
        : mine_(mine), peer_(peer), entries_(reinterpret_cast<const Entry *>(peer + 1)), capacity_(capacity),
          tail_(tail), peeked_(tail)
    {
    }

    // The next published entries, at most `max`, that lie together, in place. They stay until released; peeking again
    // gives those behind.
    [[nodiscard]] std::span<const Entry> peek(std::uint64_t max = UINT64_MAX)
    {
        if (broken_)
            return {};
        const std::uint64_t head = word(peer_->head).load(std::memory_order_acquire); // R3
        if (head - tail_ > capacity_ || head - tail_ < peeked_ - tail_) {
            broken_ = true;
            return {};
        }
        const std::uint64_t slot = peeked_ & (capacity_ - 1);
        const std::uint64_t count = std::min({head - peeked_, capacity_ - slot, max});
        peeked_ += count;
        return {entries_ + slot, count};
    }

    // True once a head outside [peeked, tail + capacity] was met; nothing is peeked any more.
    [[nodiscard]] bool peer_broke_rules() const { return broken_; }

    // Gives back the oldest n entries peeked. True: the producer waits for room and wants to be kicked.
    [[nodiscard]] bool release(std::uint64_t n)
    {
        tail_ += n;
        word(mine_->tail).store(tail_, std::memory_order_seq_cst);          // R1, R5
        return word(peer_->want_kick).load(std::memory_order_seq_cst) != 0; // R5
    }

    // Asks for a call at the next entry behind those peeked. True: there is none yet, or there will be none, so sleep;
    // false: look again.
    [[nodiscard]] bool arm()
    {
        word(mine_->armed).store(peeked_ + 1, std::memory_order_seq_cst);               // R4
        return word(peer_->head).load(std::memory_order_seq_cst) == peeked_ || broken_; // R4
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
    std::uint64_t peeked_; // in [tail, head]
    bool broken_ = false;
};

} // namespace dirtyring::ring
