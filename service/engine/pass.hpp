// One pass over the dirty lines of a slice, in as many visits as it takes.
//
// What was taken from the summary and not finished stays here, and is visited before anything else, by this pass or the
// next. Tables are taken ahead in groups, so that memory is busy with the next ones while those at hand are looked at:
//
//   table bits ─▶ marked_: line words are asked for ─▶ ahead(): words taken, lines are asked for ─▶ at_hand()
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

    // The next tables with lines that may hold dirty leaves; each line, and each table, is one unit of the budget. What
    // the caller leaves in the masks comes again. Nothing: the pass is complete, or the budget is used up.
    [[nodiscard]] std::span<iommu::Lines> next(const iommu::Slice<F> &slice, unsigned &budget)
    {
        while (budget > 0) {
            std::uint64_t any = 0;
            for (iommu::Lines &lines : at_hand().all()) {
                if (lines.mask != 0) // now: a map change may have taken the table away since
                    lines.mask &= slice.existing_lines(lines.table);
                any |= lines.mask;
            }
            if (any != 0)
                return at_hand().all();
            lines_ahead_.ask_rest();
            which_ = 1 - which_;
            take(slice);
            if (at_hand().used + ahead().used == 0) {
                running_ = false;
                full_ = false;
                return {};
            }
            budget -= static_cast<unsigned>(std::min<std::size_t>(budget, at_hand().used + at_hand().lines));
        }
        return {};
    }

    // The lines behind the ones at hand.
    [[nodiscard]] iommu::LinesAhead &lines_ahead() { return lines_ahead_; }

    // Lines taken and not finished, those of tables not opened yet counted as one each.
    [[nodiscard]] std::uint64_t unfinished() const
    {
        auto n = static_cast<std::uint64_t>(std::popcount(tables_)) + (marked_used_ - marked_next_);
        for (const Group &group : groups_) {
            for (const iommu::Lines &lines : group.all())
                n += static_cast<std::uint64_t>(std::popcount(lines.mask));
        }
        return n;
    }

  private:
    struct Group {
        std::array<iommu::Lines, iommu::tables_at_once> tables{};
        unsigned used = 0;
        std::size_t lines = 0; // of all of them
        [[nodiscard]] std::span<iommu::Lines> all() { return std::span(tables).first(used); }
        [[nodiscard]] std::span<const iommu::Lines> all() const { return std::span(tables).first(used); }
    };

    [[nodiscard]] Group &at_hand() { return groups_[which_]; }
    // Those behind them.
    [[nodiscard]] Group &ahead() { return groups_[1 - which_]; }

    // Takes the lines of some tables from the summary, and lists them; those of whole tables are read in a row.
    void take(const iommu::Slice<F> &slice)
    {
        Group &group = ahead();
        group.used = 0;
        lines_ahead_.clear();
        std::size_t whole = 0;
        while (group.used < group.tables.size() && lines_ahead_.size() < iommu::lines_wanted) {
            if (marked_next_ == marked_used_ && !mark(slice))
                break;
            iommu::Lines &lines = group.tables[group.used++];
            lines = marked_[marked_next_++];
            const bool listed = lines.mask == 0;
            lines.mask |= slice.take_lines(lines.table);
            if (listed)
                slice.list(lines, lines_ahead_);
            else
                ++whole;
        }
        group.lines = whole * iommu::table_lines + lines_ahead_.size();
    }

    // Asks for the line words of the next tables. False: that was all.
    bool mark(const iommu::Slice<F> &slice)
    {
        marked_next_ = marked_used_ = 0;
        while (marked_used_ < marked_.size() && (tables_ != 0 || take_word(slice))) {
            const auto bit = static_cast<unsigned>(std::countr_zero(tables_));
            tables_ &= tables_ - 1;
            iommu::Lines &lines = marked_[marked_used_++];
            lines = {static_cast<std::uint32_t>(word_ * 64 + bit), whole_tables_ ? ~0ull : 0};
            slice.prefetch_word(lines.table);
        }
        return marked_used_ > 0;
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
    std::uint64_t tables_ = 0;            // of word_
    std::array<iommu::Lines, 64> marked_; // those of whole tables have a mask
    unsigned marked_used_ = 0;
    unsigned marked_next_ = 0;
    std::array<Group, 2> groups_;
    unsigned which_ = 0; // is at hand
    iommu::LinesAhead lines_ahead_;
};

} // namespace dirtyring::service
