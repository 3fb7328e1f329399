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
            for (iommu::Lines &lines : at_hand_.all()) {
                if (lines.mask == 0)
                    continue;
                // Now: a map change may have taken the table away since.
                lines.mask &= slice.existing_lines(lines.table);
                budget -= std::min(budget, static_cast<unsigned>(std::popcount(lines.mask)));
                any |= lines.mask;
            }
            if (any != 0)
                return at_hand_.all();
            next_lines_.ask_rest();
            at_hand_ = next_tables_;
            take(slice);
            if (at_hand_.used + next_tables_.used == 0) {
                running_ = false;
                full_ = false;
                return {};
            }
            budget -= std::min(budget, at_hand_.used);
        }
        return {};
    }

    // Those behind the ones at hand.
    [[nodiscard]] iommu::LinesAhead &ahead() { return next_lines_; }

    // Lines taken and not finished, those of tables not opened yet counted as one each.
    [[nodiscard]] std::uint64_t unfinished() const
    {
        auto n = static_cast<std::uint64_t>(std::popcount(tables_));
        for (const Group *group : {&at_hand_, &next_tables_}) {
            for (const iommu::Lines &lines : std::span(group->tables).first(group->used))
                n += static_cast<std::uint64_t>(std::popcount(lines.mask));
        }
        return n;
    }

  private:
    struct Group {
        std::array<iommu::Lines, iommu::tables_at_once> tables{};
        unsigned used = 0;
        [[nodiscard]] std::span<iommu::Lines> all() { return std::span(tables).first(used); }
    };

    // Takes the lines of some tables from the summary, so that they are on their way when it is their turn.
    void take(const iommu::Slice<F> &slice)
    {
        next_tables_.used = 0;
        while (next_tables_.used < iommu::tables_at_once && (tables_ != 0 || take_word(slice))) {
            const auto bit = static_cast<unsigned>(std::countr_zero(tables_));
            tables_ &= tables_ - 1;
            iommu::Lines &lines = next_tables_.tables[next_tables_.used++];
            lines = {static_cast<std::uint32_t>(word_ * 64 + bit), whole_tables_ ? ~0ull : 0};
            slice.prefetch_word(lines.table);
        }
        next_lines_.clear();
        for (iommu::Lines &lines : next_tables_.all()) {
            lines.mask |= slice.take_lines(lines.table);
            if (!whole_tables_) // those are read in a row
                slice.list(lines, next_lines_);
        }
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
    Group at_hand_;
    Group next_tables_;
    iommu::LinesAhead next_lines_; // of next_tables_
};

} // namespace dirtyring::service
