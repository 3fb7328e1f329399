// Kills and stops, as the seed says.
#pragma once

#include "tests/chaos/run.hpp"
#include "tests/chaos/statistics.hpp"

#include <optional>
#include <random>
#include <vector>

namespace dirtyring::chaos {

class Disturber
{
  public:
    Disturber(Run &run, Statistics &statistics);

    // Until the time is up, or the service was killed so often as was asked for.
    void disturb();

  private:
    struct Action {
        unsigned weight;
        void (Disturber::*act)();
    };
    static std::vector<Action> actions(Only only);

    std::uint64_t draw(std::uint64_t below) { return random_() % below; }
    Guest &any_guest() { return run_.shared().guests[draw(run_.shared().guests.size())]; }

    void kill_service();
    void kill_service_at_point();
    void stop_service();
    void kill_device();
    void kill_device_at_point();
    void stop_device();
    void stall();
    void kill_vmm();
    void stop_vmm();
    void replace_vmm();
    void kill_visitor();

    Child &any_device(); // that is not spared
    void kill_worker();
    // After a death of the service: all guests go on, or, now and then, the next death comes first.
    void recover(std::uint64_t died_at);
    Point next_point();
    // A point that is not reached any more tests nothing.
    void expect_deaths_everywhere() const;

    Run &run_;
    Statistics &statistics_;
    std::mt19937_64 random_;
    struct Tried {
        Point point;
        std::uint64_t times;
    };
    std::vector<Tried> points_;
    unsigned deaths_ = 0; // of workers, since one was let settle
};

} // namespace dirtyring::chaos
