#include "client/migrate/load.hpp"

#include "client/migrate/mix.hpp"

#include <algorithm>
#include <random>

namespace dirtyring::migrate {
namespace {

// Every devices-th access of the trace, over all its loops.
class TraceLoad final : public Load
{
  public:
    TraceLoad(const Options &options, const Plan &plan, unsigned device) : options_(options), plan_(plan), at_(device)
    {
    }

    std::optional<Step> next() override
    {
        const std::uint64_t accesses = plan_.accesses.size();
        if (accesses == 0)
            return std::nullopt;
        const std::uint64_t loop = at_ / accesses;
        if (options_.loops != 0 && loop >= options_.loops)
            return std::nullopt;
        const Access &access = plan_.accesses[at_ % accesses];
        at_ += options_.devices;
        return Step{.due_ns = replay_ns(options_, plan_, loop, access.time_us),
                    .iova = access.iova,
                    .length = access.length,
                    .pages = plan_.pages_of(access),
                    .maps_before = loop * plan_.maps + access.maps_before,
                    .line = access.line,
                    .write = access.write};
    }

  private:
    const Options &options_;
    const Plan &plan_;
    std::uint64_t at_; // among the accesses of all loops
};

// Whole pages at a steady rate.
class PatternLoad final : public Load
{
  public:
    PatternLoad(const Options &options, unsigned device)
        : options_(options), random_(mix(device)),
          page_(static_cast<std::uint32_t>(options.pages() / options.devices * device))
    {
    }

    std::optional<Step> next() override
    {
        const double at = static_cast<double>(steps_++) * options_.devices / static_cast<double>(options_.rate);
        if (options_.seconds > 0 && at >= options_.seconds)
            return std::nullopt;
        page_ = static_cast<std::uint32_t>(choose());
        return Step{.due_ns = static_cast<std::uint64_t>(at * 1e9),
                    .iova = page_ * page_size,
                    .length = page_size,
                    .pages = {&page_, 1},
                    .maps_before = 0,
                    .line = 0,
                    .write = true};
    }

  private:
    std::uint64_t choose()
    {
        const std::uint64_t pages = options_.pages();
        const std::uint64_t hot = std::max<std::uint64_t>(pages / 100, 1);
        switch (options_.pattern) {
        case Pattern::sequential:
            return (page_ + 1) % pages;
        case Pattern::uniform:
            return random_() % pages;
        case Pattern::hotset: // nine writes of ten go to a hundredth of the memory
            return random_() % 10 != 0 ? random_() % hot : random_() % pages;
        }
        return 0;
    }

    const Options &options_;
    std::mt19937_64 random_;
    std::uint32_t page_;
    std::uint64_t steps_ = 0;
};

} // namespace

std::unique_ptr<Load> make_load(const Options &options, const Plan &plan, unsigned device)
{
    if (options.synthetic())
        return std::make_unique<PatternLoad>(options, device);
    return std::make_unique<TraceLoad>(options, plan, device);
}

std::uint64_t replay_ns(const Options &options, const Plan &plan, std::uint64_t loop, std::uint64_t time_us)
{
    if (options.speed == 0)
        return 0;
    const double us = static_cast<double>(loop) * static_cast<double>(plan.duration_us) + static_cast<double>(time_us);
    return static_cast<std::uint64_t>(us * 1000 / options.speed);
}

} // namespace dirtyring::migrate
