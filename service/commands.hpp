// One guest's command ring, polled by the guest's home walker.
//
// Checks each command against the guest's own record of its maps, hands its parts to the shards concerned, which other walkers may
// own, and completes it when the last part is back. Everything runs on the home walker's thread, but for Part::done.
//
// Commands on overlapping IOVAs, and changes of one hwpt's tracking, take effect in order: a command that meets one before it waits;
// those behind it go on.
#pragma once

#include "iommu/extent_map.hpp"
#include "ring/consumer.hpp"
#include "ring/producer.hpp"
#include "service/inbox.hpp"
#include "service/shard.hpp"
#include "service/walker.hpp"

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

namespace dirtyring::service {

// A shard and who owns it.
struct Placed {
    Shard *shard;
    Walker *owner;
};

// What the home walker knows of an hwpt.
struct HwptRoute {
    std::uint32_t ioas;
    unsigned aperture_lg2;
    unsigned slice_lg2;
    bool tracks; // dirty tracking was asked for
    bool epochs; // its rings are in IOVA space
    std::vector<Placed> shards;

    bool enabled = false;
    std::uint64_t epoch = 0; // of the last unmap
};

class Commands
{
  public:
    struct Config {
        Walker *home;
        std::uint32_t capacity;
        dr_ring_consumer *submissions; // ours
        dr_ring_producer *submissions_peer;
        dr_ring_producer *completions; // ours
        dr_ring_consumer *completions_peer;
        std::function<void()> call;
    };

    explicit Commands(Config config);
    ~Commands();

    // Takes and starts what can be; true if there was any.
    bool poll();

    // True: nothing to do, and the VMM will kick.
    [[nodiscard]] bool prepare_sleep();
    void wake();

    // Gives up what is in flight: no more parts are sent, those that are out come back.
    void cancel();

    // The guest's objects, as the control thread makes them.
    void add_memory(std::uint64_t oa, std::uint64_t length);
    void add_ioas(std::uint32_t id);
    void remove_ioas(std::uint32_t id);
    [[nodiscard]] bool ioas_has_maps(std::uint32_t id) const;
    void add_hwpt(std::uint32_t id, HwptRoute route);
    // Sends no more parts to its shards; those in flight come back.
    void remove_hwpt(std::uint32_t id);

  private:
    struct Command;

    // A command's share for one shard. Travels to the shard's walker and back.
    struct Part final : ShardOp, Task {
        void done() override;
        void run() override;
        void send();

        Commands *commands = nullptr;
        Command *command = nullptr;
        Placed place{};
        bool back = false;
    };

    struct Command {
        dr_command request{};
        bool in_flight = false;
        std::uint64_t end = 0; // map, unmap: half-open
        std::uint64_t reached = 0;
        std::uint64_t epoch = 0;
        std::size_t sent = 0;
        std::size_t returned = 0;
        int result = 0;
        bool rolling_back = false; // a map of which one part failed
        std::vector<Part> parts;
    };

    // A command is refused with a negative errno, waits with -EINPROGRESS, or is started or done with 0.
    int start(const dr_command &request);
    int start_map(const dr_command &request);
    int start_unmap(const dr_command &request);
    int start_on_hwpt(const dr_command &request);
    [[nodiscard]] bool meets_one_waiting(const dr_command &request, std::size_t waiting) const;
    [[nodiscard]] bool meets_one_in_flight(const dr_command &request, std::uint64_t end) const;

    Command &begin(const dr_command &request);
    Part &add_part(Command &command, ShardOp::Kind kind, const Placed &place);
    void add_range_parts(Command &command, ShardOp::Kind kind, const HwptRoute &route);
    void part_done(Part &part);
    void send_all(Command &command);
    void roll_back(Command &command);
    void finish(Command &command);
    void complete(const dr_command &request, int result, std::uint64_t done, std::uint64_t epoch);

    Walker *home_;
    ring::Consumer<dr_command> submissions_;
    ring::Producer<dr_completion> completions_;
    std::function<void()> call_;
    std::deque<dr_command> taken_; // copied from the ring, not started
    bool look_again_ = false;      // something has come or ended since they were tried
    std::vector<std::unique_ptr<Command>> slots_;
    std::vector<Command *> free_;
    std::size_t in_flight_ = 0;
    bool asked_for_kick_ = false;

    struct Memory {
        std::uint64_t oa;
        std::uint64_t length;
    };
    std::vector<Memory> memory_;
    std::map<std::uint32_t, iommu::ExtentMap> ioases_;
    std::map<std::uint32_t, HwptRoute> hwpts_;
};

} // namespace dirtyring::service
