// What the rings report: read, stamped in the journal, and queued to be sent.
#pragma once

#include "client/dirtyring.hpp"
#include "client/migrate/mapper.hpp"
#include "client/migrate/page_queue.hpp"
#include "client/migrate/shared.hpp"

#include <cstdint>

namespace dirtyring::migrate {

class Reports
{
  public:
    // `meanings` as for the Mapper.
    Reports(Shared &shared, PageQueue &queue, SharedMap *meanings) : shared_(shared), queue_(queue), meanings_(meanings)
    {
    }

    // Takes what is published.
    void drain(RingSet &set);

    // Everything in the guest's memory counts as reported now.
    void all();

  private:
    void take(const dirtyring_batch &batch, std::uint64_t tick);
    void run(std::uint32_t shard, std::uint64_t entry, std::uint64_t tick);
    void marker(std::uint32_t shard, std::uint64_t entry, std::uint64_t tick);
    void pages(std::uint64_t oa, std::uint64_t length, std::uint64_t tick);
    void note_life();

    Shared &shared_;
    PageQueue &queue_;
    SharedMap *meanings_;
    std::uint64_t seen_killed_ = 0; // Control::killed_ns
    std::uint64_t awaited_ = 0;     // the same, as long as the successor has reported nothing; else 0
};

} // namespace dirtyring::migrate
