// A guest's VMM: consumes the rings, copies, changes maps, syncs, and compares its copy with the devices' journal at
// each sync.
#pragma once

#include "client/dirtyring.hpp"
#include "client/retained_map.hpp"
#include "tests/chaos/shared.hpp"

#include <functional>
#include <optional>
#include <random>
#include <vector>

namespace dirtyring::chaos {

class Vmm
{
  public:
    Vmm(Shared &shared, Guest &guest, std::uint64_t seed);
    Vmm(const Vmm &) = delete;
    Vmm &operator=(const Vmm &) = delete;
    ~Vmm() { dirtyring_set_close(set_); }

    // Until it is asked to leave or to finish.
    void run();

  private:
    std::uint64_t draw(std::uint64_t below) { return random_() % below; }
    [[nodiscard]] bool wanted(const Word &word) const { return word.load(std::memory_order_seq_cst) != 0; }

    // ---- beginning and end

    void open();
    void set_up();
    void fill();
    void take_up();
    void track();
    void leave();
    void finish();

    // ---- reports

    void consume();
    void take(std::uint64_t entry, std::uint32_t shard);
    void copy_run(std::uint64_t start, std::uint64_t length, std::uint32_t shard);
    void copy(std::uint64_t oa, std::uint64_t length);

    // ---- syncs

    void sync();
    void start_sync();
    void judge();
    void wait();
    [[nodiscard]] bool deaf() const { return syncing_ && asleep_; }

    // ---- changes of maps; vmm_maps.cpp

    void change_maps();
    void map(unsigned block, unsigned place);
    void unmap(unsigned block, BlockState::Change how);
    void queue_unmap(unsigned block, std::uint64_t from);
    void reap();
    void mapped(unsigned block, const dr_completion &completion);
    void unmapped(unsigned block, const dr_completion &completion);
    void changed(unsigned block);
    void unmap_some();
    void hear_first();
    void switch_tracking();
    void while_consuming(const std::function<void()> &call);
    [[nodiscard]] std::vector<bool> being_discarded() const;
    // The judge wants to know since when the oldest one is under way.
    void tell_changes() const;

    Shared &shared_;
    Guest &guest_;
    GuestState &state_;
    const Layout &layout_;
    std::mt19937_64 random_;
    dirtyring_vm *vm_ = nullptr;
    dirtyring_set *set_ = nullptr;

    // What IOVAs in the rings mean. After a takeover nobody knows until the first sync, by which all runs of the
    // predecessor's maps have come: until then a run means all places of its block.
    RetainedMap retained_{layout_.shards, slice_lg2};
    bool anywhere_ = false;

    struct Change {
        std::uint64_t since = 0; // ns; 0: none
        std::uint64_t from = 0;  // unmap: where the rest begins
        std::uint32_t harvest = 0;
        unsigned place = 0;
    };
    Change change_[blocks];
    unsigned changes_ = 0; // under way

    bool syncing_ = false;
    bool asleep_ = false; // this sync is waited for by calls alone
    std::uint64_t sync_since_ = 0;
    std::uint64_t next_sync_ = 0; // ns
    std::uint64_t next_change_ = 0;
    std::uint64_t next_switch_ = 0;
    Journal::Snapshot wanted_;
    Journal::Snapshot seen_;
};

} // namespace dirtyring::chaos
