#include "client/migrate/device.hpp"

#include "client/dirtyring.hpp"
#include "client/migrate/failure.hpp"
#include "client/migrate/load.hpp"
#include "client/migrate/mix.hpp"

#include <algorithm>
#include <array>
#include <cstring>

namespace dirtyring::migrate {
namespace {

constexpr std::uint64_t section_max = 64u << 10; // bytes: publishing waits for sections
constexpr std::uint64_t counted_below = 8; // bytes: so short a write of a fresh pattern might leave what was there

class Worker
{
  public:
    Worker(Shared &shared, unsigned index, dirtyring_dma *dma)
        : shared_(shared), index_(index), dma_(dma), word_(mix(index) << 16)
    {
    }

    // Until the load is done or the source stops the devices.
    void run()
    {
        Control &control = shared_.control;
        const auto load = make_load(shared_.options, shared_.plan, index_);
        std::uint64_t done = 0;
        while (const auto step = load->next()) {
            if (!wait_for(*step) || !perform(*step))
                return;
            control.accesses_done[index_].value.store(++done, std::memory_order_seq_cst);
            shared_.mapper_bell.ring();
        }
    }

  private:
    [[nodiscard]] bool stopping() const { return phase(shared_.control) >= Phase::stopping; }

    // False: stopped meanwhile.
    bool wait_for(const Step &step)
    {
        Control &control = shared_.control;
        const Bell &bell = shared_.device_bells[index_];
        bell.wait([&] { return stopping(); }, control.start_ns + step.due_ns);
        bell.wait(
            [&] { return stopping() || control.maps_done.value.load(std::memory_order_seq_cst) >= step.maps_before; });
        return !stopping();
    }

    // False: stopped between two sections.
    bool perform(const Step &step)
    {
        const std::uint64_t first_page = step.iova / page_size;
        for (std::uint64_t done = 0; done < step.length;) {
            if (stopping())
                return false;
            const std::uint64_t iova = step.iova + done;
            const std::uint64_t length = std::min(step.length - done, section_max);
            const std::uint64_t from = iova / page_size - first_page;
            const std::uint64_t to = (iova + length - 1) / page_size - first_page + 1;
            if (step.write)
                write(step, iova, length, step.pages.subspan(from, to - from));
            else
                read(step, iova, length);
            done += length;
        }
        return true;
    }

    void read(const Step &step, std::uint64_t iova, std::uint64_t length)
    {
        if (dirtyring_dma_read(dma_, iova, data_.data(), length, nullptr) < 0)
            throw faulted(step);
    }

    void write(const Step &step, std::uint64_t iova, std::uint64_t length, std::span<const std::uint32_t> pages)
    {
        Control &control = shared_.control;
        const bool counted = length < counted_below;
        if (!counted)
            fill(length);
        const Section section(dma_);
        const std::uint64_t begun = next_tick(control);
        for (const std::uint32_t page : pages)
            shared_.journal.begin(page, begun);
        if (counted && (dirtyring_dma_read(dma_, iova, data_.data(), length, nullptr) < 0))
            throw faulted(step);
        if (counted)
            increment(length);
        if (dirtyring_dma_write(dma_, iova, data_.data(), length, nullptr) < 0)
            throw faulted(step);
        const std::uint64_t written = next_tick(control);
        for (const std::uint32_t page : pages)
            shared_.journal.end(page, written);
    }

    // The next words of a sequence in which none comes twice.
    void fill(std::uint64_t length)
    {
        for (std::uint64_t at = 0; at < length; at += sizeof word_) {
            const std::uint64_t word = mix(++word_);
            std::memcpy(data_.data() + at, &word, sizeof word);
        }
    }

    // What was read, as a little-endian number, and one.
    void increment(std::uint64_t length)
    {
        for (std::uint64_t at = 0; at < length && ++data_[at] == 0; ++at) {
        }
    }

    // The library's sentence names the fault's iova and reason.
    [[nodiscard]] Failure faulted(const Step &step) const
    {
        const std::string where =
            step.line != 0 ? fmt::format(", line {} of {}", step.line, shared_.options.trace) : "";
        return Failure(dirtyring_error() + where);
    }

    Shared &shared_;
    unsigned index_;
    dirtyring_dma *dma_;
    std::uint64_t word_;
    std::array<std::uint8_t, section_max> data_{};
};

Device attach(const Shared &shared, unsigned index)
{
    const std::string name = fmt::format("dma-{}", index);
    const bool can_track = shared.options.devices_can_track;
    dirtyring_attach attributes{};
    attributes.token = shared.control.token;
    attributes.hwpt = shared.control.hwpt;
    attributes.cannot_track = can_track ? 0 : 1;
    attributes.name = name.c_str();
    auto device = Device::attach(shared.socket_path, attributes);
    if (!device && !can_track && device.error().code == EINVAL)
        throw Failure(fmt::format("{}; with such a device use --tracking none", device.error().sentence));
    return must(std::move(device), "cannot attach");
}

} // namespace

void run_device(Shared &shared, unsigned index)
{
    Control &control = shared.control;
    const Bell &bell = shared.device_bells[index];
    const auto wait_for = [&](Phase wanted) { bell.wait([&] { return phase(control) >= wanted; }); };

    wait_for(Phase::attaching);
    {
        const Device device = attach(shared, index);
        control.attached.fetch_add(1, std::memory_order_seq_cst);
        shared.source_bell.ring();

        wait_for(Phase::running);
        Worker(shared, index, device.dma(0)).run();
        wait_for(Phase::stopping);
        control.stopped.fetch_add(1, std::memory_order_seq_cst);
        shared.source_bell.ring();

        wait_for(Phase::finished);
    }
    control.attached.fetch_sub(1, std::memory_order_seq_cst);
    shared.source_bell.ring();
}

} // namespace dirtyring::migrate
