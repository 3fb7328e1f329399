// The VMM: what it asks for, what it knows by the completions, and whether it got what SPEC.md promises.
#pragma once

#include "tests/search/oracle.hpp"
#include "tests/search/world.hpp"

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace dirtyring::search {

class Vmm
{
  public:
    Vmm(World &world, Oracle &oracle);

    // ---- moves

    void submit_any();
    void reap(std::uint64_t most = UINT64_MAX);
    void drain(HwptWorld &hwpt, unsigned ring, std::uint64_t most = UINT64_MAX);
    void sleep();
    void sleep_at(DirtyRing &ring);

    // Of a whole area or less of it, or of what is mapped there.
    bool submit_unmap(const Plan::Area &area);
    // False: no room now.
    bool submit_enable();
    bool submit_sync();
    // All of an area; of a GiB all but the end.
    bool submit_map_of(const Plan::Area &area);

    // The rest of a destroyed hwpt's rings, too.
    void drain_all();

    // ---- what it knows

    [[nodiscard]] bool idle() const { return flights_.empty() && waiting_.empty(); }
    [[nodiscard]] bool quiet() const { return flights_.empty(); }
    [[nodiscard]] bool tracking_on() const;
    [[nodiscard]] bool enabled() const { return enabled_; }
    [[nodiscard]] bool enabling() const; // an ENABLE is in flight
    // Commands in flight, for a message.
    [[nodiscard]] std::string describe() const;
    [[nodiscard]] std::uint64_t states(std::optional<std::uint64_t> iova) const;

    // Has `iova` been mapped, with the right to write, since `time`, and nobody has asked to unmap it?
    [[nodiscard]] bool is_mapped_since(std::uint64_t iova, bool write, std::uint64_t time) const;
    // May a device that entered its section at `time` have reached this memory by this IOVA?
    [[nodiscard]] bool may_reach(std::uint64_t iova, std::uint64_t oa, bool write, std::uint64_t time) const;

    struct HeldPin {
        std::uint64_t start;
        std::uint64_t end;
        std::uint64_t time; // taken
        bool write;
    };
    std::function<std::vector<HeldPin>()> held_pins; // of devices that live

    // ---- the hwpt comes and goes

    // From here on what is in flight may be cancelled.
    void hwpt_goes() { ++era_; }
    void hwpt_gone();
    void hwpt_made();

  private:
    struct Flight {
        dr_command c{};
        std::uint64_t end = 0;
        int expected = 0;       // -errno: it is wrong by itself
        std::uint64_t time = 0; // of its submission
        std::uint64_t era = 0;
        std::uint64_t lives = 0;
        bool tracked = false; // tracking was on
        std::uint64_t disables = 0;
        Oracle::Snapshot before;                                   // sync
        std::vector<std::pair<std::uint64_t, std::uint64_t>> gaps; // map: what was noted for it
    };
    struct Waiting { // for the markers of a sync
        std::uint64_t cookie;
        bool judged;
        std::uint64_t disables;
        Oracle::Snapshot before;
    };
    struct Gone {
        iommu::Extent extent;
        std::uint64_t time;
    };

    [[nodiscard]] bool awake();
    [[nodiscard]] bool loose(const Flight &f) const;
    [[nodiscard]] static bool meet(const Flight &a, const Flight &b);
    bool submit(dr_command c, int expected = 0);
    // It has read the marker of a SYNC that is in flight, and reads on when that has completed.
    [[nodiscard]] bool waits_at(const DirtyRing &ring) const;
    bool submit_map();
    bool submit_resize();
    bool submit_wrong();
    bool submit_rest(const Flight &f, std::uint64_t done);
    void choose_range(const Plan::Area &area, std::uint64_t &from, std::uint64_t &length);

    void judge(const dr_completion &c);
    void judge_map(const Flight &f, const dr_completion &c);
    void judge_unmap(const Flight &f, const dr_completion &c);
    void judge_epoch(const Flight &f, const dr_completion &c);
    void judge_tracking(const Flight &f, const dr_completion &c);
    void judge_sync(Flight &f, const dr_completion &c);
    void judge_pins(const Flight &f, std::uint64_t upto);
    void judge_markers();
    void take(HwptWorld &hwpt, unsigned ring, std::uint64_t entry, std::uint64_t index);
    void look_at_rings();
    template <class Visit> void for_each_discarded(Visit visit) const;

    World &world_;
    Oracle &oracle_;
    ring::Producer<dr_command> submissions_;
    ring::Consumer<dr_completion> completions_;
    std::map<std::uint64_t, Flight> flights_; // by user_data, that is, as they were submitted
    std::deque<Waiting> waiting_;
    iommu::ExtentMap maps_; // by completions; tag: when it came
    std::deque<Gone> gone_;
    std::set<std::uint64_t> epochs_;
    bool enabled_ = false;
    std::uint64_t disables_ = 0;
    std::uint64_t era_ = 0;
    std::uint64_t next_user_data_ = 1;
    std::uint64_t cookie_ = 0;
    bool asleep_ = false;
};

} // namespace dirtyring::search
