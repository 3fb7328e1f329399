// Pins: who takes translations away, or promises that DMA is over, waits for them (P1, P2, P4). The walker's sleep is
// in sleep.cpp.
#include "tests/models/relacy/suites.hpp"

#include "tests/models/relacy/hwpt.hpp"

namespace dirtyring::model {

namespace {

// Of P2 in an unmap and in a sync: what happens before the give-back happens before the end of its section too.
const char *const carried = "the unpin's section, for which the next grace period waits";

// Pins the first page in a section of its own.
bool pin(Hwpt &hwpt, unsigned &slot)
{
    iommu::DmaFault fault;
    hwpt.devices[0]->enter();
    const int error = hwpt.devices[0]->pin(0, page_size, true, slot, fault, [](auto...) {});
    static_cast<void>(hwpt.devices[0]->leave());
    return error == 0;
}

// The data lands, then the pin is given back.
void land(Hwpt &hwpt, unsigned slot, std::uint64_t value)
{
    memory.guest_word(0) = value;
    hwpt.devices[0]->enter();
    hwpt.devices[0]->unpin(slot);
    static_cast<void>(hwpt.devices[0]->leave());
}

// A device pins a page while it is unmapped. Once the unmap is over, its DMA is reported and the memory is the VMM's.
class PinUnmap : public Execution<PinUnmap, 2>
{
  public:
    void prepare()
    {
        hwpt.map(0, page_size, 0);
        hwpt.enable();
        hwpt.read(0, 0);
        hwpt.share_but_guest();
        words.share_plain(memory.guest_word(0));
    }

    void run(unsigned thread)
    {
        if (thread == 0) {
            unsigned slot = 0;
            if (pin(hwpt, slot)) {
                land(hwpt, slot, 1);
                landed_ = true;
            }
            return;
        }
        Op unmap;
        unmap.kind = Op::Kind::unmap;
        unmap.end = page_size;
        hwpt.shard->submit(unmap);
        while (!unmap.over) {
            if (!hwpt.step())
                pause();
        }
        while (hwpt.take(here()) > 0) {
        }
        memory.guest_word(0) = 2; // for another use
    }

    void judge() { require(!landed_ || hwpt.copies[0] == 1, "unmapped and not reported"); }

  private:
    Hwpt hwpt{words, {.pins = true}};
    bool landed_ = false;
};

// A page is pinned and clean. The data lands while another device writes to the page, and a sync is asked for.
class PinSync : public Execution<PinSync, 3>
{
  public:
    void prepare()
    {
        hwpt.map(0, page_size, 0);
        hwpt.enable();
        hwpt.read(1, 0);
        pin(hwpt, slot_);
        while (hwpt.step()) {
        }
        hwpt.take(here());
        hwpt.share();
        words.share(elsewhere());
    }

    void run(unsigned thread)
    {
        switch (thread) {
        case 0:
            land(hwpt, slot_, 1);
            break;
        case 1:
            hwpt.write(1, sizeof(std::uint64_t), 1);
            break;
        default: {
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
        }
    }

    void judge() {}

  private:
    static std::uint64_t &elsewhere() { return *(&memory.guest_word(0) + 1); }

    Hwpt hwpt{words, {.devices = 2, .pins = true}};
    unsigned slot_ = 0;
};

// A slot is used for one range, then for another; who finds it held sees one of them whole.
class Slot : public Execution<Slot, 2>
{
  public:
    static constexpr iommu::PinRange first{1, 2, true};
    static constexpr iommu::PinRange second{3, 4, false};

    void prepare()
    {
        memory.cells[0] = {};
        memory.pins[0] = {};
        pins_ = std::make_unique<iommu::Pins>(&memory.cells[0], std::span(memory.pins, 1));
        words.share(memory.cells[0].pinned);
        words.share(slot().count);
        words.share(slot().start);
        words.share(slot().last);
        words.share(slot().write);
    }

    void run(unsigned thread)
    {
        if (thread == 0) {
            for (const iommu::PinRange &range : {first, second}) {
                static_cast<void>(pins_->take(range));
                pins_->give_back(0);
            }
            return;
        }
        for (unsigned i = 0; i < 2; ++i) {
            iommu::if_held(slot(), [](std::uint64_t count, const iommu::PinRange &seen) {
                const iommu::PinRange &held = count == 1 ? first : second;
                require(seen.start == held.start && seen.last == held.last && seen.write == held.write,
                        "not its range");
            });
        }
    }

    void judge() {}

  private:
    static dr_pin &slot() { return memory.pins[0]; }
    std::unique_ptr<iommu::Pins> pins_;
};

// One range stays closed while others are closed and opened; a device always finds it.
class Closing : public Execution<Closing, 2>
{
  public:
    void prepare()
    {
        memory.control() = {};
        closing_.close(0, 9);
        closing_.close(100, 109);
        words.share(memory.control().closing);
        for (dr_closed &closed : memory.control().closed) {
            words.share(closed.count);
            for (unsigned i = 0; i < 3; ++i) {
                words.share(closed.range[i].start);
                words.share(closed.range[i].last);
            }
        }
    }

    void run(unsigned thread)
    {
        if (thread == 0) {
            closing_.close(200, 209);
            closing_.open(0);
            closing_.open(200);
            return;
        }
        for (unsigned i = 0; i < 2; ++i)
            require(closing_.covers(105, 105), "a closed range is missed");
    }

    void judge() {}

  private:
    iommu::Closing closing_{memory.control()};
};

} // namespace

Suite pin_unmap()
{
    using enum std::memory_order;
    using enum Access;
    const void *slot = &memory.pins[0].count;
    const void *pinned = &memory.cells[0].pinned;
    const void *closing = &memory.control().closing;
    return {"pin_unmap",
            "P1 P2",
            50000,
            3,
            simulate<PinUnmap>,
            {
                {"pin_after_look", "P1", Rule::pin_after_look},
                {"unmap_ignores_pins", "P1", Rule::unmap_ignores_pins},
                {"taken_release", "P1", Rule::none, {{slot, store, release, seq_cst, "take"}}},
                {"pinned_release", "P1", Rule::none, {{pinned, store, release, seq_cst, "take"}}},
                {"closed_acquire", "P1", Rule::none, {{closing, load, acquire, seq_cst, "load_sc"}}},
                {"close_release", "P1", Rule::none, {{closing, store, release, seq_cst, "change"}}},
                {"sampled_acquire", "P1", Rule::none, {{slot, load, acquire, seq_cst, "if_held"}}},
                {"pinned_acquire", "P1", Rule::none, {{pinned, load, acquire, seq_cst, "passed"}}},
                {"give_back_relaxed", "P2", Rule::none, {{slot, store, relaxed, seq_cst, "give_back"}}, {}, carried},
                {"less_relaxed", "P2", Rule::none, {{pinned, store, relaxed, release, "give_back"}}, {}, carried},
                {"waited_relaxed", "P2", Rule::none, {{slot, load, relaxed, seq_cst, "passed"}}, {}, carried},
            }};
}

Suite pin_sync()
{
    using enum std::memory_order;
    using enum Access;
    const void *slot = &memory.pins[0].count;
    return {"pin_sync",
            "P2",
            50000,
            2,
            simulate<PinSync>,
            {
                {"sync_ignores_pins", "P2", Rule::sync_ignores_pins},
                {"no_grace_after_pins", "P2", Rule::no_grace_after_pins},
                {"mark_before_data", "P2", Rule::mark_before_data},
                {"give_back_relaxed", "P2", Rule::none, {{slot, store, relaxed, seq_cst, "give_back"}}, {}, carried},
                {"waited_relaxed", "P2", Rule::none, {{slot, load, relaxed, seq_cst, "passed"}}, {}, carried},
            }};
}

Suite slot()
{
    using enum std::memory_order;
    using enum Access;
    const dr_pin &pin = memory.pins[0];
    const std::vector<Weakening> range_relaxed = {{&pin.start, load, relaxed, acquire},
                                                  {&pin.last, load, relaxed, acquire},
                                                  {&pin.write, load, relaxed, acquire}};
    const Weakening again_acquire = {&pin.count, load, acquire, seq_cst, "if_held"};
    std::vector<Weakening> both = range_relaxed;
    both.push_back(again_acquire);
    return {"slot",
            "P4",
            50000,
            6,
            simulate<Slot>,
            {
                {"taken_relaxed", "P4", Rule::none, {{&pin.count, store, relaxed, seq_cst, "take"}}},
                {"range_relaxed", "P4", Rule::none, range_relaxed, {}, "seq_cst of the count"},
                {"again_acquire", "P4", Rule::none, {again_acquire}, {}, "acquire of the range"},
                {"both", "P4", Rule::none, both},
            }};
}

Suite closing()
{
    using enum std::memory_order;
    using enum Access;
    const dr_shard_control &control = memory.control();
    std::vector<Weakening> ranges_relaxed;
    for (const dr_closed &closed : control.closed) {
        ranges_relaxed.push_back({&closed.count, load, relaxed, acquire});
        for (unsigned i = 0; i < 2; ++i) {
            ranges_relaxed.push_back({&closed.range[i].start, load, relaxed, acquire});
            ranges_relaxed.push_back({&closed.range[i].last, load, relaxed, acquire});
        }
    }
    const Weakening version_acquire = {&control.closing, load, acquire, seq_cst, "load_sc"};
    std::vector<Weakening> both = ranges_relaxed;
    both.push_back(version_acquire);
    return {"closing",
            "P1",
            50000,
            3,
            simulate<Closing>,
            {
                {"change_relaxed", "P1", Rule::none, {{&control.closing, store, relaxed, seq_cst, "change"}}},
                {"version_relaxed", "P1", Rule::none, {{&control.closing, load, relaxed, seq_cst, "load_sc"}}},
                {"ranges_relaxed", "P1", Rule::none, ranges_relaxed, {}, "seq_cst of closing"},
                {"version_acquire", "P1", Rule::none, {version_acquire}, {}, "acquire of the ranges"},
                {"both", "P1", Rule::none, both},
            }};
}

} // namespace dirtyring::model
