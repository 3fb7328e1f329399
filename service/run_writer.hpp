// Turns dirty leaves into runs, straight in the ring's slots past `staged`.
#pragma once

#include "ring/producer.hpp"

#include <algorithm>
#include <cstdint>

namespace dirtyring::service {

class RunWriter
{
  public:
    // Runs take at most `slots`, which are free in the ring. A run never grows into what is staged already.
    RunWriter(ring::Producer<std::uint64_t> &ring, std::uint64_t slots)
        : ring_(&ring), slots_(ring.slots()), room_(slots)
    {
    }

    // False: no slot for it; nothing was added. length: a leaf's. Inlined, so that the writer can live in registers.
    [[nodiscard, gnu::always_inline]] bool add(std::uint64_t address, std::uint64_t length)
    {
        const bool large = length >= large_unit && address % large_unit == 0;
        const unsigned unit_lg2 = large ? large_unit_lg2 : DR_PAGE_LG2;
        std::uint64_t units = length >> unit_lg2;
        const bool grows = used_ > 0 && large == large_ && address == end_ && count_ + units <= DR_RUN_MAX;
        if (grows) {
            count_ += units;
        } else {
            if (room_ - used_ < (units <= DR_RUN_MAX ? 1 : (units + DR_RUN_MAX - 1) / DR_RUN_MAX))
                return false;
            while (units > DR_RUN_MAX) {
                slots_.put(used_++, dr_run(address >> DR_PAGE_LG2, large, DR_RUN_MAX));
                address += std::uint64_t{DR_RUN_MAX} << unit_lg2;
                units -= DR_RUN_MAX;
            }
            used_++;
            first_ = address;
            large_ = large;
            count_ = units;
        }
        end_ = first_ + (count_ << unit_lg2);
        slots_.put(used_ - 1, dr_run(first_ >> DR_PAGE_LG2, large_, static_cast<std::uint32_t>(count_)));
        return true;
    }

    // Stages what was added; the writer goes on behind it. How many slots that were.
    std::uint64_t stage()
    {
        const std::uint64_t n = used_;
        if (n > 0)
            ring_->stage(n);
        slots_ = ring_->slots();
        room_ -= n;
        used_ = 0;
        return n;
    }

  private:
    static constexpr unsigned large_unit_lg2 = DR_PAGE_LG2 + DR_LARGE_UNIT_LG2;
    static constexpr std::uint64_t large_unit = 1ull << large_unit_lg2;

    ring::Producer<std::uint64_t> *ring_;
    ring::Producer<std::uint64_t>::Slots slots_;
    std::uint64_t room_;
    std::uint64_t used_ = 0; // slots past `staged`
    // The run in the last of them:
    std::uint64_t first_ = 0;
    std::uint64_t end_ = 0;
    std::uint64_t count_ = 0;
    bool large_ = false;
};

} // namespace dirtyring::service
