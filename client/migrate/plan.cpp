#include "client/migrate/plan.hpp"

#include "client/migrate/failure.hpp"
#include "client/migrate/units.hpp"
#include "iommu/extent_map.hpp"

#include <algorithm>

namespace dirtyring::migrate {
namespace {

constexpr iommu::Rights read_write{true, true};
constexpr std::uint64_t space_max = std::uint64_t{1} << 48; // the widest aperture
constexpr std::uint64_t access_max = 1u << 30;

class Planner
{
  public:
    Planner(const std::string &path, std::uint64_t memory, bool identity)
        : path_(path), memory_(memory),
          missing_(identity ? "lies outside the guest's memory of " + bytes(memory) : "is not mapped there")
    {
        if (identity)
            live_.insert({0, memory, 0, read_write});
    }

    void add(const TraceEvent &event)
    {
        if (event.kind == TraceEvent::Kind::map)
            map(event);
        else if (event.kind == TraceEvent::Kind::unmap)
            unmap(event);
        else
            access(event);
        plan_.duration_us = event.time_us;
    }

    Plan take() { return std::move(plan_); }

  private:
    [[nodiscard]] BadInput wrong(const TraceEvent &event, const std::string &what) const
    {
        return BadInput(fmt::format("{}:{}: {}", path_, event.line, what));
    }

    void reach(const TraceEvent &event)
    {
        const std::uint64_t end = event.address + event.length;
        if (end > space_max)
            throw wrong(event, fmt::format("expected an address below 2^48, found {:#x}", end - 1));
        plan_.iova_end = std::max(plan_.iova_end, end);
    }

    void map(const TraceEvent &event)
    {
        reach(event);
        if (event.oa > memory_ || event.length > memory_ - event.oa)
            throw wrong(event, fmt::format("the map's oa {:#x} with {} bytes lies outside the guest's memory of {}",
                                           event.oa, event.length, bytes(memory_)));
        const std::uint64_t start = event.address;
        const std::uint64_t end = start + event.length;
        for (std::uint64_t at = start; at < end;) {
            const auto e = live_.first_in(at, end);
            if (e && e->oa - e->start != event.oa - start)
                throw wrong(event, fmt::format("iova {:#x} is mapped to another oa already", std::max(at, e->start)));
            const std::uint64_t gap_end = e ? std::max(at, e->start) : end;
            if (gap_end > at)
                live_.insert({at, gap_end, event.oa + (at - start), read_write});
            at = e ? e->end : end;
        }
        plan_.changes.push_back(
            {event.time_us, start, event.length, event.oa, plan_.accesses.size(), event.line, true});
        ++plan_.maps;
    }

    void unmap(const TraceEvent &event)
    {
        const bool rest = event.length >= space_max - std::min(event.address, space_max);
        const std::uint64_t end = rest ? space_max : event.address + event.length;
        if (live_.spans(event.address) || live_.spans(end))
            throw wrong(event, "expected an unmap of whole maps, this one cuts a map in two");
        live_.erase(event.address, end);
        plan_.changes.push_back({event.time_us, event.address, rest ? UINT64_MAX : event.length, 0,
                                 plan_.accesses.size(), event.line, false});
    }

    void access(const TraceEvent &event)
    {
        const char *verb = event.kind == TraceEvent::Kind::write ? "write" : "read";
        reach(event);
        if (event.length > access_max)
            throw wrong(event, fmt::format("expected a {} of at most {}, found {} bytes", verb, bytes(access_max),
                                           event.length));
        const std::size_t first_page = plan_.pages.size();
        const std::uint64_t end = event.address + event.length;
        for (std::uint64_t at = event.address / page_size * page_size; at < end; at += page_size) {
            const auto e = live_.first_in(at, at + 1);
            if (!e)
                throw wrong(event, fmt::format("the {} of {} bytes at {:#x} touches {:#x}, which {}", verb,
                                               event.length, event.address, at, missing_));
            plan_.pages.push_back(static_cast<std::uint32_t>((e->oa + (at - e->start)) / page_size));
        }
        plan_.accesses.push_back({event.time_us, event.address, static_cast<std::uint32_t>(event.length),
                                  static_cast<std::uint32_t>(first_page), static_cast<std::uint32_t>(plan_.maps),
                                  event.line, event.kind == TraceEvent::Kind::write});
    }

    const std::string &path_;
    std::uint64_t memory_;
    std::string missing_;   // what is wrong with an address that no map has
    iommu::ExtentMap live_; // as the trace has it at this event
    Plan plan_;
};

} // namespace

Plan make_plan(const std::string &path, const std::vector<TraceEvent> &events, std::uint64_t memory)
{
    const bool identity = std::all_of(events.begin(), events.end(), [](const TraceEvent &e) { return e.is_access(); });
    Planner planner(path, memory, identity);
    for (const TraceEvent &event : events)
        planner.add(event);
    return planner.take();
}

} // namespace dirtyring::migrate
