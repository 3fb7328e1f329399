// Who wrote what, in memory that outlives who wrote it. Each device of a guest writes to a slot of its own in each
// page, every word of a slot the number of the write, which only grows over all lives of that device. What is noted as
// done must be in the VMM's copy at the next sync; a write that its device's death cut short may be there or not.
#pragma once

#include "tests/chaos/layout.hpp"
#include "tests/chaos/shared_array.hpp"

#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

namespace dirtyring::chaos {

using Word = std::atomic<std::uint64_t>;

class Journal
{
  public:
    static constexpr std::uint64_t slot_size = 512;
    static constexpr unsigned devices_max = page_size / slot_size;

    Journal(std::uint64_t pages, unsigned devices) : pages_(pages), issued_(devices), done_(pages * devices) {}

    // ---- the device's side

    [[nodiscard]] std::uint64_t draw(unsigned device) const
    {
        return issued_[device].fetch_add(1, std::memory_order_relaxed) + 1;
    }
    // After the section, or the pin.
    void done(unsigned device, std::uint64_t page, std::uint64_t stamp) const
    {
        done_[device * pages_ + page].store(stamp, std::memory_order_release);
    }

    // ---- the VMM's side

    // What was done at this moment, by device and page.
    using Snapshot = std::vector<std::uint64_t>;
    void look(Snapshot &out) const
    {
        out.resize(done_.size());
        for (std::size_t i = 0; i < out.size(); ++i)
            out[i] = done_[i].load(std::memory_order_acquire);
    }

    struct Loss {
        unsigned device;
        std::uint64_t page;
        std::uint64_t expected; // the stamp, at least
        std::uint64_t found;    // the oldest in the slot
    };
    // A slot of the copy that is older than in `wanted`; those known to be as new as in `seen` are passed over, and
    // `seen` follows. Pages for which spared(page) is true are left for the next time.
    template <class Spared>
    [[nodiscard]] std::optional<Loss> loss(const std::byte *copy, const Snapshot &wanted, Snapshot &seen,
                                           Spared spared) const
    {
        seen.resize(wanted.size());
        for (std::size_t i = 0; i < wanted.size(); ++i) {
            const auto device = static_cast<unsigned>(i / pages_);
            const std::uint64_t page = i % pages_;
            if (wanted[i] == seen[i] || spared(page))
                continue;
            const auto *slot = reinterpret_cast<const std::uint64_t *>(copy + page * page_size + device * slot_size);
            for (std::uint64_t word = 0; word < slot_size / sizeof *slot; ++word) {
                if (slot[word] < wanted[i])
                    return Loss{device, page, wanted[i], slot[word]};
            }
            seen[i] = wanted[i];
        }
        return std::nullopt;
    }

  private:
    std::uint64_t pages_;
    SharedArray<Word> issued_; // the last number, by device
    SharedArray<Word> done_;   // by device and page
};

} // namespace dirtyring::chaos
