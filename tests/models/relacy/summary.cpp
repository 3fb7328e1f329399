// The summary (S4), and the sync that relies on it.
#include "tests/models/relacy/suites.hpp"

#include "tests/models/relacy/hwpt.hpp"

namespace dirtyring::model {

namespace {

// Two devices dirty two pages of one line while the walker sweeps. The table bit is set from before, as when the walker
// took the line between another's line bit and its table bit.
class Summary : public Execution<Summary, 3>
{
  public:
    void prepare()
    {
        hwpt.map(0, 2 * page_size, 0);
        hwpt.enable();
        for (unsigned i = 0; i < 2; ++i)
            hwpt.read(i, i * page_size);
        memory.table_bits() |= 1ull << (Memory::lowest % 64);
        hwpt.share();
    }

    void run(unsigned thread)
    {
        if (thread < 2) {
            hwpt.write(thread, thread * page_size, 1);
            return;
        }
        for (unsigned i = 0; i < 5; ++i) {
            if (!hwpt.step())
                pause();
        }
    }

    void judge()
    {
        hwpt.sync(here());
        require(!hwpt.lost(), "a page is lost");
    }

  private:
    Hwpt hwpt{words, {.devices = 2}};
};

// One device sets D and has not come to the summary; another finds D set, completes its DMA, and then a sync is asked
// for.
class Sync : public Execution<Sync, 3>
{
  public:
    static inline std::uint64_t completed;

    void prepare()
    {
        completed = 0;
        hwpt.map(0, page_size, 0);
        hwpt.enable();
        hwpt.share();
        words.share(completed);
    }

    void run(unsigned thread)
    {
        if (thread < 2) {
            hwpt.write(thread, 0, 1);
            if (thread == 1)
                std::atomic_ref(completed).store(1, std::memory_order_release);
            return;
        }
        while (std::atomic_ref(completed).load(std::memory_order_acquire) == 0)
            pause();
        Op op;
        op.kind = Op::Kind::sync;
        hwpt.shard->submit(op);
        while (!op.over) {
            if (!hwpt.step())
                pause();
        }
        while (hwpt.take(here()) > 0) {
        }
        require(hwpt.copies[0] == 1, "not in the copy after a sync");
    }

    void judge() {}

  private:
    Hwpt hwpt{words, {.devices = 2}};
};

} // namespace

Suite summary()
{
    using enum std::memory_order;
    using enum Access;
    const void *leaf0 = &memory.leaf(0);
    const void *leaf1 = &memory.leaf(1);
    const void *line = &memory.line_word();
    const void *table = &memory.table_bits();
    return {"summary",
            "S4",
            50000,
            2,
            simulate<Summary>,
            {
                {"summary_before_dirty", "S4", Rule::summary_without_order},
                {"dirty_acq_rel",
                 "S4",
                 Rule::none,
                 {{leaf0, rmw, acq_rel, seq_cst, "set_accessed"}, {leaf1, rmw, acq_rel, seq_cst, "set_accessed"}}},
                {"line_found_acquire", "S4", Rule::none, {{line, load, acquire, seq_cst, "test_and_set"}}},
                {"line_set_acq_rel", "S4", Rule::none, {{line, rmw, acq_rel, seq_cst, "test_and_set"}}},
                {"table_found_acquire", "S4", Rule::none, {{table, load, acquire, seq_cst, "test_and_set"}}},
                {"table_set_acq_rel",
                 "S4",
                 Rule::none,
                 {{table, rmw, acq_rel, seq_cst, "test_and_set"}},
                 {},
                 "the grace before a sync's pass: else only later"},
                {"table_taken_acq_rel", "S4", Rule::none, {{table, rmw, acq_rel, seq_cst, "take_bits"}}},
                {"table_looked_at_relaxed",
                 "S4",
                 Rule::none,
                 {{table, load, relaxed, seq_cst, "take_bits"}},
                 {},
                 "the grace before a sync's pass: else only later"},
                {"line_taken_acq_rel", "S4", Rule::none, {{line, rmw, acq_rel, seq_cst, "take_bits"}}},
                {"line_looked_at_acquire", "S4", Rule::none, {{line, load, acquire, seq_cst, "take_bits"}}},
                {"leaf_read_acquire",
                 "S4",
                 Rule::none,
                 {{leaf0, load, acquire, seq_cst, "find"}, {leaf1, load, acquire, seq_cst, "find"}}},
                {"clear_relaxed",
                 "S4",
                 Rule::none,
                 {{leaf0, store, relaxed, release, "make_clean"}, {leaf1, store, relaxed, release, "make_clean"}},
                 {},
                 "Relacy's order of seq_cst, which is that of execution"},
            }};
}

Suite sync()
{
    using enum std::memory_order;
    using enum Access;
    const void *leaf = &memory.leaf(0);
    return {"sync",
            "S4 S6",
            50000,
            2,
            simulate<Sync>,
            {
                {"no_leading_grace", "S4", Rule::no_leading_grace},
                {"leaf_relaxed",
                 "S6",
                 Rule::none,
                 {{leaf, load, relaxed, seq_cst, "walk"}, {leaf, load, relaxed, seq_cst, "set_accessed"}},
                 {},
                 "Relacy's order of seq_cst, which is that of execution"},
            }};
}

} // namespace dirtyring::model
