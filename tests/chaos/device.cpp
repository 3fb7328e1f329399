// A device: sections with several writes, and pins whose data lands later.
#include "iommu/rules.hpp"
#include "tests/chaos/children.hpp"

#include <algorithm>
#include <array>
#include <csignal>
#include <cstring>
#include <optional>
#include <random>
#include <thread>
#include <unistd.h>

namespace dirtyring::chaos {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr std::uint32_t pins_max = 6;

class WritingDevice
{
  public:
    WritingDevice(Shared &shared, Guest &guest, unsigned index, std::uint64_t seed)
        : shared_(shared), guest_(guest), state_(guest.device[index]), index_(index), random_(seed)
    {
        state_.inside = 0;
        state_.lives.fetch_add(1);
        at_point = [this](Point p) {
            const bool cleaned = p == Point::device_between_dirty_and_summary && lonely(guest_.layout.block(target_)) &&
                                 state_.die_cleaned.exchange(0, std::memory_order_relaxed) != 0;
            if (!cleaned && state_.die_at.load(std::memory_order_relaxed) != static_cast<std::uint64_t>(p) + 1)
                return;
            guest_.state.died_cleaned.fetch_add(cleaned ? 1 : 0, std::memory_order_relaxed);
            state_.dying = 1;
            ::kill(::getpid(), SIGKILL);
        };
    }

    void run()
    {
        while (!over() && guest_.state.ready.load() == 0)
            std::this_thread::sleep_for(milliseconds(1));
        while (!over()) {
            attach();
            bool fresh = true; // who has a page's translation cached with D may not set it again
            for (std::uint64_t steps = 200 + draw(2000); steps > 0 && !over() && (fresh || !to_die()); --steps) {
                fresh = fresh && to_die();
                step();
            }
            while (!pins_.empty())
                land(pins_.front());
            check(dirtyring_device_detach(device_), "detach");
        }
    }

  private:
    struct Pin {
        int number;
        bool write;
        void *data;
        std::uint64_t lands_at; // ns
    };
    struct Done {
        std::uint64_t page;
        std::uint64_t stamp;
    };

    [[nodiscard]] bool over() const { return shared_.over().load(std::memory_order_relaxed) != 0; }
    [[nodiscard]] bool to_die() const { return state_.die_cleaned.load(std::memory_order_relaxed) != 0; }
    std::uint64_t draw(std::uint64_t below) { return random_() % below; }

    void attach()
    {
        dirtyring_attach attributes{};
        attributes.token = guest_.state.token;
        attributes.hwpt = guest_.state.hwpt;
        attributes.pins = pins_max;
        check(dirtyring_device_attach(shared_.socket_path.c_str(), &attributes, &device_), "attach");
        dma_ = dirtyring_device_dma(device_, 0);
    }

    void step()
    {
        const auto due = std::find_if(pins_.begin(), pins_.end(), [](const Pin &p) { return p.lands_at <= now_ns(); });
        if (due != pins_.end())
            land(*due);
        if (draw(8) == 0 && pins_.size() < pins_max)
            pin();
        else
            section();
        std::this_thread::sleep_for(draw(200) == 0 ? milliseconds(20) : microseconds(draw(1000)));
    }

    static bool lonely(unsigned block) { return block < blocks && block % 4 >= 2; }

    // Some pages are written all the time, the others now and then. Of some blocks one page alone is written: what a
    // rule that is broken forgets there nothing beside it brings back.
    std::uint64_t somewhere()
    {
        if (guest_.layout.full && draw(4) == 0)
            return between_blocks();
        const bool hot = draw(2) == 0;
        auto block = static_cast<unsigned>(draw(hot ? 4 : blocks));
        if (to_die())
            block |= 2;
        const std::uint64_t page = lonely(block) ? block : draw(hot ? 3 : guest_.layout.block_pages());
        return guest_.layout.iova(block) + page * page_size + index_ * Journal::slot_size;
    }

    std::uint64_t between_blocks()
    {
        std::uint64_t iova = 0;
        do
            iova = draw(slice_size / page_size) * page_size;
        while (guest_.layout.block(iova) < blocks);
        return iova + index_ * Journal::slot_size;
    }

    void section()
    {
        std::array<Done, 6> done;
        std::size_t count = 0;
        dirtyring_dma_begin(dma_);
        state_.inside = 1;
        for (std::uint64_t writes = 1 + draw(4); writes > 0; --writes) {
            if (const auto w = write(somewhere()))
                done[count++] = *w;
        }
        if (state_.stop_inside.exchange(0) != 0)
            ::raise(SIGSTOP);
        state_.inside = 0;
        dirtyring_dma_end(dma_);
        std::for_each_n(done.begin(), count, [&](const Done &d) { note(d); });
    }

    // Nothing: it met a fault, as is right where a block is not mapped.
    std::optional<Done> write(std::uint64_t iova)
    {
        std::uint64_t data[Journal::slot_size / 8];
        const std::uint64_t stamp = guest_.journal.draw(index_);
        std::fill(std::begin(data), std::end(data), stamp);
        dirtyring_fault fault{};
        target_ = iova;
        if (dirtyring_dma_write(dma_, iova, data, sizeof data, &fault) == 0)
            return Done{page_with(stamp, iova), stamp};
        expect(iova, fault, DIRTYRING_FAULT_NOT_PRESENT);
        return std::nullopt;
    }

    void pin()
    {
        const bool write = draw(4) != 0;
        const std::uint64_t iova = somewhere();
        iovec piece{};
        std::uint32_t count = 1;
        dirtyring_fault fault{};
        const int number = dirtyring_dma_pin(dma_, iova, Journal::slot_size, write ? DIRTYRING_WRITE : DIRTYRING_READ,
                                             &piece, &count, &fault);
        if (number < 0)
            return expect(iova, fault, DIRTYRING_FAULT_NOT_PRESENT, DIRTYRING_FAULT_CLOSED);
        pins_.push_back({number, write, piece.iov_base, now_ns() + draw(8'000'000)});
        state_.pins.fetch_add(1, std::memory_order_relaxed);
        where_[number] = iova;
    }

    void land(const Pin &due)
    {
        const Pin pin = due;
        std::erase_if(pins_, [&](const Pin &p) { return p.number == pin.number; });
        std::optional<Done> done;
        target_ = where_[pin.number];
        if (pin.write) {
            std::uint64_t data[Journal::slot_size / 8];
            const std::uint64_t stamp = guest_.journal.draw(index_);
            std::fill(std::begin(data), std::end(data), stamp);
            std::memcpy(pin.data, data, sizeof data);
            done = Done{page_with(stamp, where_[pin.number]), stamp};
        }
        check(dirtyring_dma_unpin(dma_, pin.number), "unpin");
        if (done)
            note(*done);
    }

    void note(const Done &done)
    {
        guest_.journal.done(index_, done.page, done.stamp);
        state_.writes.fetch_add(1, std::memory_order_relaxed);
    }

    // Which place of the guest's memory the write went to: only this device writes to this slot.
    [[nodiscard]] std::uint64_t page_with(std::uint64_t stamp, std::uint64_t iova) const
    {
        std::optional<std::uint64_t> page;
        guest_.layout.for_each_oa(iova, [&](std::uint64_t oa) {
            const std::uint64_t at = oa % guest_.layout.memory();
            if (std::atomic_ref(*guest_.source.map.as<std::uint64_t>(at)).load(std::memory_order_relaxed) == stamp)
                page = at / page_size;
        });
        if (!page)
            throw migrate::Failure(fmt::format("write {} to iova {:#x} went to none of its places", stamp, iova));
        return *page;
    }

    template <class... Reasons> void expect(std::uint64_t iova, const dirtyring_fault &fault, Reasons... reasons) const
    {
        if (fault.reason == DIRTYRING_FAULT_NOT_PRESENT && guest_.layout.block(iova) == blocks)
            throw Lost(fmt::format("lost: guest {} ({}): iova {:#x} is mapped for good, and DMA finds no translation",
                                   guest_.index, guest_.layout.name, iova));
        if (((fault.reason != reasons) && ...))
            throw migrate::Failure(fmt::format("DMA: {}", dirtyring_error()));
    }

    Shared &shared_;
    Guest &guest_;
    DeviceState &state_;
    unsigned index_;
    std::mt19937_64 random_;
    dirtyring_device *device_ = nullptr;
    dirtyring_dma *dma_ = nullptr;
    std::uint64_t target_ = 0; // IOVA that is being written
    std::vector<Pin> pins_;
    std::uint64_t where_[pins_max] = {}; // IOVAs of pins, by number
};

} // namespace

void run_device(Shared &shared, Guest &guest, unsigned index, std::uint64_t seed)
{
    WritingDevice(shared, guest, index, seed).run();
}

} // namespace dirtyring::chaos
