// Stop-copy of a TiB: from the request to the last marker read, the service's walker on the other core; beside a walk
// and a bitmap.
#include "perf/bench_hwpt.hpp"
#include "perf/bitmap_peers.hpp"
#include "perf/service.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <random>
#include <set>
#include <vector>

namespace {

using namespace dirtyring;
using namespace dirtyring::perf;

// Of a guest of 2^memory_lg2 bytes, from the request to the last entry read; and the same by a walk and a bitmap.
class StopCopy
{
  public:
    explicit StopCopy(unsigned memory_lg2, std::size_t dirty)
        : guest_(service_.socket(), {.memory_bytes = 1ull << memory_lg2, .aperture_lg2 = memory_lg2}),
          tables_(memory_lg2), iommufd_(tables_.geometry(), tables_.tables(), tables_.pages()), bitmap_(tables_.pages())
    {
        std::mt19937_64 random(1);
        std::set<std::uint64_t> chosen;
        while (chosen.size() < dirty)
            chosen.insert(random() % tables_.pages());
        dirty_.assign(chosen.begin(), chosen.end());
        std::shuffle(dirty_.begin(), dirty_.end(), random);
    }

    // each(page); ms
    template <class Each> double by_rings(Each each)
    {
        // The walker rests as long as the consumer holds an entry, so the pages are dirty when the sync begins.
        guest_.write(0);
        std::optional<dirtyring_batch> held;
        while (!held)
            held = guest_.rings().peek();
        for (const std::uint64_t page : dirty_)
            guest_.write(page << DR_PAGE_LG2);
        return 1e-6 * timed([&] {
                   guest_.rings().release(*held);
                   guest_.sync([&](std::uint64_t first, std::uint64_t n) {
                       for (std::uint64_t i = 0; i < n; ++i)
                           each(first + i);
                   });
               });
    }
    template <class Each> double by_bitmap(Each each)
    {
        for (const std::uint64_t page : dirty_)
            tables_.mark_dirty(page);
        return 1e-6 * timed([&] {
                   iommufd_.walk_tables(bitmap_);
                   bitmap_.take(each);
               });
    }

    void check()
    {
        const auto found = [&](auto take) {
            std::set<std::uint64_t> pages;
            take([&](std::uint64_t page) { pages.insert(page); });
            for (const std::uint64_t page : dirty_) {
                if (!pages.contains(page))
                    throw Failure("stop-copy has lost a page");
            }
        };
        found([&](auto each) { by_rings(each); });
        found([&](auto each) { by_bitmap(each); });
    }

  private:
    Service service_;
    ServedGuest guest_;
    BenchHwpt tables_;
    Iommufd iommufd_;
    Bitmap bitmap_;
    std::vector<std::uint64_t> dirty_;
};

void measure_stop_copy(Session &session)
{
    if (cores() < 2)
        return session.skip("stop-copy", "needs two cores");
    const unsigned memory_lg2 = session.pick(30u, 40u, 40u);
    constexpr std::size_t dirty = 10'000;
    StopCopy stop_copy(memory_lg2, dirty);
    stop_copy.check();
    std::uint64_t sum = 0;
    const auto read = [&](std::uint64_t page) { sum += page; };
    const auto samples = in_turns(
        session.turns(), {[&] { return stop_copy.by_rings(read); }, [&] { return stop_copy.by_bitmap(read); }});
    session.add(
        Figure{.name = fmt::format("stop-copy, {} GiB mapped, {} dirty pages", 1ull << (memory_lg2 - 30), dirty),
               .unit = "ms",
               .ours = samples[0],
               .peer = Other{"generic_pt", samples[1]},
               .ratio = Ratio::ours_to_peer,
               .goal = Goal::at_most(1)});
}

} // namespace

int main(int argc, char **argv)
{
    return run(argc, argv, measure_stop_copy);
}
