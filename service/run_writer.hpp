// Turns dirty leaves into runs, straight in the ring's slots past `staged`.
#pragma once

#include "ring/producer.hpp"

#include <array>
#include <bit>
#include <cstdint>

namespace dirtyring::service {

inline constexpr unsigned line_pages = 8; // whose leaves share a cache line
inline constexpr unsigned line_runs_max = line_pages / 2;

// Some pages of a line as runs, the lowest first.
struct LineRuns {
    std::uint64_t runs = 0; // 16 bits each: its dr_run() if the line were at address 0
    std::uint8_t n = 0;
    std::uint8_t pages = 0;
    std::uint8_t end = 0;        // of the last run
    std::uint8_t last_pages = 0; // its length
};

// By which pages they are.
inline constexpr auto line_runs = [] {
    std::array<LineRuns, 1u << line_pages> all{};
    for (unsigned pages = 0; pages < all.size(); ++pages) {
        LineRuns &line = all[pages];
        for (unsigned rest = pages; rest != 0; rest &= rest + (rest & -rest)) { // without the lowest run
            const auto first = static_cast<unsigned>(std::countr_zero(rest));
            line.last_pages = static_cast<std::uint8_t>(std::countr_one(rest >> first));
            line.end = static_cast<std::uint8_t>(first + line.last_pages);
            line.pages = static_cast<std::uint8_t>(line.pages + line.last_pages);
            const std::uint64_t run = first << DR_PAGE_LG2 | line.last_pages;
            line.runs |= run << (16 * line.n++);
        }
    }
    return all;
}();

class RunWriter
{
  public:
    // Runs take at most `slots`, which are free in the ring. A run never grows into what is staged already.
    RunWriter(ring::Producer<std::uint64_t> &ring, std::uint64_t slots)
        : ring_(&ring), slots_(ring.slots()), room_(slots)
    {
    }

    // False: no slot for it; nothing was added. length: a leaf's. Inlined, so that the writer can live in registers.
    [[nodiscard, gnu::always_inline]] bool add(std::uint64_t address, std::uint64_t length)
    {
        const bool large = length >= large_unit && address % large_unit == 0;
        const unsigned unit_lg2 = large ? large_unit_lg2 : DR_PAGE_LG2;
        std::uint64_t units = length >> unit_lg2;
        const bool grows = used_ > 0 && large == large_ && address == end_ && count_ + units <= DR_RUN_MAX;
        if (grows) {
            count_ += units;
        } else {
            if (room_ - used_ < (units <= DR_RUN_MAX ? 1 : (units + DR_RUN_MAX - 1) / DR_RUN_MAX))
                return false;
            while (units > DR_RUN_MAX) {
                slots_.put(used_++, dr_run(address >> DR_PAGE_LG2, large, DR_RUN_MAX));
                address += std::uint64_t{DR_RUN_MAX} << unit_lg2;
                units -= DR_RUN_MAX;
            }
            used_++;
            first_ = address;
            large_ = large;
            count_ = units;
        }
        end_ = first_ + (count_ << unit_lg2);
        slots_.put(used_ - 1, dr_run(first_ >> DR_PAGE_LG2, large_, static_cast<std::uint32_t>(count_)));
        return true;
    }

    // Pages of one line, of which bit 0 is at `address`. How many; none when there is no room for as many runs as a line can have: add()
    // may find some. Does not branch on which pages these are: where dirt is random, each line would be mispredicted.
    [[nodiscard, gnu::always_inline]] unsigned add_line(std::uint64_t address, unsigned pages)
    {
        if (room_ - used_ < line_runs_max)
            return 0;
        const unsigned all = line_runs[pages].pages;
        if ((pages & 1) != 0 && used_ > 0 && !large_ && address == end_) {
            const auto n = static_cast<unsigned>(std::countr_one(pages));
            if (count_ + n > DR_RUN_MAX)
                return 0;
            count_ += n;
            end_ += std::uint64_t{n} << DR_PAGE_LG2;
            slots_.put(used_ - 1, dr_run(first_ >> DR_PAGE_LG2, false, static_cast<std::uint32_t>(count_)));
            pages &= pages + 1; // without these
            if (pages == 0)
                return all;
        }
        const LineRuns &line = line_runs[pages];
        for (unsigned i = 0; i < line_runs_max; ++i) // behind the last one something that the next line overwrites
            slots_.put(used_ + i, address + (line.runs >> (16 * i) & 0xffff));
        used_ += line.n;
        count_ = line.last_pages;
        end_ = address + (std::uint64_t{line.end} << DR_PAGE_LG2);
        first_ = end_ - (count_ << DR_PAGE_LG2);
        large_ = false;
        return all;
    }

    // Stages what was added; the writer goes on behind it. How many slots that were.
    std::uint64_t stage()
    {
        const std::uint64_t n = used_;
        if (n > 0)
            ring_->stage(n);
        slots_ = ring_->slots();
        room_ -= n;
        used_ = 0;
        return n;
    }

  private:
    static constexpr unsigned large_unit_lg2 = DR_PAGE_LG2 + DR_LARGE_UNIT_LG2;
    static constexpr std::uint64_t large_unit = 1ull << large_unit_lg2;

    ring::Producer<std::uint64_t> *ring_;
    ring::Producer<std::uint64_t>::Slots slots_;
    std::uint64_t room_;
    std::uint64_t used_ = 0; // slots past `staged`
    // The run in the last of them:
    std::uint64_t first_ = 0;
    std::uint64_t end_ = 0;
    std::uint64_t count_ = 0;
    bool large_ = false;
};

} // namespace dirtyring::service
