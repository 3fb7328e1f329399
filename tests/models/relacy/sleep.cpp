// Who falls asleep is woken: the walker by a device (S5, P3) or its consumer (R5), the consumer by the walker (R4).
#include "tests/models/relacy/suites.hpp"

#include "tests/models/relacy/hwpt.hpp"

#include "iommu/extent_map.hpp"
#include "service/engine/publisher.hpp"

namespace dirtyring::model {

namespace {

// The walker's loop of service/walkers/walker.cpp, for a while. True: it sleeps, and only a peer can end that.
template <class Pause> bool fall_asleep(Hwpt &hwpt, Pause pause)
{
    for (unsigned i = 0; i < 6; ++i) {
        if (hwpt.step() || hwpt.step())
            continue;
        const service::Rest rest = hwpt.shard->prepare_sleep(hwpt.now += 1'000'000);
        if (!rest.busy && rest.until_ns == UINT64_MAX)
            return true;
        hwpt.shard->wake();
        pause();
    }
    return false;
}

// Nothing is dirty, the walker goes to sleep, and a device writes.
class Doorbell : public Execution<Doorbell, 2>
{
  public:
    void prepare()
    {
        hwpt.map(0, page_size, 0);
        hwpt.enable();
        hwpt.read(0, 0);
        hwpt.share();
    }

    void run(unsigned thread)
    {
        if (thread == 0)
            rung_ = hwpt.write(0, 0, 1) != 0;
        else
            asleep_ = fall_asleep(hwpt, [] { pause(); });
    }

    void judge()
    {
        if (!asleep_ || rung_)
            return;
        hwpt.take(here());
        require(!hwpt.lost(), "the walker sleeps on a dirty page");
    }

  private:
    Hwpt hwpt{words};
    bool rung_ = false;
    bool asleep_ = false;
};

// An unmap waits for a pin, the walker goes to sleep, and the device gives the pin back.
class PinBell : public Execution<PinBell, 2>
{
  public:
    void prepare()
    {
        hwpt.map(0, page_size, 0);
        iommu::DmaFault fault;
        hwpt.devices[0]->enter();
        hwpt.devices[0]->pin(0, page_size, false, slot_, fault, [](auto...) {});
        static_cast<void>(hwpt.devices[0]->leave());
        unmap_.kind = Op::Kind::unmap;
        unmap_.end = page_size;
        hwpt.shard->submit(unmap_);
        hwpt.step();
        hwpt.share();
    }

    void run(unsigned thread)
    {
        if (thread == 0) {
            hwpt.devices[0]->enter();
            hwpt.devices[0]->unpin(slot_);
            rung_ = hwpt.devices[0]->leave() != 0;
        } else {
            asleep_ = fall_asleep(hwpt, [] { pause(); });
        }
    }

    void judge() { require(!asleep_ || rung_ || unmap_.over, "the walker sleeps on a pin that is gone"); }

  private:
    Hwpt hwpt{words, {.pins = true}};
    Op unmap_;
    unsigned slot_ = 0;
    bool rung_ = false;
    bool asleep_ = false;
};

// The slice rests until its run is taken, another page is dirty, and the VMM takes the run.
class Kick : public Execution<Kick, 2>
{
  public:
    void prepare()
    {
        hwpt.map(0, 2 * page_size, 0);
        hwpt.enable();
        hwpt.write(0, 0, 1);
        hwpt.step();
        hwpt.write(0, page_size, 1);
        hwpt.share();
    }

    void run(unsigned thread)
    {
        if (thread == 0)
            hwpt.take(here());
        else
            asleep_ = fall_asleep(hwpt, [] { pause(); });
    }

    void judge()
    {
        if (!asleep_ || hwpt.kicked)
            return;
        hwpt.take(here());
        require(!hwpt.lost(), "the walker sleeps with room in the ring");
    }

  private:
    Hwpt hwpt{words, {.min_interval_ns = 0}};
    bool asleep_ = false;
};

// The consumer has read all there is and goes to sleep; the walker publishes.
class Call : public Execution<Call, 2>
{
  public:
    void prepare() { hwpt.share(); }

    void run(unsigned thread)
    {
        if (thread == 0) {
            for (unsigned i = 0; i < 2; ++i) {
                publisher.put_marker(DR_MARKER_EPOCH, i);
                publisher.publish();
            }
            return;
        }
        for (unsigned i = 0; i < 4 && !asleep_; ++i) {
            if (hwpt.take(here()) == 0)
                asleep_ = hwpt.consumer->arm();
        }
    }

    void judge() { require(!asleep_ || called_ || hwpt.take(here()) == 0, "the consumer sleeps on an entry"); }

  private:
    Hwpt hwpt{words};
    iommu::ExtentMap extents_;
    bool called_ = false;
    service::Publisher publisher{&memory.producer, &memory.consumer, extents_, [this] { called_ = true; }};
    bool asleep_ = false;
};

} // namespace

Suite doorbell()
{
    using enum std::memory_order;
    using enum Access;
    const void *asleep = &memory.control().asleep;
    const void *table = &memory.table_bits();
    return {"doorbell",
            "S5",
            50000,
            6,
            simulate<Doorbell>,
            {
                {"no_doorbell", "S5", Rule::no_doorbell},
                {"no_second_look", "S5", Rule::no_second_look},
                {"asleep_release", "S5", Rule::none, {{asleep, store, release}}},
                {"asleep_acquire", "S5", Rule::none, {{asleep, load, acquire}}},
                {"table_set_acq_rel", "S5", Rule::none, {{table, rmw, acq_rel, seq_cst, "test_and_set"}}},
                {"second_look_acquire", "S5", Rule::none, {{table, load, acquire, seq_cst, "table_bits"}}},
            }};
}

Suite pin_bell()
{
    using enum std::memory_order;
    using enum Access;
    const void *asleep = &memory.control().asleep;
    const void *slot = &memory.pins[0].count;
    return {"pin_bell",
            "P3",
            50000,
            8,
            simulate<PinBell>,
            {
                {"no_pin_bell", "P3", Rule::no_pin_bell},
                {"no_second_look", "P3", Rule::no_second_look},
                {"asleep_release", "P3", Rule::none, {{asleep, store, release}}},
                {"asleep_acquire", "P3", Rule::none, {{asleep, load, acquire}}},
                {"give_back_release", "P3", Rule::none, {{slot, store, release, seq_cst, "give_back"}}},
            }};
}

Suite kick()
{
    using enum std::memory_order;
    using enum Access;
    const void *want_kick = &memory.producer.want_kick;
    const void *tail = &memory.consumer.tail;
    return {"kick",
            "R5",
            50000,
            10,
            simulate<Kick>,
            {
                {"no_want_kick", "R5", Rule::no_want_kick},
                {"no_second_look", "R5", Rule::no_second_look},
                {"want_kick_release", "R5", Rule::none, {{want_kick, store, release}}},
                {"want_kick_acquire", "R5", Rule::none, {{want_kick, load, acquire}}},
                {"tail_release", "R5", Rule::none, {{tail, store, release}}},
                {"tail_acquire", "R5", Rule::none, {{tail, load, acquire}}},
            }};
}

Suite call()
{
    using enum std::memory_order;
    using enum Access;
    const void *head = &memory.producer.head;
    const void *armed = &memory.consumer.armed;
    return {"call",
            "R4",
            50000,
            8,
            simulate<Call>,
            {
                {"arm_without_look", "R4", Rule::arm_without_look},
                {"armed_release", "R4", Rule::none, {{armed, store, release}}},
                {"armed_acquire", "R4", Rule::none, {{armed, load, acquire}}},
                {"head_release", "R4", Rule::none, {{head, store, release}}},
                {"head_acquire", "R4", Rule::none, {{head, load, acquire, seq_cst, "arm"}}},
            }};
}

} // namespace dirtyring::model
