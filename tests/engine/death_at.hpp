// The owner of a shard that dies at a place that has a name; another takes up what it has left.
#pragma once

#include "iommu/rules.hpp"
#include "tests/engine/rig.hpp"

namespace dirtyring::test {

struct Death {
};

// Dies the n-th time that it comes to the place.
class DeathAt
{
  public:
    DeathAt(Point where, unsigned n)
    {
        at_point = [this, where, n](Point p) {
            if (p == where && ++seen_ == n)
                throw Death{};
        };
    }
    DeathAt(const DeathAt &) = delete;
    ~DeathAt() { at_point = nullptr; }
    [[nodiscard]] bool came() const { return came_; }

    // Steps until the operation is over; whoever dies is replaced.
    bool run(Rig &rig, const Op &op)
    {
        for (unsigned i = 0; i < 100'000 && !op.over(); ++i) {
            step(rig);
            rig.drain(0, 2);
        }
        return op.over();
    }

    void step(Rig &rig)
    {
        try {
            rig.step();
        } catch (const Death &) {
            came_ = true;
            rig.restart();
        }
    }

  private:
    unsigned seen_ = 0;
    bool came_ = false;
};

} // namespace dirtyring::test
