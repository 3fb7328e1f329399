// Steps in between two instructions of the protocol (iommu/rules.hpp).
#pragma once

#include "iommu/rules.hpp"

#include <functional>
#include <utility>

namespace dirtyring::test {

// The next time `where` is reached, or every time, `what` happens there; not within itself.
class Hook
{
  public:
    enum class Times { once, always };

    Hook(Point where, std::function<void()> what, Times times = Times::once)
    {
        at_point = [this, where, times, what = std::move(what)](Point p) {
            if (p != where || inside_ || (fired_ && times == Times::once))
                return;
            fired_ = true;
            inside_ = true;
            what();
            inside_ = false;
        };
    }
    Hook(const Hook &) = delete;
    ~Hook() { at_point = nullptr; }
    [[nodiscard]] bool fired() const { return fired_; }

  private:
    bool fired_ = false;
    bool inside_ = false;
};

// The rule that is broken meanwhile.
class Breaking
{
  public:
    explicit Breaking(Rule rule) { broken_rule.store(rule, std::memory_order_relaxed); }
    Breaking(const Breaking &) = delete;
    ~Breaking() { broken_rule.store(Rule::none, std::memory_order_relaxed); }
};

} // namespace dirtyring::test
