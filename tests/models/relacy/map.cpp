// What the walker stores and devices walk: a table (S6), tracking (S7).
#include "tests/models/relacy/suites.hpp"

#include "tests/models/relacy/hwpt.hpp"

namespace dirtyring::model {

namespace {

constexpr std::uint64_t table_span = 1ull << iommu::entry_lg2(1); // of the lowest table

// A table that was given back holds a scribbled leaf. The walker cleans it and uses it again, and a device walks it
// where nothing is mapped.
class Table : public Execution<Table, 2>
{
  public:
    void prepare()
    {
        hwpt.map(0, page_size, 0);
        hwpt.enable();
        hwpt.read(0, 0);
        Op unmap;
        unmap.kind = Op::Kind::unmap;
        unmap.end = table_span;
        hwpt.work(unmap);
        memory.leaf(1) = iommu::AmdV1::accessed(iommu::AmdV1::leaf(0, 12, {true, true}), true);
        hwpt.share();
    }

    void run(unsigned thread)
    {
        if (thread == 0) {
            for (unsigned i = 0; i < 4; ++i)
                hwpt.write(0, page_size, 1);
        } else {
            hwpt.map(0, page_size, page_size);
        }
    }

    void judge() { require(memory.guest_word(0) == 0, "written by a translation that never was"); }

  private:
    Hwpt hwpt{words};
};

// A page is in the IOTLB from before. Tracking is enabled while the device writes; then the VMM copies everything.
class Tracking : public Execution<Tracking, 2>
{
  public:
    void prepare()
    {
        hwpt.map(0, page_size, 0);
        hwpt.write(0, 0, 1);
        hwpt.share();
    }

    void run(unsigned thread)
    {
        if (thread == 0) {
            for (std::uint64_t value = 2; value <= 4; ++value)
                hwpt.write(0, 0, value);
            return;
        }
        Op enable;
        enable.kind = Op::Kind::enable;
        hwpt.shard->submit(enable);
        while (!enable.over) {
            if (!hwpt.step())
                pause();
        }
        hwpt.copy(0, here());
    }

    void judge()
    {
        hwpt.sync(here());
        require(!hwpt.lost(), "a page is lost");
    }

  private:
    Hwpt hwpt{words};
};

} // namespace

Suite table()
{
    using enum std::memory_order;
    using enum Access;
    const void *link = &memory.view().entries(Memory::middle)[0];
    const void *leaf = &memory.leaf(0);
    return {"table",
            "S6",
            50000,
            5,
            simulate<Table>,
            {
                {"link_relaxed", "S6", Rule::none, {{link, rmw, relaxed, seq_cst, "replace_leaf"}}},
                {"walk_relaxed",
                 "S6",
                 Rule::none,
                 {{link, load, relaxed}, {link, rmw, relaxed, seq_cst, "set_accessed_table"}}},
                {"leaf_relaxed", "S6", Rule::none, {{leaf, store, relaxed, seq_cst, "map_leaf"}}, {}, "the link"},
            }};
}

Suite tracking()
{
    using enum std::memory_order;
    using enum Access;
    const void *tracking = &memory.control().context;
    const void *generation = &memory.generation();
    return {
        "tracking",
        "S7",
        50000,
        4,
        simulate<Tracking>,
        {
            {"no_advance", "S7", Rule::enable_without_advance},
            {"armed_after_advance", "S7", Rule::none, {}, Delay{tracking, generation}},
            {"advance_relaxed", "S7", Rule::none, {{generation, rmw, relaxed}}},
            {"generation_relaxed", "S7", Rule::none, {{generation, load, relaxed}}},
            {"armed_relaxed", "S7", Rule::none, {{tracking, store, relaxed}}, {}, "the advance behind it, a release"},
            {"armed_read_relaxed",
             "S7",
             Rule::none,
             {{tracking, load, relaxed}},
             {},
             "the generation before it, an acquire"},
        }};
}

} // namespace dirtyring::model
