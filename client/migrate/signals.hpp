// Ctrl-C and its like: at any time one sentence, exit code 1, nothing left behind.
#pragma once

#include "ring/region.hpp"

#include <csignal>

namespace dirtyring::migrate {

// From now on a signal says so and exits at once: right as long as there is nothing to clean up.
void exit_when_interrupted();

// While it lives, signals wait to be read from fd() instead.
class Signals
{
  public:
    Signals();
    Signals(const Signals &) = delete;
    Signals &operator=(const Signals &) = delete;
    ~Signals();

    [[nodiscard]] int fd() const { return fd_.get(); }

    // In a forked child: as if neither of the above had been.
    void undo() const;

  private:
    sigset_t before_{};
    ring::Fd fd_;
};

} // namespace dirtyring::migrate
