// Find, clear, invalidate, publish, and a consumer that reads every entry: all of it, on one core, beside those who do
// the same work by bitmaps, over the same tables and dirty pages.
#include "perf/bandwidth.hpp"
#include "perf/bench_hwpt.hpp"
#include "perf/bitmap_peers.hpp"
#include "perf/figures.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

namespace {

using namespace dirtyring::perf;
namespace iommu = dirtyring::iommu;

using Pages = std::vector<std::uint32_t>;

volatile std::uint64_t sink; // what was read is used

class Guest
{
  public:
    explicit Guest(unsigned pages_lg2)
        : hwpt_(pages_lg2 + DR_PAGE_LG2), iommufd_(hwpt_.geometry(), hwpt_.tables(), hwpt_.pages()),
          bitmap_(hwpt_.pages()), log_(hwpt_.pages())
    {
        hwpt_.sweep_and_consume();
    }

    [[nodiscard]] std::uint64_t pages() const { return hwpt_.pages(); }

    void dirty(const Pages &pages)
    {
        for (const std::uint32_t page : pages)
            hwpt_.mark_dirty(page);
    }

    // ---- each takes what is dirty; how long that took, ns

    double ours()
    {
        return timed([&] { sink = hwpt_.sweep_and_consume(); });
    }
    double ours_all_entries()
    {
        hwpt_.owe_full_scan();
        return ours();
    }
    double each_page_walk() { return walk(&Iommufd::walk_each_page); }
    double table_walk() { return walk(&Iommufd::walk_tables); }
    double vhost_log(const Pages &pages)
    {
        for (const std::uint32_t page : pages)
            log_.set_shared(page);
        return timed([&] { sink = read(log_); });
    }

    // The limit: somebody has told which lines are dirty, and clears D in them.
    double clearing(const std::vector<std::uint32_t> &lines)
    {
        const double ns = timed([&] {
            for (const std::uint32_t line : lines)
                hwpt_.make_line_clean(line);
        });
        hwpt_.sweep_and_consume(); // the summary
        return ns;
    }

    // Everybody finds just these pages, or the figures are worth nothing.
    void check(const Pages &pages)
    {
        std::vector<bool> dirtied(this->pages());
        for (const std::uint32_t page : pages)
            dirtied[page] = true;
        const auto found = [&](const char *who, auto take) {
            std::vector<bool> pages_found(this->pages());
            take([&](std::uint64_t page) { pages_found[page] = true; });
            if (pages_found != dirtied)
                throw Failure(fmt::format("{} found other pages than were dirty", who));
        };
        const auto sweep = [&](auto each) {
            hwpt_.sweep_and_visit([&](std::uint64_t first, std::uint64_t n) {
                for (std::uint64_t i = 0; i < n; ++i)
                    each(first + i);
            });
        };
        dirty(pages);
        found("our walker", sweep);
        dirty(pages);
        hwpt_.owe_full_scan();
        found("our full scan", sweep);
        dirty(pages);
        iommufd_.walk_each_page(bitmap_);
        found("the walker page by page", [&](auto each) { bitmap_.take(each); });
        dirty(pages);
        iommufd_.walk_tables(bitmap_);
        found("the walker table by table", [&](auto each) { bitmap_.take(each); });
        for (const std::uint32_t page : pages)
            log_.set_shared(page);
        found("the log", [&](auto each) { log_.take(each); });
        hwpt_.sweep_and_consume(); // what the others have left in the summary
    }

  private:
    static std::uint64_t read(Bitmap &bitmap)
    {
        std::uint64_t pages = 0;
        bitmap.take([&](std::uint64_t page) { pages += page; });
        return pages;
    }

    double walk(void (Iommufd::*how)(Bitmap &))
    {
        const double ns = timed([&] {
            (iommufd_.*how)(bitmap_);
            sink = read(bitmap_);
        });
        hwpt_.sweep_and_consume(); // the summary
        return ns;
    }

    BenchHwpt hwpt_;
    Iommufd iommufd_;
    Bitmap bitmap_;
    Bitmap log_;
};

// `count` different ones in runs of `run`, in random order.
Pages choose(std::uint64_t pages, std::uint64_t count, std::uint64_t run)
{
    std::mt19937_64 random(1);
    std::vector<bool> taken(pages / run);
    Pages chosen;
    while (chosen.size() < count) {
        const std::uint64_t at = random() % taken.size();
        if (taken[at])
            continue;
        taken[at] = true;
        for (std::uint64_t i = 0; i < run; ++i)
            chosen.push_back(static_cast<std::uint32_t>(at * run + i));
    }
    return chosen;
}

Pages all(std::uint64_t pages)
{
    Pages chosen(pages);
    std::iota(chosen.begin(), chosen.end(), 0u);
    return chosen;
}

Samples scaled(Samples samples, double by)
{
    for (double &sample : samples)
        sample *= by;
    return samples;
}

void measure_clean_full_scan(Session &session, Guest &guest, unsigned pages_lg2, double goal)
{
    guest.check({});
    const EntriesAtBest best(guest.pages());
    const auto samples = in_turns(
        session.turns(), {[&] { return guest.ours_all_entries(); }, [&] { return guest.table_walk(); },
                          [&] { return timed([&] { sink = read_all<Ahead::asked_for>(best.entries()); }); },
                          [&] { return timed([&] { sink = read_all<Ahead::left_to_hardware>(best.entries()); }); }});
    const Samples &reading =
        std::min(samples[2], samples[3], [](const Samples &a, const Samples &b) { return median(a) < median(b); });
    session.add(Figure{.name = fmt::format("clean full scan, 2^{} pages", pages_lg2),
                       .unit = "ms",
                       .ours = scaled(samples[0], 1e-6),
                       .peer = Other{"generic_pt", scaled(samples[1], 1e-6)},
                       .limit = Other{"reading", scaled(reading, 1e-6)},
                       .ratio = Ratio::limit_to_ours,
                       .goal = Goal::ratio_at_least(goal)});
}

void measure_clean_sweep(Session &session, Guest &guest, double goal_us)
{
    const unsigned sweeps = session.pick(1u, 1000u, 1000u); // in one sample: one is over too soon
    const auto samples = in_turns(session.turns(), {[&] {
                                                        double ns = 0;
                                                        for (unsigned i = 0; i < sweeps; ++i)
                                                            ns += guest.ours();
                                                        return ns / sweeps;
                                                    },
                                                    [&] { return guest.vhost_log({}); }});
    session.add(Figure{.name = fmt::format("clean sweep with summary, {} GiB", guest.pages() >> 18),
                       .unit = "us",
                       .ours = scaled(samples[0], 1e-3),
                       .peer = Other{"vhost log", scaled(samples[1], 1e-3)},
                       .ratio = Ratio::ours_to_peer,
                       .goal = Goal::at_most(goal_us)});
}

struct Costs { // ns, in all
    Samples ours;
    Samples each_page;
    Samples tables;
    Samples log;
    Samples clearing;
};

// Which lines of PTEs these pages are in, in order.
std::vector<std::uint32_t> lines_of(const Pages &pages)
{
    std::vector<std::uint32_t> lines(pages);
    for (std::uint32_t &line : lines)
        line /= iommu::line_entries;
    std::sort(lines.begin(), lines.end());
    lines.erase(std::unique(lines.begin(), lines.end()), lines.end());
    return lines;
}

Costs measure(Session &session, Guest &guest, const Pages &pages)
{
    const auto dirty_then = [&](auto take) {
        return [&guest, &pages, take] {
            guest.dirty(pages);
            return (guest.*take)();
        };
    };
    guest.check(pages);
    const std::vector<std::uint32_t> lines = lines_of(pages);
    auto samples =
        in_turns(session.pick(1u, 3u, 9u), {dirty_then(&Guest::ours), dirty_then(&Guest::each_page_walk),
                                            dirty_then(&Guest::table_walk), [&] { return guest.vhost_log(pages); },
                                            [&] {
                                                guest.dirty(pages);
                                                return guest.clearing(lines);
                                            }});
    return {samples[0], samples[1], samples[2], samples[3], samples[4]};
}

// Beside the peer that is fastest here.
void add(Session &session, const std::string &name, const Costs &costs, std::size_t pages, double goal_ns)
{
    const double each = 1 / static_cast<double>(pages);
    Other fastest{"page by page", costs.each_page};
    for (const Other &peer : {Other{"generic_pt", costs.tables}, Other{"vhost log", costs.log}}) {
        if (median(peer.samples) < median(fastest.samples))
            fastest = peer;
    }
    fastest.samples = scaled(fastest.samples, each);
    session.add(Figure{.name = name,
                       .unit = "ns/page",
                       .ours = scaled(costs.ours, each),
                       .peer = fastest,
                       .limit = Other{"clearing", scaled(costs.clearing, each)},
                       .ratio = Ratio::ours_to_peer,
                       .goal = Goal::at_most(goal_ns)});
}

// The PTEs are in the other core's cache, as a device leaves them.
void measure_from_other_core(Session &session, Guest &guest, const std::string &name, const Pages &pages)
{
    if (cores() < 2)
        return session.skip(name, "needs two cores");
    const auto samples = in_turns(session.pick(1u, 3u, 9u), {[&] {
                                      std::thread([&] {
                                          pin_to_core(1);
                                          guest.dirty(pages);
                                      }).join();
                                      return guest.ours();
                                  }});
    session.add(
        Figure{.name = name, .unit = "ns/page", .ours = scaled(samples[0], 1 / static_cast<double>(pages.size()))});
}

// A line for each of those compared.
class Lines
{
  public:
    Lines(std::string name, std::string title, std::string x)
        : plot_{.name = std::move(name), .title = std::move(title), .x = std::move(x), .y = "ms"}
    {
        for (const char *who : {"dirtyring", "iommufd, page by page", "generic_pt, table by table", "vhost log"})
            plot_.lines.push_back({who, {}});
    }
    void add(double x, const Costs &costs)
    {
        std::size_t line = 0;
        for (const Samples *samples : {&costs.ours, &costs.each_page, &costs.tables, &costs.log})
            plot_.lines[line++].points.emplace_back(x, median(*samples) / 1e6);
    }
    [[nodiscard]] const Plot &plot() const { return plot_; }

  private:
    Plot plot_;
};

void measure_densities(Session &session, Guest &guest)
{
    struct Density {
        const char *name;
        std::uint64_t one_in;
        std::uint64_t run;
        double goal_ns;
    };
    constexpr Density densities[] = {
        {"0.01 % dirty, random", 10000, 1, 15},
        {"0.01 % dirty, in runs of 256", 10000, 256, 3},
        {"1 % dirty, random", 100, 1, 12},
        {"10 % dirty, random", 10, 1, 5},
        {"all dirty", 1, 1, 0.8},
    };
    Lines lines("density", fmt::format("Cost of a sweep of {} GiB", guest.pages() >> 18), "dirty pages, %");
    for (const Density &d : densities) {
        const std::uint64_t count = std::max<std::uint64_t>(guest.pages() / d.one_in, 1);
        const Pages pages = d.one_in == 1 ? all(guest.pages()) : choose(guest.pages(), count, d.run);
        const Costs costs = measure(session, guest, pages);
        add(session, d.name, costs, pages.size(), d.goal_ns);
        if (d.run == 1)
            lines.add(100. / static_cast<double>(d.one_in), costs);
        if (d.run == 1 && d.one_in > 1)
            measure_from_other_core(session, guest, fmt::format("{}, by the other core", d.name), pages);
    }
    session.add(lines.plot());
}

void measure_scan(Session &session)
{
    constexpr std::uint64_t few = 10'000; // dirty pages, whatever the size
    const unsigned small_lg2 = session.pick(14u, 22u, 22u);
    const unsigned large_lg2 = session.pick(16u, 26u, 26u);
    Lines sizes("size", fmt::format("Cost of a sweep with {} dirty pages", few), "guest, GiB");
    for (unsigned lg2 = small_lg2; lg2 <= large_lg2; lg2 += 2) {
        Guest guest(lg2);
        sizes.add(static_cast<double>(guest.pages()) / (1 << 18),
                  measure(session, guest, choose(guest.pages(), few, 1)));
        if (lg2 == small_lg2)
            measure_clean_full_scan(session, guest, lg2, 0.8);
        if (lg2 == large_lg2) {
            measure_clean_full_scan(session, guest, lg2, 0.95);
            measure_clean_sweep(session, guest, 5);
            measure_densities(session, guest);
        }
    }
    if (!session.smoke()) {
        Guest tib(28);
        sizes.add(1024, measure(session, tib, choose(tib.pages(), few, 1)));
        measure_clean_sweep(session, tib, 20);
    }
    session.add(sizes.plot());
}

} // namespace

int main(int argc, char **argv)
{
    return run(argc, argv, measure_scan);
}
