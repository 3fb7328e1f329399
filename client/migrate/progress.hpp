// What the user sees while it runs: a bar on a terminal, else a line for each round and each second.
#pragma once

#include "client/migrate/control.hpp"
#include "client/migrate/options.hpp"

#include <cstdint>

namespace dirtyring::migrate {

class Progress
{
  public:
    Progress(const Control &control, const Options &options);
    Progress(const Progress &) = delete;
    Progress &operator=(const Progress &) = delete;
    ~Progress();

    // Shows what is new; call it a few times a second.
    void tick();

  private:
    void show_rounds();
    void show_state();
    void measure();

    const Control &control_;
    const Options &options_;
    bool terminal_;
    bool bar_shown_ = false;
    std::uint32_t rounds_shown_ = 0;
    std::uint64_t line_ns_; // when the last line of the clock was
    std::uint64_t measured_ns_;
    double measured_reported_ = 0; // bytes
    double measured_remaining_;    // bytes
    double dirty_rate_ = 0;        // bytes/s
    double gain_ = 0;              // by how much less remains, bytes/s
};

} // namespace dirtyring::migrate
