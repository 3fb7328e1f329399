// What a guest's home walker must know again after its process has died: which commands it has taken, and how far each
// has come. Kept in memory that outlives the process and that no peer sees.
//
//   free ──► taken ──► begun ───────────────────► done ──► free
//              │         └──► rolling_back ────────▲
//              └───────────────────────────────────┘ refused, or nothing to do
//
// A killed process leaves what it had stored so far, thread by thread in the order of its releases: so each step is one
// store, and what a step needs is stored before.
//
//   step                                     a death behind it, and before the next, leaves
//   J1  the record; state taken              the command in its record and in the ring: the tail goes behind it at the
//                                            restart
//   J2  submissions: tail                    a command of which nothing is done: it is tried as if it were new
//   J3  its epoch; state begun               any part of it done or not: all of it is done again, and shards find what
//                                            is done
//   J4  the error; state rolling_back        a map with some parts taken out, some not: all are taken out, again
//   J5  completion, completed_at; state done a completion that nobody has seen, as head is not beyond completed_at: put
//                                            again
//   J6  completions: slot, staged, head      one that may have been seen, as head is beyond completed_at: it is not put
//                                            again
//   J7  state free                           nothing
//
// What makes no sense (only a bug of ours could write it) completes with -EIO: nobody knows what was done, and nobody
// shall wait for it.
//
// One thread: the home walker's.
#pragma once

#include "iommu/rules.hpp"
#include "ring/layout.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>
#include <tuple>
#include <vector>

namespace dirtyring::service {

// Release: what was stored before is there when a restart finds this.
inline void record_word(std::uint64_t &word, std::uint64_t value)
{
    std::atomic_ref(word).store(value, std::memory_order_release);
}

// What the home walker must know again of an hwpt. Zeroes at first; kept as the journal is, one for each hwpt.
struct HwptRecord {
    std::uint64_t epoch;   // of the last unmap
    std::uint64_t enabled; // 1: its last change of tracking that has begun turns it on
};
static_assert(sizeof(HwptRecord) == 16, "a later worker reads it");

struct CommandRecord {
    enum State : std::uint64_t { free, taken, begun, rolling_back, done };

    dr_command request;
    std::uint64_t index;        // in the submission ring
    std::uint64_t epoch;        // begun: the unmap's, or 0
    std::uint64_t note;         // begun: of its parts, see ShardOp::note
    dr_completion completion;   // rolling_back: only its result; done
    std::uint64_t completed_at; // done: index in the completion ring
    std::uint64_t state;        // stored last
};
static_assert(sizeof(CommandRecord) == 136, "a later worker reads it");

class CommandJournal
{
  public:
    // `records`: one for each entry of the command ring; zeroes, or what a worker before has left, together with `tail`
    // of the submissions and `head` of the completions.
    CommandJournal(std::span<CommandRecord> records, std::uint64_t tail, std::uint64_t head)
        : capacity_(records.size()), tail_(tail)
    {
        for (CommandRecord &r : records) {
            const bool seen = r.state == CommandRecord::done && r.completed_at < head;
            if (seen || r.state == CommandRecord::free)
                release(r);
            else
                left_.push_back(&r);
        }
        drop_nonsense(tail + capacity_);
        std::sort(left_.begin(), left_.end(), [](const CommandRecord *a, const CommandRecord *b) {
            const auto rank = [](const CommandRecord &r) {
                const bool done = r.state == CommandRecord::done;
                return std::tuple(!done, done ? r.completed_at : r.index);
            };
            return rank(*a) < rank(*b);
        });
    }

    // What a worker before has not ended: first the done, as they were to be completed, then the others, as they were
    // submitted.
    [[nodiscard]] const std::vector<CommandRecord *> &left() const { return left_; }
    // Of the submissions: behind all that were taken.
    [[nodiscard]] std::uint64_t tail() const { return tail_; }
    [[nodiscard]] std::size_t in_use() const { return capacity_ - free_.size(); }

    // in_use() < capacity.
    CommandRecord &take(const dr_command &request, std::uint64_t index)
    {
        assert(!free_.empty());
        CommandRecord &r = *free_.back();
        free_.pop_back();
        r.request = request;
        r.index = index;
        r.note = 0;
        if (!broken(Rule::commands_not_recorded))
            record_word(r.state, CommandRecord::taken); // J1
        return r;
    }

    static void begin(CommandRecord &r, std::uint64_t epoch)
    {
        r.epoch = epoch;
        if (!broken(Rule::commands_not_recorded))
            record_word(r.state, CommandRecord::begun); // J3
    }

    static void roll_back(CommandRecord &r, int result)
    {
        r.completion.result = result;
        if (!broken(Rule::commands_not_recorded))
            record_word(r.state, CommandRecord::rolling_back); // J4
    }

    static void finish(CommandRecord &r, const dr_completion &completion, std::uint64_t at)
    {
        r.completion = completion;
        r.completed_at = at;
        record_word(r.state, CommandRecord::done); // J5
    }

    void release(CommandRecord &r)
    {
        record_word(r.state, CommandRecord::free); // J7
        free_.push_back(&r);
    }

  private:
    void drop_nonsense(std::uint64_t end)
    {
        std::sort(left_.begin(), left_.end(),
                  [](const CommandRecord *a, const CommandRecord *b) { return a->index < b->index; });
        const CommandRecord *before = nullptr;
        for (CommandRecord *r : left_) {
            if (r->state > CommandRecord::done || r->index >= end || (before != nullptr && before->index == r->index))
                finish(*r, {r->request.user_data, -EIO, 0, 0, 0}, UINT64_MAX);
            else
                tail_ = std::max(tail_, r->index + 1);
            before = r;
        }
    }

    std::size_t capacity_;
    std::uint64_t tail_;
    std::vector<CommandRecord *> free_;
    std::vector<CommandRecord *> left_;
};

} // namespace dirtyring::service
