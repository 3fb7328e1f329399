// DPDK's EAL, in this process only: lcores for walkers.
#pragma once

#include "service/walkers/walker.hpp"

#include <tl/expected.hpp>

#include <memory>
#include <string>
#include <vector>

namespace dirtyring::service {

// Starts the EAL once in the process. The calling thread stays free to run on every CPU it may use; walkers have one
// each, counted from the last, and share them when there are fewer CPUs than walkers.
class Lcores
{
  public:
    // The error is a sentence.
    static tl::expected<std::unique_ptr<Lcores>, std::string> start(unsigned walkers);
    // Stops the walkers and ends the EAL.
    ~Lcores();

    [[nodiscard]] std::vector<Walker *> walkers() const;
    // Waits until no walker runs any more.
    void stop();

  private:
    Lcores() = default;

    std::vector<std::unique_ptr<Walker>> walkers_;
    bool running_ = false;
};

} // namespace dirtyring::service
