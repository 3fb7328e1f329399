// One guest's command ring, polled by the guest's home walker.
//
// Checks each command against the guest's own record of its maps, hands its parts to the shards concerned, which other
// walkers may own, and completes it when the last part is back. Everything runs on the home walker's thread, but for
// Part::done.
//
// Commands on overlapping IOVAs, and changes of one hwpt's tracking, take effect in order: a command that meets one
// before it waits; those behind it go on.
//
// How far each command has come is in the journal, so that a worker that takes over after a restart loses none and does
// none twice:
//
//   Commands(config with restarted) → add_memory, add_ioas, add_hwpt, restore_extents, admit, in this order →
//   restored() → adopt
#pragma once

#include "iommu/extent_map.hpp"
#include "iommu/slice_record.hpp"
#include "ring/consumer.hpp"
#include "ring/producer.hpp"
#include "service/commands/command_journal.hpp"
#include "service/engine/agent.hpp"
#include "service/engine/shard.hpp"
#include "service/walkers/inbox.hpp"

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <vector>

namespace dirtyring::service {

// A shard, and where tasks for the walker that owns it go.
struct Placed {
    Shard *shard;
    Inbox *owner;
};

// What the home walker knows of an hwpt.
struct HwptRoute {
    std::uint32_t ioas;
    unsigned aperture_lg2;
    unsigned slice_lg2;
    unsigned oa_lg2;          // its entries can name OAs below 2^oa_lg2
    std::uint64_t leaf_sizes; // bit n: leaves of 2^n bytes are used
    bool tracks;              // dirty tracking was asked for
    bool epochs;              // its rings are in IOVA space
    std::vector<Placed> shards;
    HwptRecord *record;                      // outlives the worker
    std::set<std::uint32_t> in_the_way = {}; // devices that cannot be tracked in it
};

// How an hwpt stands.
struct Tracking {
    bool enabled;             // from the beginning of an ENABLE to the completion of a DISABLE
    std::uint32_t in_the_way; // the smallest id; 0: there is none
};

class Commands final : public Agent
{
  public:
    struct Config {
        Inbox *home; // of the guest's home walker
        std::uint32_t capacity;
        dr_ring_consumer *submissions; // ours
        dr_ring_producer *submissions_peer;
        dr_ring_producer *completions; // ours
        dr_ring_consumer *completions_peer;
        std::function<void()> call;
        std::span<CommandRecord> journal; // `capacity` of them; zeroes, or what a worker before has left
        bool restarted = false;           // a worker before had these rings: nothing is taken until restored()
    };

    explicit Commands(Config config);
    ~Commands() override;

    // Takes and starts what can be.
    bool step(std::uint64_t now_ns) override;

    // Not busy: the VMM will kick.
    Rest prepare_sleep(std::uint64_t now_ns) override;
    void wake() override;

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

    // A device that cannot be tracked in the hwpt is about to attach: no ENABLE from here on, until it is withdrawn.
    // False: it is enabled, and the device must stay out.
    [[nodiscard]] bool admit(std::uint32_t hwpt, std::uint32_t device);
    void withdraw(std::uint32_t hwpt, std::uint32_t device); // which may be gone by now
    [[nodiscard]] Tracking tracking(std::uint32_t hwpt) const;

    // After a restart, when the ioas has its hwpt and while no shard of it has a walker yet: what the records of its
    // slices say is mapped. From any thread, as long as nothing else is called.
    void restore_extents(std::uint32_t ioas, std::span<const iommu::SliceRecord> slices);
    // After a restart, when all objects are there: goes on with what the worker before has left, and calls the VMM,
    // which may have missed a call. On the home walker's thread; the shards' walkers have them, or will.
    void restored();

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
        [[nodiscard]] const dr_command &request() const { return record->request; }

        CommandRecord *record = nullptr;
        bool again = false;    // a restart does it again
        std::uint64_t end = 0; // map, unmap: half-open
        std::uint64_t reached = 0;
        std::size_t sent = 0;
        std::size_t returned = 0;
        int result = 0;
        bool rolling_back = false; // a map of which one part failed
        std::vector<Part> parts;
    };

    void take(std::span<const dr_command> fresh);

    // A command is refused with a negative errno, waits with -EINPROGRESS, or is started or done with 0.
    int start(CommandRecord &record);
    int start_map(CommandRecord &record);
    int start_unmap(CommandRecord &record);
    int start_resize(CommandRecord &record);
    int start_on_hwpt(CommandRecord &record);
    // Starts what the worker before had begun.
    void start_again(CommandRecord &record);
    // The hwpt of an ioas; nullptr: it has none.
    HwptRoute *route_of(std::uint32_t ioas);
    [[nodiscard]] bool meets_one_waiting(const dr_command &request, std::size_t waiting) const;
    [[nodiscard]] bool meets_one_in_flight(const dr_command &request, std::uint64_t end) const;
    [[nodiscard]] bool enabled(std::uint32_t hwpt, const HwptRoute &route) const;

    // The command is recorded as begun: only now may parts of it be sent.
    Command &begin(CommandRecord &record, std::uint64_t end, std::uint64_t epoch);
    Command &enter(CommandRecord &record, std::uint64_t end);
    Part &add_part(Command &command, ShardOp::Kind kind, const Placed &place);
    void add_range_parts(Command &command, ShardOp::Kind kind, const HwptRoute &route);
    void send_map(Command &command, const HwptRoute &route);
    void send_unmap(Command &command, const HwptRoute &route);
    void send_resize(Command &command, const HwptRoute &route);
    void send_on_hwpt(Command &command, const HwptRoute &route);
    void send_all(Command &command);
    void part_done(Part &part);
    void roll_back(Command &command);
    void finish(Command &command);
    void complete(CommandRecord &record, int result, std::uint64_t done, std::uint64_t epoch);

    Inbox *home_;
    CommandJournal journal_;
    ring::Consumer<dr_command> submissions_;
    ring::Producer<dr_completion> completions_;
    std::function<void()> call_;
    bool restarting_;
    std::deque<CommandRecord *> taken_; // not started
    std::vector<std::unique_ptr<Command>> slots_;
    std::vector<Command *> free_;
    std::vector<Command *> in_flight_;
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
