// The service: a worker's life, its end at any point, and the next one. Its two walkers take steps in turn, also one
// within a step of the
// other; the home walker has the guest's commands and every second shard.
#pragma once

#include "service/commands/commands.hpp"
#include "service/walkers/inbox.hpp"
#include "tests/search/world.hpp"

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace dirtyring::search {

// Unwinds what a worker was doing.
struct ServiceDeath {
};

// What dies with a worker.
class Life
{
  public:
    // In the order of Control::put_to_work (service/control/restore.cpp), but for Commands::restored().
    explicit Life(World &world);
    Life(const Life &) = delete;

    [[nodiscard]] static unsigned owner(unsigned shard) { return shard % 2; }
    void add_hwpt(bool restored);
    // Its shards are dropped, and the home walker has seen all parts.
    void forget_hwpt() { shards.clear(); }

    struct Sleep {
        bool asleep = false;
        std::uint64_t until = UINT64_MAX;
    };

    World &world;
    std::array<service::Inbox, 2> inboxes; // of the walkers
    std::vector<std::unique_ptr<service::Shard>> shards;
    std::vector<Sleep> sleeps; // of the shards
    std::optional<service::Commands> commands;
    bool home_asleep = false;
    bool home_begun;                          // a restart: the home walker has gone on with what was left
    std::deque<std::uint32_t> reported;       // devices, once for each shard: on the way to the control thread
    std::array<std::vector<bool *>, 2> calls; // of each walker, at the end of its round
};

class Service
{
  public:
    explicit Service(World &world) : world_(world) {}

    [[nodiscard]] bool alive() const { return life_ != nullptr && !dying_; }
    // A worker that is still on the stack goes on to die when it is its turn again.
    [[nodiscard]] bool dying() const { return dying_; }
    [[nodiscard]] bool is_free(unsigned walker) const { return alive() && (busy_ & 1u << walker) == 0; }
    // A worker has come, and its home walker has not gone on yet.
    [[nodiscard]] bool not_begun_again() const { return life_ != nullptr && !life_->home_begun; }
    [[nodiscard]] Life &life() { return *life_; }

    // Does work on a walker's thread. False: that is at work already, or there is no worker. Not asked whether it
    // lived to the end.
    bool on(unsigned walker, const std::function<void()> &work) { return run(1u << walker, work); }

    bool on_both(const std::function<void()> &work) { return run(3, work); }

    // ---- moves

    void start(); // the next worker, unless there is one
    void kill();
    void step_shard(unsigned shard);
    void step_home();
    void drain(unsigned walker);
    void sleep_shard(unsigned shard);
    void sleep_home();

    // Everybody works until there is nothing to do, and goes to sleep. The next time that a sleeper wants to be
    // looked at, or UINT64_MAX.
    std::uint64_t settle();

    std::function<void()> ended; // a worker has died

  private:
    bool run(unsigned walkers, const std::function<void()> &work);
    bool wake_shard(unsigned shard);
    bool wake_home();

    World &world_;
    std::unique_ptr<Life> life_;
    unsigned busy_ = 0;
    unsigned frames_ = 0;
    bool dying_ = false;
};

} // namespace dirtyring::search
