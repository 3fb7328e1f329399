// One schedule: who takes a step is a choice, also between two instructions of another; then all come to rest, and
// everything must have
// come to its end.
#pragma once

#include "tests/search/devices.hpp"
#include "tests/search/hwpt_control.hpp"
#include "tests/search/oracle.hpp"
#include "tests/search/service.hpp"
#include "tests/search/vmm.hpp"
#include "tests/search/world.hpp"

#include <optional>
#include <string>
#include <vector>

namespace dirtyring::search {

class Run
{
  public:
    Run(Choices &choices, Coverage &coverage, bool telling = false);
    Run(const Run &) = delete;
    ~Run() { at_point = nullptr; }

    // What went wrong; nothing: all is well.
    std::optional<Finding> run();

    [[nodiscard]] std::string attributes() const { return world_.attributes.text(); }
    // Of each step, and of the end: what it did, in words.
    [[nodiscard]] const std::vector<std::string> &told() const { return told_; }

  private:
    void move();
    void serve();
    void see_off();
    void control();
    void interfere(Point p);
    void pass_by(Point p);
    [[noreturn]] void die(Point p); // the service
    void hurry();
    template <class Steps> void step_in(Steps steps);
    void draw_gap();
    void end_step();
    void start_ahead();
    void come_to_rest();
    void expect_reported(const Oracle::Snapshot &written);
    void finish_changes();
    bool settle_all(bool (Run::*over)());
    bool all_quiet();
    [[nodiscard]] bool breaking() const;
    [[nodiscard]] std::uint64_t states(std::optional<std::uint64_t> iova) const;

    World world_;
    Oracle oracle_;
    Vmm vmm_;
    Service service_;
    Devices devices_;
    HwptControl hwpts_;
    unsigned depth_ = 0;
    bool calm_ = true; // nobody steps in between
    std::uint64_t gap_ = 0;
    std::uint64_t leaves_ = 0;
    std::vector<std::string> told_;
};

} // namespace dirtyring::search
