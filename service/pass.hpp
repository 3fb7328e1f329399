// One pass over the dirty lines of a slice, in as many visits as it takes.
//
// What was taken from the summary and not finished stays here, and is visited before anything else, by this pass or the next.
#pragma once

#include "iommu/slice.hpp"

#include <bit>
#include <cstdint>
#include <optional>

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

    // The next line that may hold dirty leaves, for one unit of the budget, as is each table opened. Nothing: the pass is
    // complete, or the budget is used up.
    [[nodiscard]] std::optional<iommu::Line> next(iommu::Slice<F> &slice, unsigned &budget)
    {
        while (budget > 0) {
            lines_ &= slice.existing_lines(table_); // a map change may have taken the table away since
            if (lines_ != 0) {
                --budget;
                const auto line = static_cast<unsigned>(std::countr_zero(lines_));
                lines_ &= lines_ - 1;
                return slice.line(table_, line);
            }
            if (tables_ != 0) {
                --budget;
                table_ = static_cast<std::uint32_t>(word_ * 64 + static_cast<unsigned>(std::countr_zero(tables_)));
                tables_ &= tables_ - 1;
                const std::uint64_t taken = slice.take_lines(table_);
                lines_ = whole_tables_ ? slice.existing_lines(table_) : taken;
                continue;
            }
            if (!running_ || (next_ = slice.next_word(next_)) >= slice.bit_words()) {
                running_ = false;
                full_ = false;
                return std::nullopt;
            }
            word_ = next_++;
            const std::uint64_t taken = slice.take_tables(word_);
            whole_tables_ = full_;
            tables_ = whole_tables_ ? slice.existing_tables(word_) : taken;
        }
        return std::nullopt;
    }

    // The line could not be finished: visit it again.
    void put_back(const iommu::Line &line) { lines_ |= 1ull << line.number; }

    // Lines taken and not finished, those of tables not opened yet counted as one each.
    [[nodiscard]] std::uint64_t unfinished() const
    {
        return static_cast<std::uint64_t>(std::popcount(lines_) + std::popcount(tables_));
    }

  private:
    bool running_ = false;
    bool full_ = false;         // the rest of this pass
    bool whole_tables_ = false; // what tables_ holds
    std::uint64_t next_ = 0;    // word of table bits
    std::uint64_t word_ = 0;
    std::uint64_t tables_ = 0; // of word_
    std::uint32_t table_ = 0;
    std::uint64_t lines_ = 0; // of table_
};

} // namespace dirtyring::service
