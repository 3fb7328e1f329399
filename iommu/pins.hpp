// Pins: DMA in flight without a section (edges P1 to P4 of iommu/layout.h).
#pragma once

#include "iommu/layout.h"
#include "iommu/rules.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace dirtyring::iommu {

// A device's threads as owners know them.
struct DmaThreads {
    std::span<dr_cell> cells;
    std::span<dr_pin> pins; // as many for each cell

    [[nodiscard]] std::span<dr_pin> pins_of(std::size_t cell) const
    {
        const std::size_t each = pins.size() / cells.size();
        return pins.subspan(cell * each, each);
    }
};

// What a slot stands for.
struct PinRange {
    std::uint64_t start;
    std::uint64_t last;
    bool write;
};

// A DMA thread's slots, from its owner's side. No allocation.
class Pins
{
  public:
    static constexpr unsigned slots_max = 4096;

    Pins(dr_cell *cell, std::span<dr_pin> slots) : cell_(cell), slots_(slots), pinned_(cell->pinned)
    {
        for (unsigned i = 0; i < slots.size(); ++i)
            free_[free_count_++] = static_cast<std::uint16_t>(slots.size() - 1 - i);
    }

    // Inside a section, before the range is translated. Nothing: all slots are held.
    [[nodiscard]] std::optional<unsigned> take(const PinRange &range)
    {
        if (free_count_ == 0)
            return std::nullopt;
        const unsigned slot = free_[--free_count_];
        dr_pin &pin = slots_[slot];
        std::atomic_ref(pin.start).store(range.start, std::memory_order_release); // P4
        std::atomic_ref(pin.last).store(range.last, std::memory_order_release);   // P4
        std::atomic_ref(pin.write).store(range.write, std::memory_order_release); // P4
        std::atomic_ref(cell_->pinned)
            .store(++pinned_, std::memory_order_seq_cst); // P1: before any look at what is closed
        std::atomic_ref(pin.count).store(pin.count + 1, std::memory_order_seq_cst); // P1
        return slot;
    }

    [[nodiscard]] bool held(unsigned slot) const { return slot < slots_.size() && (slots_[slot].count & 1) != 0; }
    [[nodiscard]] unsigned count() const { return static_cast<unsigned>(pinned_); }

    [[nodiscard]] PinRange range(unsigned slot) const
    {
        return {slots_[slot].start, slots_[slot].last, slots_[slot].write != 0};
    }

    void give_back(unsigned slot)
    {
        dr_pin &pin = slots_[slot];
        std::atomic_ref(pin.count).store(pin.count + 1,
                                         std::memory_order_seq_cst); // P2: after the marks; P3: before asleep
        std::atomic_ref(cell_->pinned).store(--pinned_, std::memory_order_release);
        free_[free_count_++] = static_cast<std::uint16_t>(slot);
    }

  private:
    dr_cell *cell_;
    std::span<dr_pin> slots_;
    std::uint64_t pinned_; // only this thread writes the cell and the slots
    unsigned free_count_ = 0;
    std::uint16_t free_[slots_max];
};

// Which IOVAs of a shard must not be pinned now: the owner writes, devices look.
class Closing
{
  public:
    explicit Closing(dr_shard_control &control) : control_(control) {}

    // Does a range that is closed overlap [start, last]?
    [[nodiscard]] bool covers(std::uint64_t start, std::uint64_t last) const
    {
        for (;;) {
            const std::uint64_t version = load_sc(control_.closing); // P1: after the slot
            const dr_closed &closed = control_.closed[version & 1];
            const std::uint64_t count = std::min<std::uint64_t>(load(closed.count), DR_CLOSED_MAX);
            bool found = false;
            for (std::uint64_t i = 0; i < count && !found; ++i)
                found = load(closed.range[i].start) <= last && start <= load(closed.range[i].last);
            if (load_sc(control_.closing) == version)
                return found;
        }
    }

    // Opens all: the owner before is dead, and closes again what it takes up again.
    void open_all()
    {
        change([](dr_closed &closed, const dr_closed &) { store(closed.count, 0); });
    }

    // Ranges that can still be closed.
    [[nodiscard]] std::uint64_t room() const { return DR_CLOSED_MAX - current().count; }

    void close(std::uint64_t start, std::uint64_t last)
    {
        change([&](dr_closed &closed, const dr_closed &now) {
            copy(closed, now, [](std::uint64_t) { return true; });
            put(closed, now.count, start, last);
            store(closed.count, now.count + 1);
        });
    }

    // What close() closed; one range begins at `start`.
    void open(std::uint64_t start)
    {
        change([&](dr_closed &closed, const dr_closed &now) {
            store(closed.count, copy(closed, now, [&](std::uint64_t s) { return s != start; }));
        });
    }

  private:
    static std::uint64_t load(const std::uint64_t &word)
    {
        // const_cast: atomic_ref wants a non-const object, also to load.
        return std::atomic_ref(const_cast<std::uint64_t &>(word)).load(std::memory_order_acquire);
    }
    static std::uint64_t load_sc(const std::uint64_t &word)
    {
        return std::atomic_ref(const_cast<std::uint64_t &>(word)).load(std::memory_order_seq_cst);
    }
    static void store(std::uint64_t &word, std::uint64_t value)
    {
        std::atomic_ref(word).store(value, std::memory_order_release);
    }

    [[nodiscard]] const dr_closed &current() const { return control_.closed[control_.closing & 1]; }

    static void put(dr_closed &closed, std::uint64_t at, std::uint64_t start, std::uint64_t last)
    {
        store(closed.range[at].start, start);
        store(closed.range[at].last, last);
    }

    template <class Keep> static std::uint64_t copy(dr_closed &to, const dr_closed &from, Keep keep)
    {
        std::uint64_t count = 0;
        for (std::uint64_t i = 0; i < from.count; ++i) {
            if (keep(from.range[i].start))
                put(to, count++, from.range[i].start, from.range[i].last);
        }
        return count;
    }

    template <class Write> void change(Write write)
    {
        const std::uint64_t next = control_.closing + 1;
        write(control_.closed[next & 1], current());
        std::atomic_ref(control_.closing).store(next, std::memory_order_seq_cst); // P1: before the slots are sampled
    }

    dr_shard_control &control_;
};

// A held slot that was sampled, from the walker's side. The slot is hostile memory.
struct SampledPin {
    dr_pin *pin;
    std::uint64_t count;

    [[nodiscard]] bool passed() const
    {
        return std::atomic_ref(pin->count).load(std::memory_order_seq_cst) != count; // P2; P3: after asleep
    }
};

// Calls visit(pin, count, range) if the slot is held.
template <class Visit> void if_held(dr_pin &pin, Visit visit)
{
    const std::uint64_t count = std::atomic_ref(pin.count).load(std::memory_order_seq_cst); // P1: after closing
    if ((count & 1) == 0)
        return;
    const PinRange range{std::atomic_ref(pin.start).load(std::memory_order_acquire), // P4
                         std::atomic_ref(pin.last).load(std::memory_order_acquire),
                         std::atomic_ref(pin.write).load(std::memory_order_acquire) != 0};
    if (std::atomic_ref(pin.count).load(std::memory_order_seq_cst) == count)
        visit(count, range);
}

// The wait for the pins of a range that were held when it began. Devices may come and go meanwhile.
class PinWait
{
  public:
    // Pins that touch [start, end), half-open.
    PinWait(std::uint64_t start, std::uint64_t end, bool writes_only)
        : start_(start), last_(end - 1), writes_only_(writes_only)
    {
    }

    // True: they are gone. Samples at most `budget` slots, and does not wait.
    [[nodiscard]] bool passed(const std::vector<DmaThreads> &devices, unsigned &budget)
    {
        for (; device_ < devices.size(); ++device_, cell_ = slot_ = 0) {
            const DmaThreads &threads = devices[device_];
            for (; cell_ < threads.cells.size(); ++cell_, slot_ = 0) {
                if (budget == 0)
                    return false;
                --budget;
                if (std::atomic_ref(threads.cells[cell_].pinned).load(std::memory_order_seq_cst) == 0) // P1
                    continue;
                const std::span<dr_pin> pins = threads.pins_of(cell_);
                for (; slot_ < pins.size(); ++slot_) {
                    if (budget == 0)
                        return false;
                    --budget;
                    sample(pins[slot_]);
                }
            }
        }
        while (!waiting_.empty() && waiting_.back().passed())
            waiting_.pop_back();
        return waiting_.empty();
    }

    // True: all slots have been sampled, so only devices can end the wait.
    [[nodiscard]] bool sampled(const std::vector<DmaThreads> &devices) const { return device_ >= devices.size(); }
    // There was one to wait for.
    [[nodiscard]] bool met_any() const { return met_any_; }

    // The device is gone: `index` of the list it is about to leave.
    void forget(std::size_t index, const DmaThreads &threads)
    {
        const dr_pin *first = threads.pins.data();
        std::erase_if(waiting_,
                      [&](const SampledPin &p) { return p.pin >= first && p.pin < first + threads.pins.size(); });
        if (index < device_)
            --device_;
        else if (index == device_)
            cell_ = slot_ = 0;
    }

  private:
    void sample(dr_pin &pin)
    {
        if_held(pin, [&](std::uint64_t count, const PinRange &range) {
            if (range.start <= last_ && start_ <= range.last && (range.write || !writes_only_)) {
                waiting_.push_back({&pin, count});
                met_any_ = true;
            }
        });
    }

    std::uint64_t start_;
    std::uint64_t last_;
    bool writes_only_;
    bool met_any_ = false;
    std::size_t device_ = 0; // the next slot to sample
    std::size_t cell_ = 0;
    std::size_t slot_ = 0;
    std::vector<SampledPin> waiting_;
};

} // namespace dirtyring::iommu
