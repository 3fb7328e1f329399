// Turns dirty leaves into runs, straight in the ring's slots past `staged`.
#pragma once

#include "iommu/line_scan.hpp"
#include "ring/producer.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

namespace dirtyring::service {

inline constexpr unsigned line_pages = 8; // whose leaves share a cache line
inline constexpr unsigned line_runs_max = line_pages / 2;
inline constexpr std::uint64_t line_span = std::uint64_t{line_pages} << DR_PAGE_LG2;
static_assert(line_pages == iommu::line_entries);

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

    // False: no slot for it; nothing was added. length: a leaf's.
    [[nodiscard]] bool add(std::uint64_t address, std::uint64_t length)
    {
        const bool large = length >= large_unit && address % large_unit == 0;
        const unsigned unit_lg2 = large ? large_unit_lg2 : DR_PAGE_LG2;
        std::uint64_t units = length >> unit_lg2;
        if (address == end_ && large == large_ && count_ + units <= DR_RUN_MAX) {
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
            end_ = address;
            large_ = large;
            count_ = units;
        }
        end_ += units << unit_lg2;
        slots_.put(used_ - 1,
                   dr_run((end_ - (count_ << unit_lg2)) >> DR_PAGE_LG2, large_, static_cast<std::uint32_t>(count_)));
        return true;
    }

    // What add_lines takes: lines that lie wholly in IOVAs from `start` on, `shift` behind which they are reported.
    struct Window {
        std::uint64_t start = 0;
        std::uint64_t length = 0;
        std::uint64_t shift = 0;
    };
    struct AddedLines {
        std::size_t lines;
        std::uint64_t pages;
    };

    // The pages of these lines, up to the first that is not in the window, or that only add() may find room for. Does
    // not branch on which pages a line has: where dirt is random, each would be mispredicted.
    [[nodiscard]] AddedLines add_lines(std::span<const iommu::LineEntries> lines, const Window &window,
                                       iommu::LinesAhead &ahead)
    {
        if (window.length < line_span)
            return {0, 0};
        const std::uint64_t last = window.length - line_span; // where a line can begin
        const std::span<std::uint64_t> row = slots_.row(used_);
        const std::uint64_t room = std::min<std::uint64_t>(room_ - used_, row.size());
        lines = lines.first(std::min<std::size_t>(lines.size(), room / line_runs_max));
        std::uint64_t end = large_ ? nowhere : end_;
        std::uint64_t count = count_;
        std::uint64_t *out = row.data();
        AddedLines added{0, 0};
        for (; added.lines < lines.size(); ++added.lines) {
            const iommu::LineEntries &line = lines[added.lines];
            const std::uint64_t address = line.iova + window.shift;
            unsigned mask = line.mask;
            if (line.iova - window.start > last)
                break;
            if (address == end && (mask & 1) != 0) {
                const auto n = static_cast<unsigned>(std::countr_one(mask));
                if (count + n > DR_RUN_MAX)
                    break;
                count += n;
                end += std::uint64_t{n} << DR_PAGE_LG2;
                const auto used = used_ + static_cast<std::uint64_t>(out - row.data());
                slots_.put(used - 1, page_run(end, count));
                added.pages += n;
                mask &= mask + 1; // without these
            }
            ahead.ask();
            if (mask == 0)
                continue;
            const LineRuns &runs = line_runs[mask];
#pragma GCC unroll 4
            for (unsigned i = 0; i < line_runs_max; ++i) // behind the last one something that the next line overwrites
                out[i] = address + (runs.runs >> (16 * i) & 0xffff);
            out += runs.n;
            added.pages += runs.pages;
            count = runs.last_pages;
            end = address + (std::uint64_t{runs.end} << DR_PAGE_LG2);
        }
        if (added.lines > 0) {
            used_ += static_cast<std::uint64_t>(out - row.data());
            end_ = end;
            count_ = count;
            large_ = false;
        }
        return added;
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
        end_ = nowhere;
        return n;
    }

  private:
    static constexpr unsigned large_unit_lg2 = DR_PAGE_LG2 + DR_LARGE_UNIT_LG2;
    static constexpr std::uint64_t large_unit = 1ull << large_unit_lg2;

    static constexpr std::uint64_t nowhere = 1; // no leaf begins there

    static std::uint64_t page_run(std::uint64_t end, std::uint64_t count)
    {
        return dr_run((end >> DR_PAGE_LG2) - count, false, static_cast<std::uint32_t>(count));
    }

    ring::Producer<std::uint64_t> *ring_;
    ring::Producer<std::uint64_t>::Slots slots_;
    std::uint64_t room_;
    std::uint64_t used_ = 0; // slots past `staged`
    // The run in the last of them:
    std::uint64_t end_ = nowhere;
    std::uint64_t count_ = 0;
    bool large_ = false;
};

} // namespace dirtyring::service
