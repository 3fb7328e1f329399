// The devices' journal: one of the two judges. It knows nothing of rings or page tables: a device notes a guest page
// before it writes it and stamps it after, still inside the section; the source stamps what is reported to it. All
// stamps come from one counter, so they say whether a report came after the last write.
#pragma once

#include "client/migrate/control.hpp"

#include <atomic>
#include <cstdint>
#include <span>

namespace dirtyring::migrate {

class Journal
{
  public:
    // Stamps, 0: never. Zeroed memory is a journal in which nothing has happened.
    struct Slot {
        std::atomic<std::uint64_t> begun;    // before the data of the last write
        std::atomic<std::uint64_t> written;  // after it
        std::atomic<std::uint64_t> reported; // by the source alone
    };

    explicit Journal(std::span<Slot> slots) : slots_(slots) {}

    void begin(std::uint64_t page, std::uint64_t tick) { raise(slots_[page].begun, tick); }
    void end(std::uint64_t page, std::uint64_t tick) { raise(slots_[page].written, tick); }

    // False: nothing was written since the report before. Relaxed: a write that this report is about left its section
    // before the run was published, and the ring carries that (S1, S2); one that comes just now gets a report of its
    // own.
    bool report(std::uint64_t page, std::uint64_t tick)
    {
        Slot &slot = slots_[page];
        const bool news = slot.written.load(std::memory_order_relaxed) > slot.reported.load(std::memory_order_relaxed);
        slot.reported.store(tick, std::memory_order_relaxed);
        return news;
    }

    struct Verdict {
        std::uint64_t written = 0;    // pages
        std::uint64_t unreported = 0; // of these, pages not reported after their last write
    };

    // When all processes have ended. A write that began and did not end counts too.
    [[nodiscard]] Verdict judge() const
    {
        Verdict verdict;
        for (const Slot &slot : slots_) {
            const std::uint64_t begun = slot.begun.load(std::memory_order_relaxed);
            const std::uint64_t written = slot.written.load(std::memory_order_relaxed);
            verdict.written += begun != 0;
            verdict.unreported +=
                begun != 0 && slot.reported.load(std::memory_order_relaxed) < std::max(begun, written);
        }
        return verdict;
    }

  private:
    // Several devices may write one page, and stamps may be stored in another order than drawn: the latest counts.
    static void raise(std::atomic<std::uint64_t> &stamp, std::uint64_t tick)
    {
        std::uint64_t seen = stamp.load(std::memory_order_relaxed);
        while (seen < tick && !stamp.compare_exchange_weak(seen, tick, std::memory_order_relaxed)) {
        }
    }

    std::span<Slot> slots_;
};

} // namespace dirtyring::migrate
