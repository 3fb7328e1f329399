// Has somebody who may nap been given something to do? One thread, the walker's.
#pragma once

#include <utility>

namespace dirtyring::service {

class Stir
{
  public:
    void set()
    {
        set_ = true;
        if (all_ != nullptr)
            *all_ = true;
    }
    // Was it set? It is not any more.
    [[nodiscard]] bool take() { return std::exchange(set_, false); }
    [[nodiscard]] bool is_set() const { return set_; }

    // While it naps: `all` becomes true as well, one word for many, so that nobody has to look at each. nullptr: it is
    // awake.
    void report_to(bool *all) { all_ = all; }

  private:
    bool set_ = false;
    bool *all_ = nullptr;
};

} // namespace dirtyring::service
