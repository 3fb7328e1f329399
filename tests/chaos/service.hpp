// The service that is disturbed: a supervisor, its worker, and the plan where the worker is to kill itself.
#pragma once

#include "client/migrate/signals.hpp"
#include "ring/region.hpp"
#include "tests/chaos/options.hpp"
#include "tests/service/die_plan.hpp"

#include <cstdint>
#include <deque>
#include <string>
#include <sys/types.h>

namespace dirtyring::chaos {

// What a process holds, by /proc.
struct Holdings {
    std::size_t descriptors;
    std::size_t memfds;    // among them
    std::size_t mapped;    // mappings of memfds
    std::int64_t resident; // kB
};
Holdings holdings(pid_t pid);

class Service
{
  public:
    // Its socket, its log and the plan are in `directory`. It is up when this returns.
    Service(const Options &options, const std::string &directory, const migrate::Signals &signals);
    Service(const Service &) = delete;
    Service &operator=(const Service &) = delete;
    ~Service();

    [[nodiscard]] pid_t supervisor() const { return supervisor_; }
    // 0: none lives.
    [[nodiscard]] pid_t worker() const;
    // False: there was none.
    [[nodiscard]] bool signal_worker(int number) const;

    void plan(Point point, std::uint64_t times) const;
    void forget_plan() const { plan_->at = 0; }
    [[nodiscard]] std::uint64_t died() const { return plan_->died; }

    // Returns when it has made a guest and freed it; throws a Hang if it does not.
    void expect_up();
    // Throws a Failure if it has ended, or a worker has died of anything but SIGKILL.
    void look();
    // Asks it to end. Throws a Failure if it does not end well.
    void end();

  private:
    const Options &options_;
    std::string directory_;
    pid_t supervisor_ = 0; // 0: it has ended
    ring::Mapping plan_map_;
    test::DiePlan *plan_ = nullptr;
    std::streamoff looked_at_ = 0; // so much of the log
    std::deque<std::string> said_; // its last lines
};

} // namespace dirtyring::chaos
