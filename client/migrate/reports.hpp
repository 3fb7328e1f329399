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

    Shared &shared_;
    PageQueue &queue_;
    SharedMap *meanings_;
};

} // namespace dirtyring::migrate
