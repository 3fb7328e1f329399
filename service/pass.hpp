// One pass over the dirty lines of a slice, in as many visits as it takes.
//
// What was taken from the summary and not finished stays here, and is visited before anything else, by this pass or the next. Some
// tables are taken ahead, so that their lines are on their way while those before are looked at.
#pragma once

#include "iommu/slice.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <span>

namespace dirtyring::service {

template <iommu::Format F> class Pass
{
  public:
    [[nodiscard]] bool running() const { return running_; }

    // Begins anew, after what is already taken. full: visit every line, whatever the summary says.
    void begin(bool full)
    {
        running_ = true;
        next_ = 0;
        full_ = full_ || full;
    }

    // Drops what was taken.
    void abandon() { *this = {}; }

    // The next tables with lines that may hold dirty leaves; each line, and each table, is one unit of the budget. What the caller leaves
    // in the masks comes again. Nothing: the pass is complete, or the budget is used up.
    [[nodiscard]] std::span<iommu::Lines> next(const iommu::Slice<F> &slice, unsigned &budget)
    {
        while (budget > 0) {
            std::uint64_t any = 0;
            for (iommu::Lines &lines : ahead()) {
                if (lines.mask == 0)
                    continue;
                // Now: a map change may have taken the table away since.
                lines.mask &= slice.existing_lines(lines.table);
                budget -= std::min(budget, static_cast<unsigned>(std::popcount(lines.mask)));
                any |= lines.mask;
            }
            if (any != 0)
                return ahead();
            if (!take_ahead(slice)) {
                running_ = false;
                full_ = false;
                return {};
            }
            budget -= std::min(budget, ahead_used_);
        }
        return {};
    }

    // Lines taken and not finished, those of tables not opened yet counted as one each.
    [[nodiscard]] std::uint64_t unfinished() const
    {
        auto n = static_cast<std::uint64_t>(std::popcount(tables_));
        for (const iommu::Lines &lines : std::span(ahead_).first(ahead_used_))
            n += static_cast<std::uint64_t>(std::popcount(lines.mask));
        return n;
    }

    // Of tables that come together.
    static constexpr unsigned lines_at_once_max = 16 * iommu::table_lines;

  private:
    static constexpr unsigned tables_ahead = lines_at_once_max / iommu::table_lines;
    static constexpr unsigned whole_tables_ahead = 4; // have room in the first level of a cache

    [[nodiscard]] std::span<iommu::Lines> ahead() { return std::span(ahead_).first(ahead_used_); }

    // Takes the lines of some tables. False: there are none left.
    bool take_ahead(const iommu::Slice<F> &slice)
    {
        ahead_used_ = 0;
        while (ahead_used_ < (whole_tables_ ? whole_tables_ahead : tables_ahead) &&
               (tables_ != 0 || take_word(slice))) {
            const auto bit = static_cast<unsigned>(std::countr_zero(tables_));
            tables_ &= tables_ - 1;
            ahead_[ahead_used_] = {static_cast<std::uint32_t>(word_ * 64 + bit), whole_tables_ ? ~0ull : 0};
            slice.prefetch_word(ahead_[ahead_used_++].table);
        }
        for (iommu::Lines &lines : ahead()) {
            lines.mask |= slice.take_lines(lines.table);
            slice.prefetch(lines);
        }
        return ahead_used_ > 0;
    }

    // The next tables that may have dirty lines. False: that was all.
    bool take_word(const iommu::Slice<F> &slice)
    {
        while (running_ && tables_ == 0) {
            next_ = full_ ? slice.next_word(next_) : slice.next_marked_word(next_);
            if (next_ >= slice.bit_words())
                return false;
            word_ = next_++;
            const std::uint64_t taken = slice.take_tables(word_);
            whole_tables_ = full_;
            tables_ = whole_tables_ ? slice.existing_tables(word_) : taken;
        }
        return tables_ != 0;
    }

    bool running_ = false;
    bool full_ = false;         // the rest of this pass
    bool whole_tables_ = false; // what tables_ holds
    std::uint64_t next_ = 0;    // word of table bits
    std::uint64_t word_ = 0;
    std::uint64_t tables_ = 0; // of word_
    std::array<iommu::Lines, tables_ahead> ahead_{};
    unsigned ahead_used_ = 0;
};

} // namespace dirtyring::service
