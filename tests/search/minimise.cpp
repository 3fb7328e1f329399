#include "tests/search/isolated.hpp"

#include <algorithm>

namespace dirtyring::search {

namespace {

class Minimiser
{
  public:
    Minimiser(Schedule schedule, std::string kind, Coverage &coverage, unsigned tries)
        : best_(std::move(schedule)), kind_(std::move(kind)), coverage_(coverage), tries_(tries)
    {
    }

    Schedule run()
    {
        for (std::size_t before = SIZE_MAX; best_.numbers() < before && tries_ > 0;) {
            before = best_.numbers();
            drop_steps();
            shorten_steps();
        }
        make_zero(best_.attributes.size(), [](Schedule &s) -> Schedule::Step & { return s.attributes; });
        for (std::size_t i = 0; i < best_.steps.size(); ++i)
            make_zero(best_.steps[i].size(), [i](Schedule &s) -> Schedule::Step & { return s.steps[i]; });
        return best_;
    }

  private:
    // Is it as good? Then it is the best.
    bool try_this(Schedule schedule)
    {
        if (tries_ == 0)
            return false;
        --tries_;
        const Result result = run_isolated(Choices(schedule), coverage_);
        if (!result.finding || result.finding->kind != kind_)
            return false;
        best_ = std::move(schedule);
        return true;
    }

    void drop_steps()
    {
        for (std::size_t n = std::max<std::size_t>(best_.steps.size() / 2, 1); n > 0; n /= 2) {
            for (std::size_t at = best_.steps.size(); at > 0;) {
                const std::size_t from = at > n ? at - n : 0;
                Schedule s = best_;
                s.steps.erase(s.steps.begin() + static_cast<std::ptrdiff_t>(from),
                              s.steps.begin() + static_cast<std::ptrdiff_t>(at));
                static_cast<void>(try_this(std::move(s)));
                at = std::min(from, best_.steps.size());
            }
        }
    }

    // From the end of each; what is missing is 0.
    void shorten_steps()
    {
        for (std::size_t i = best_.steps.size(); i-- > 0;) {
            for (std::size_t n = best_.steps[i].size(); n > 0; n /= 2) {
                while (best_.steps[i].size() >= n) {
                    Schedule s = best_;
                    s.steps[i].resize(s.steps[i].size() - n);
                    if (!try_this(std::move(s)))
                        break;
                }
            }
        }
    }

    template <class Get> void make_zero(std::size_t size, Get get)
    {
        for (std::size_t i = 0; i < size; ++i) {
            if (get(best_)[i] == 0)
                continue;
            Schedule s = best_;
            get(s)[i] = 0;
            static_cast<void>(try_this(std::move(s)));
        }
    }

    Schedule best_;
    std::string kind_;
    Coverage &coverage_;
    unsigned tries_;
};

} // namespace

Schedule minimise(Schedule schedule, const std::string &kind, Coverage &coverage, unsigned tries)
{
    return Minimiser(std::move(schedule), kind, coverage, tries).run();
}

} // namespace dirtyring::search
