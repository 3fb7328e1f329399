// Sections, grace periods, data (S1, S2, S3) and the IOTLB's tags (S3).
#include "tests/models/relacy/suites.hpp"

#include "tests/models/relacy/hwpt.hpp"

namespace dirtyring::model {

namespace {

// The walker sweeps and the VMM copies what is published; in the end nothing is lost.
template <class Derived> class Swept : public Execution<Derived, 3>
{
  public:
    void run(unsigned thread)
    {
        switch (thread) {
        case 0:
            static_cast<Derived *>(this)->device();
            break;
        case 1:
            for (unsigned i = 0; i < 8; ++i) {
                if (!hwpt.step())
                    this->pause();
            }
            break;
        default:
            for (unsigned i = 0; i < 16 && hwpt.take(this->here()) == 0; ++i)
                this->pause();
        }
    }

    void judge()
    {
        hwpt.sync(this->here());
        this->require(!hwpt.lost(), "a page is lost");
    }

  protected:
    Hwpt hwpt{this->words};
};

// A page is dirty and in the IOTLB, and the device writes it again.
class Section : public Swept<Section>
{
  public:
    void prepare()
    {
        hwpt.map(0, page_size, 0);
        hwpt.enable();
        hwpt.write(0, 0, 1);
        hwpt.share();
    }
    void device() { hwpt.write(0, 0, 2); }
};

// A page comes into the IOTLB, and the device writes it by that.
class Tag : public Swept<Tag>
{
  public:
    void prepare()
    {
        hwpt.map(0, 2 * page_size, 0);
        hwpt.enable();
        hwpt.read(0, page_size);
        hwpt.share();
    }
    void device()
    {
        for (std::uint64_t value = 1; value <= 4; ++value)
            hwpt.write(0, 0, value);
    }
};

// The device leaves for good, and the walker forgets its cell before the grace period is over: the word that it has
// left must carry what its cell would have.
class Leaving : public Execution<Leaving, 3>
{
  public:
    static inline std::uint64_t left;

    void prepare()
    {
        left = 0;
        hwpt.map(0, page_size, 0);
        hwpt.enable();
        hwpt.write(0, 0, 1);
        hwpt.share();
        words.share(left);
    }

    void run(unsigned thread)
    {
        switch (thread) {
        case 0:
            hwpt.write(0, 0, 2);
            std::atomic_ref(left).store(1, std::memory_order_release);
            break;
        case 1:
            for (unsigned i = 0; i < 5; ++i) {
                if (!removed_ && std::atomic_ref(left).load(std::memory_order_acquire) != 0) {
                    hwpt.shard->remove(hwpt.threads(0));
                    removed_ = true;
                }
                if (!hwpt.step())
                    pause();
            }
            break;
        default:
            for (unsigned i = 0; i < 3 && hwpt.take(here()) == 0; ++i)
                pause();
        }
    }

    void judge()
    {
        hwpt.sync(here());
        require(!hwpt.lost(), "a page is lost");
    }

  private:
    Hwpt hwpt{words};
    bool removed_ = false;
};

} // namespace

Suite section()
{
    using enum std::memory_order;
    using enum Access;
    const void *cell = &memory.cells[0].count;
    const void *generation = &memory.generation();
    const void *head = &memory.producer.head;
    return {"section",
            "S1 S2 S3",
            100000,
            2,
            simulate<Section>,
            {
                {"leave_relaxed", "S1", Rule::leave_relaxed},
                {"pass_relaxed", "S1", Rule::none, {{cell, load, relaxed, acquire}}},
                {"no_grace", "S1", Rule::no_grace},
                {"publish_relaxed", "S2", Rule::none, {{head, store, relaxed}}},
                {"peek_relaxed", "S2", Rule::none, {{head, load, relaxed, acquire}}},
                {"publish_before_advance", "S2", Rule::publish_before_advance},
                {"enter_release", "S3", Rule::section_without_order},
                {"generation_acquire", "S3", Rule::none, {{generation, load, acquire}}},
                {"advance_acq_rel", "S3", Rule::none, {{generation, rmw, acq_rel}}},
                {"advance_plain", "S3", Rule::advance_plain},
                {"sample_acquire", "S3", Rule::none, {{cell, load, acquire}}},
                {"clear_after_sample", "S3", Rule::none, {}, Delay{&memory.leaf(0), cell}},
                {"sample_before_advance", "S3", Rule::sample_before_advance},
            }};
}

Suite tag()
{
    return {"tag", "S3", 100000, 1, simulate<Tag>, {{"after_walk", "S3", Rule::tag_after_walk}}};
}

Suite leaving()
{
    using enum std::memory_order;
    using enum Access;
    return {"leaving",
            "S1",
            50000,
            2,
            simulate<Leaving>,
            {
                {"told_relaxed", "S1", Rule::none, {{&Leaving::left, store, relaxed, release}}},
                {"heard_relaxed", "S1", Rule::none, {{&Leaving::left, load, relaxed, acquire}}},
            }};
}

} // namespace dirtyring::model
