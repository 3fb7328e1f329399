// From D to the run at a polling consumer: the device and the consumer are one thread, the service's walker is on the
// other core. Then the same of 64 guests on one walker.
#include "perf/service.hpp"

#include <fmt/format.h>

#include <cstdlib>
#include <deque>
#include <fcntl.h>
#include <memory>
#include <random>
#include <string>
#include <sys/resource.h>
#include <vector>

namespace {

using namespace dirtyring;
using namespace dirtyring::perf;

// How often a process has lost a core that it wanted to keep.
class Interruptions
{
  public:
    explicit Interruptions(pid_t pid)
    {
        for (const auto &task : std::filesystem::directory_iterator(fmt::format("/proc/{}/task", pid)))
            files_.emplace_back(::open((task.path() / "status").c_str(), O_RDONLY | O_CLOEXEC));
    }

    // Of its threads, and of this thread.
    [[nodiscard]] long count() const
    {
        rusage mine{};
        ::getrusage(RUSAGE_THREAD, &mine);
        long all = mine.ru_nivcsw;
        for (const ring::Fd &file : files_) {
            char text[4096];
            const ssize_t got = ::pread(file.get(), text, sizeof text, 0);
            const std::string_view status(text, got > 0 ? static_cast<std::size_t>(got) : 0);
            constexpr std::string_view key = "nonvoluntary_ctxt_switches:";
            if (const std::size_t at = status.find(key); at != std::string_view::npos)
                all += std::strtol(status.data() + at + key.size(), nullptr, 10);
        }
        return all;
    }

  private:
    std::vector<ring::Fd> files_;
};

// The pages that a guest's device writes, all over its memory. The first writes bring them in, which is no matter of
// tracking.
class Spots
{
  public:
    Spots(ServedGuest &guest, std::uint64_t memory_bytes) : stride_(memory_bytes / DR_PAGE / count)
    {
        for (std::uint64_t i = 0; i < count; ++i)
            guest.write((i * stride_) << DR_PAGE_LG2);
        guest.sync([](auto...) {});
    }
    std::uint64_t next() { return random_() % count * stride_; }

  private:
    static constexpr std::uint64_t count = 4096;
    std::uint64_t stride_;
    std::mt19937_64 random_{1};
};

struct BusyGuest {
    BusyGuest(const Service &service, std::uint64_t memory_bytes)
        : guest(service.socket(), {.memory_bytes = memory_bytes}), spots(guest, memory_bytes)
    {
    }
    ServedGuest guest;
    Spots spots;
};

// ns from before the write to the run at the consumer.
double write_until_seen(BusyGuest &busy)
{
    ServedGuest &guest = busy.guest;
    const std::uint64_t page = busy.spots.next();
    const std::uint64_t began = now_ns();
    guest.write(page << DR_PAGE_LG2);
    bool seen = false;
    while (!seen) {
        guest.drain([&](std::uint64_t first, std::uint64_t n) { seen |= page - first < n; });
        if (now_ns() - began > 10'000'000'000)
            throw Failure("a page was not reported within 10 s");
    }
    return static_cast<double>(now_ns() - began);
}

// Over n: what one sample in n exceeds.
Plot::Line distribution(const char *name, const Samples &ns)
{
    Plot::Line line{name, {}};
    for (const double n : {1.01, 1.1, 2., 5., 10., 20., 50., 100., 1e3, 1e4, 1e5}) {
        if (n <= static_cast<double>(ns.size()))
            line.points.emplace_back(n, quantile(ns, 1 - 1 / n) / 1000);
    }
    return line;
}

void add_quantiles(Session &session, const std::string &name, const Samples &ns, Goal p50, Goal p99)
{
    session.add(Figure{.name = name + ", p50", .unit = "us", .ours = {quantile(ns, 0.5) / 1000}, .goal = p50});
    session.add(Figure{.name = name + ", p99", .unit = "us", .ours = {quantile(ns, 0.99) / 1000}, .goal = p99});
}

struct Latencies {
    Samples all; // ns
    Samples undisturbed;
};

// One write after the other. Looking for interruptions takes long enough for the walker to fall asleep: it is done
// between batches, and the first write of a batch wakes it.
Latencies write_and_wait(BusyGuest &guest, const Interruptions &interruptions, unsigned batches)
{
    constexpr unsigned batch = 64;
    Latencies latencies;
    for (unsigned i = 0; i < batches; ++i) {
        const long before = interruptions.count();
        write_until_seen(guest);
        for (unsigned n = 0; n < batch; ++n)
            latencies.all.push_back(write_until_seen(guest));
        if (interruptions.count() == before)
            latencies.undisturbed.insert(latencies.undisturbed.end(), latencies.all.end() - batch, latencies.all.end());
    }
    return latencies;
}

std::uint64_t memory_bytes(const Session &session)
{
    return session.smoke() ? 1ull << 30 : 16ull << 30;
}

void measure_latency(Session &session)
{
    const Service service;
    BusyGuest guest(service, memory_bytes(session));
    const auto [all, undisturbed] =
        write_and_wait(guest, Interruptions(service.pid()), session.pick(2u, 2'000u, 10'000u));
    add_quantiles(session, "D to run at the consumer, all samples", all, Goal::at_most(2), Goal::at_most(20));
    add_quantiles(session, "D to run, without involuntary switches", undisturbed, Goal::at_most(2), Goal::at_most(20));
    session.add(Plot{.name = "latency",
                     .title = "From D to the run at the consumer",
                     .x = "one sample in so many takes longer",
                     .y = "us",
                     .lines = {distribution("all samples", all), distribution("undisturbed", undisturbed)}});
}

// `busy` of the guests write a page each, `rate` times a second; ns until each was seen.
Samples write_at_rate(std::vector<std::unique_ptr<BusyGuest>> &guests, std::size_t busy, double rate, double seconds)
{
    struct Write {
        std::uint64_t page;
        std::uint64_t due;
    };
    std::vector<std::deque<Write>> waiting(busy);
    Samples samples;
    const std::uint64_t began = now_ns();
    const double between_ns = 1e9 / (rate * static_cast<double>(busy));
    const auto writes = static_cast<std::uint64_t>(seconds * rate * static_cast<double>(busy));
    std::uint64_t written = 0;
    while (samples.size() < writes) {
        const std::uint64_t now = now_ns();
        const std::uint64_t due = began + static_cast<std::uint64_t>(static_cast<double>(written) * between_ns);
        if (written < writes && now >= due) {
            const std::size_t at = written++ % busy;
            const std::uint64_t page = guests[at]->spots.next();
            waiting[at].push_back({page, due}); // a write that comes late has waited, too
            guests[at]->guest.write(page << DR_PAGE_LG2);
        }
        for (std::size_t i = 0; i < busy; ++i) {
            if (waiting[i].empty())
                continue;
            guests[i]->guest.drain([&](std::uint64_t first, std::uint64_t n) {
                std::erase_if(waiting[i], [&](const Write &w) {
                    if (w.page - first >= n)
                        return false;
                    samples.push_back(static_cast<double>(now_ns() - w.due));
                    return true;
                });
            });
        }
        if (now - began > static_cast<std::uint64_t>((seconds + 10) * 1e9))
            throw Failure("pages were not reported within 10 s");
    }
    return samples;
}

void measure_many_guests(Session &session)
{
    constexpr double rate = 1000; // pages/s of a guest
    const std::size_t many = session.pick(3u, 64u, 64u);
    const double seconds = session.pick(0.01, 1., 5.);
    const Service service;
    std::vector<std::unique_ptr<BusyGuest>> guests;
    const auto add_guest = [&] { guests.push_back(std::make_unique<BusyGuest>(service, memory_bytes(session))); };
    add_guest();
    const unsigned turns = session.pick(1u, 3u, 5u);
    const auto one = [&] {
        const unsigned batches = session.pick(1u, 100u, 500u);
        return median(write_and_wait(*guests[0], Interruptions(service.pid()), batches).all) / 1000;
    };
    const auto p99 = [&](std::size_t busy) {
        return quantile(write_at_rate(guests, busy, rate, seconds), 0.99) / 1000;
    };
    const auto alone = in_turns(turns, {one});
    while (guests.size() < many)
        add_guest();
    const auto among = in_turns(turns, {one, [&] { return p99(1); }, [&] { return p99(many); }});
    session.add(Figure{.name = fmt::format("D to run, p50, 1 busy guest among {}", many),
                       .unit = "us",
                       .ours = among[0],
                       .peer = Other{"1 guest alone", alone[0]},
                       .ratio = Ratio::ours_to_peer,
                       .goal = Goal::ratio_at_most(1.1)});
    session.add(Figure{.name = fmt::format("D to run, p99, {} busy guests at {} times the rate", many, many),
                       .unit = "us",
                       .ours = among[2],
                       .peer = Other{"1 busy", among[1]},
                       .ratio = Ratio::ours_to_peer,
                       .goal = Goal::ratio_at_most(static_cast<double>(many))});
}

void measure(Session &session)
{
    if (cores() < 2)
        return session.skip("D to run at the consumer", "needs two cores");
    measure_latency(session);
    measure_many_guests(session);
}

} // namespace

int main(int argc, char **argv)
{
    return run(argc, argv, measure);
}
