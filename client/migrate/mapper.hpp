// The source VMM's other half, on a thread of its own: replays the maps and unmaps of a trace through the command ring.
// Commands are queued as long as nothing has to be waited for; what waits is: for its time, an unmap for the device
// accesses before it, and whatever overlaps an unmap that has not completed yet.
#pragma once

#include "client/dirtyring.hpp"
#include "client/migrate/shared.hpp"
#include "client/retained_map.hpp"

#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

namespace dirtyring::migrate {

// What IOVA runs mean; updated by the mapper, read by whoever reads the rings.
struct SharedMap {
    SharedMap(std::uint32_t slices, std::uint32_t slice_lg2) : map(slices, slice_lg2) {}

    std::mutex mutex;
    RetainedMap map;
};

class Mapper
{
  public:
    // `meanings` nullptr: the rings need none. From start() on the guest is the mapper's until it has finished.
    Mapper(Shared &shared, Guest &guest, std::uint32_t ioas, SharedMap *meanings)
        : shared_(shared), guest_(guest), ioas_(ioas), meanings_(meanings)
    {
    }

    // Ends when the trace does, or soon after the devices are told to stop; what it has submitted has completed then.
    void start();
    [[nodiscard]] bool finished() const { return finished_.load(std::memory_order_seq_cst); }
    void join();

  private:
    struct Map {
        std::uint32_t line;
        bool done;
    };
    struct Unmap {
        std::uint64_t id;
        std::uint64_t iova;
        std::uint64_t length;
        std::uint64_t done = 0;     // of length
        std::uint64_t retry_ns = 0; // when to ask for the rest, for which a ring had no room; 0: it has been asked for
        std::uint32_t line;
    };

    void run();
    bool replay(const MapChange &change, std::uint64_t loop);
    bool await_turn(const MapChange &change, std::uint64_t loop);
    void map(const MapChange &change);
    void unmap(const MapChange &change);

    [[nodiscard]] bool accesses_done(std::uint64_t first) const;
    [[nodiscard]] bool overlaps_unmap(const MapChange &change) const;
    [[nodiscard]] bool stopping() const { return phase(shared_.control) >= Phase::stopping; }

    template <class Queue> void queue(Queue command);
    template <class Done> void pump(Done done, std::uint64_t deadline_ns = never);
    bool reap();
    void complete_map(const dr_completion &completion);
    void complete_unmap(const dr_completion &completion);
    std::uint64_t retry();

    Shared &shared_;
    Guest &guest_;
    std::uint32_t ioas_;
    SharedMap *meanings_;
    std::thread thread_;
    std::atomic<bool> finished_{true};

    std::uint64_t next_unmap_ = 0;
    std::vector<Unmap> unmaps_;   // outstanding
    std::uint64_t maps_done_ = 0; // the first map that is not
    std::deque<Map> maps_;        // from maps_done_ on
};

} // namespace dirtyring::migrate
