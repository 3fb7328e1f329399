// Load on a service up to what it can take and beyond, for as long as one likes: writes to random pages, more and more
// than the consumer reads, and recorded traces as fast as they go. Pages a second, the backlog over time, memory, and
// pages lost: exit code 1 if any. One thread is the device and the consumer; the walker has the other core.
//
// A page is lost if what the consumer copied when the page was last reported is not what the device wrote last.
#include "perf/figures.hpp"
#include "perf/replay.hpp"
#include "perf/service.hpp"

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <random>
#include <string>
#include <vector>

namespace {

using namespace dirtyring;
using namespace dirtyring::perf;

constexpr std::uint64_t pages = 1 << 18; // 1 GiB
constexpr std::uint64_t report_every_ns = 1'000'000'000;
constexpr std::uint64_t entries_at_once = 256; // that the consumer reads
// Writes for each entry that is read, one after the other.
constexpr double overloads[] = {0.5, 1, 2, 8};

std::uint64_t kib_resident(pid_t pid)
{
    std::ifstream file(fmt::format("/proc/{}/status", pid));
    for (std::string line; std::getline(file, line);) {
        if (line.starts_with("VmRSS:"))
            return std::stoull(line.substr(6));
    }
    return 0;
}

class SyntheticLoad
{
  public:
    explicit SyntheticLoad(const Service &service)
        : guest_(service.socket(), {.memory_bytes = pages << DR_PAGE_LG2}), written_(pages), copied_(pages)
    {
        for (std::uint64_t page = 0; page < pages; ++page) // the kernel brings each in the first time
            write(page);
        if (lost() > 0)
            throw Failure("pages are lost at the first write");
    }

    // `factor` writes for each entry that the consumer reads.
    void run(double factor, std::uint64_t until_ns)
    {
        double owed = 0;
        while (now_ns() < until_ns) {
            for (owed += factor * entries_at_once; owed >= 1; --owed)
                write(random_() % pages);
            read(entries_at_once);
        }
    }

    // After everything is reported: pages whose last write the consumer has not.
    std::uint64_t lost()
    {
        guest_.sync([this](std::uint64_t first, std::uint64_t n) { copy(first, n); });
        std::uint64_t lost = 0;
        for (std::uint64_t page = 0; page < pages; ++page)
            lost += written_[page] != copied_[page];
        return lost;
    }

    // Pages whose last write the consumer does not have yet.
    [[nodiscard]] std::uint64_t backlog() const { return backlog_; }
    [[nodiscard]] std::uint64_t writes() const { return writes_; }
    [[nodiscard]] std::uint64_t reported() const { return reported_; }

  private:
    void write(std::uint64_t page)
    {
        backlog_ += written_[page] == copied_[page];
        written_[page] = ++writes_;
        guest_.write(page << DR_PAGE_LG2, &written_[page], sizeof written_[page]);
    }

    void read(std::uint64_t most)
    {
        guest_.drain_some(most, [this](std::uint64_t first, std::uint64_t n) { copy(first, n); });
    }

    void copy(std::uint64_t first, std::uint64_t n)
    {
        reported_ += n;
        for (std::uint64_t page = first; page < first + n; ++page) {
            const std::uint64_t now = guest_.word(page << DR_PAGE_LG2);
            backlog_ -= written_[page] != copied_[page] && now == written_[page];
            copied_[page] = now;
        }
    }

    ServedGuest guest_;
    std::mt19937_64 random_{1};
    std::vector<std::uint64_t> written_; // of each page: the number of its last write
    std::vector<std::uint64_t> copied_;
    std::uint64_t writes_ = 0;
    std::uint64_t reported_ = 0;
    std::uint64_t backlog_ = 0;
};

// Pages lost.
std::uint64_t synthetic(Session &session, const Service &service, double seconds)
{
    SyntheticLoad load(service);
    Plot plot{.name = "backlog",
              .title = "Pages written and not yet reported, of 262,144",
              .x = "s",
              .y = "pages",
              .logarithmic_x = false,
              .logarithmic_y = false};
    std::uint64_t lost = 0;
    std::uint64_t most = 0;
    std::vector<std::uint64_t> resident; // KiB, at the end of each phase
    const std::uint64_t began = now_ns();
    for (const double factor : overloads) {
        plot.lines.push_back({fmt::format("{} writes an entry read", factor), {}});
        const std::uint64_t phase_began = now_ns();
        const std::uint64_t end = phase_began + static_cast<std::uint64_t>(seconds / std::size(overloads) * 1e9);
        const std::uint64_t slice = std::min<std::uint64_t>(report_every_ns, (end - phase_began) / 4 + 1);
        const std::uint64_t reported = load.reported();
        const std::uint64_t writes = load.writes();
        while (now_ns() < end) {
            load.run(factor, std::min(now_ns() + slice, end));
            most = std::max(most, load.backlog());
            plot.lines.back().points.emplace_back(static_cast<double>(now_ns() - began) / 1e9, load.backlog());
        }
        const double took = static_cast<double>(now_ns() - phase_began) / 1e9;
        resident.push_back(kib_resident(service.pid()));
        fmt::print("{} writes an entry read: {:.0f} writes/s, backlog {} pages, service {} KiB\n", factor,
                   static_cast<double>(load.writes() - writes) / took, load.backlog(), resident.back());
        session.add(Figure{.name = fmt::format("sustained, {} writes an entry read", factor),
                           .unit = "pages/s",
                           .ours = {static_cast<double>(load.reported() - reported) / took}});
        lost += load.lost();
    }
    session.add(Figure{.name = "most pages in the backlog", .unit = "pages", .ours = {static_cast<double>(most)}});
    session.add(Figure{.name = "memory of the service, from the lightest load to the heaviest",
                       .unit = "KiB",
                       .ours = {static_cast<double>(resident.back()) - static_cast<double>(resident.front())}});
    session.add(plot);
    return lost;
}

std::uint64_t traces(Session &session, const Service &service, double seconds)
{
    std::uint64_t lost = 0;
    for (const char *name : {"guest-md5sum", "guest-md5sum-viommu"}) {
        Replay replay(service, fmt::format("{}/{}.trace.gz", TRACES, name));
        std::uint64_t loops = 0;
        const std::uint64_t began = now_ns();
        const std::uint64_t end = began + static_cast<std::uint64_t>(seconds / 2 * 1e9);
        do {
            replay.run();
            lost += replay.lost();
            ++loops;
        } while (now_ns() < end);
        const double took = static_cast<double>(now_ns() - began) / 1e9;
        fmt::print("{}: {} times, service {} KiB\n", name, loops, kib_resident(service.pid()));
        session.add(Figure{.name = fmt::format("sustained, {}", name),
                           .unit = "pages/s",
                           .ours = {static_cast<double>(replay.pages_written()) / took}});
    }
    return lost;
}

int soak(double seconds, const std::string &file)
{
    if (cores() < 2) {
        fmt::print(stderr, "soak: needs two cores\n");
        return 1;
    }
    pin_to_core(0);
    Session session(Effort::full);
    const Service service;
    std::uint64_t lost = synthetic(session, service, seconds / 2);
    lost += traces(session, service, seconds / 2);
    session.add(
        Figure{.name = "pages lost", .unit = "pages", .ours = {static_cast<double>(lost)}, .goal = Goal::at_most(0)});
    session.write(file);
    return lost == 0 ? 0 : 1;
}

} // namespace

int main(int argc, char **argv)
{
    double seconds = 60;
    std::string file;
    CLI::App app("Loads a dirtyringd to saturation and beyond, and counts what it loses: exit code 1 if anything.");
    app.name("soak");
    app.add_option("--seconds", seconds, "how long")->check(CLI::PositiveNumber)->capture_default_str();
    app.add_option("--json", file, "write the figures to this file");
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError &e) {
        return app.exit(e) == 0 ? 0 : 2;
    }
    try {
        return soak(seconds, file);
    } catch (const std::exception &e) {
        fmt::print(stderr, "soak: {}\n", e.what());
        return 1;
    }
}
