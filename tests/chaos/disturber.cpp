#include "tests/chaos/disturber.hpp"

#include <algorithm>
#include <csignal>
#include <numeric>
#include <sys/eventfd.h>

namespace dirtyring::chaos {
namespace {

constexpr std::uint64_t settled_ns = 30 * ms; // what dies sooner after its beginning the supervisor takes for hopeless
constexpr unsigned deaths_in_a_row = 5;       // half of what makes the supervisor give up
constexpr std::uint64_t until_point_ns = 300 * ms;

bool of_device(Point point)
{
    return point == Point::device_before_tag || point == Point::device_between_dirty_and_summary ||
           point == Point::device_before_pin;
}

// Comes once in the life of a worker.
bool of_restart(Point point)
{
    return name_of(point).starts_with("restart_");
}

std::vector<Point> all_of_service()
{
    std::vector<Point> all;
#define X(name) all.push_back(Point::name);
    DIRTYRING_POINTS(X)
#undef X
    std::erase_if(all, of_device);
    return all;
}

} // namespace

Disturber::Disturber(Run &run, Statistics &statistics)
    : run_(run), statistics_(statistics), random_(run.shared().options.seed)
{
    const std::vector<Point> &asked = run.shared().options.points;
    for (const Point point : asked.empty() ? all_of_service() : asked)
        points_.push_back({point, 0});
}

std::vector<Disturber::Action> Disturber::actions(Only only)
{
    std::vector<Action> all;
    const auto add = [&](Only part, std::vector<Action> some) {
        if (only == Only::everything || only == part)
            all.insert(all.end(), some.begin(), some.end());
    };
    add(Only::service, {{25, &Disturber::kill_service}, {40, &Disturber::kill_service_at_point}});
    add(Only::devices, {{8, &Disturber::kill_device}, {8, &Disturber::kill_device_at_point}});
    add(Only::vmm, {{8, &Disturber::kill_vmm}, {4, &Disturber::replace_vmm}, {4, &Disturber::kill_visitor}});
    add(Only::stops, {{4, &Disturber::stop_service},
                      {4, &Disturber::stop_device},
                      {3, &Disturber::stop_vmm},
                      {3, &Disturber::stall}});
    return all;
}

void Disturber::disturb()
{
    const Options &options = run_.shared().options;
    const std::vector<Action> all = actions(options.only);
    const std::uint64_t weights = std::accumulate(all.begin(), all.end(), std::uint64_t{0},
                                                  [](std::uint64_t sum, const Action &a) { return sum + a.weight; });
    const std::uint64_t end = now_ns() + static_cast<std::uint64_t>(options.seconds * 1e9);
    const auto over = [&] { return options.kills != 0 ? statistics_.service_kills >= options.kills : now_ns() >= end; };
    while (!over()) {
        std::uint64_t drawn = draw(weights);
        auto action = all.begin();
        for (; drawn >= action->weight; ++action)
            drawn -= action->weight;
        (this->*action->act)();
        run_.pause(draw(20) * ms);
    }
    expect_deaths_everywhere();
}

void Disturber::expect_deaths_everywhere() const
{
    constexpr std::uint64_t enough = 12;
    for (const auto &[point, times] : points_) {
        if (times >= enough && !statistics_.points.contains(point))
            throw migrate::Failure(
                fmt::format("a death at {} was planned {} times and never came", name_of(point), times));
    }
}

// ---- the service

void Disturber::kill_worker()
{
    if (!run_.service().signal_worker(SIGKILL))
        return;
    ++statistics_.service_kills;
    ++deaths_;
}

void Disturber::recover(std::uint64_t died_at)
{
    // Drawn in any case, else what the seed asks for next would depend on how long this takes.
    const bool next_death_comes_first = draw(3) == 0;
    const std::uint64_t short_ns = draw(80) * ms;
    if (next_death_comes_first && deaths_ < deaths_in_a_row)
        return run_.pause(short_ns);
    const auto any = [&] {
        return std::ranges::any_of(run_.shared().guests, [&](const Guest &g) { return run_.goes_on(g, died_at); });
    };
    run_.expect(any, [] { return "no guest goes on"; });
    statistics_.restarts_ns.push_back(now_ns() - died_at);
    run_.expect_progress(died_at);
    statistics_.recoveries_ns.push_back(now_ns() - died_at);
    statistics_.supervisor_kb.push_back(holdings(run_.service().supervisor()).resident);
    statistics_.worker_kb.push_back(holdings(run_.service().worker()).resident);
    if (deaths_ < deaths_in_a_row)
        return; // going on is not enough: the next one can still come too soon for the supervisor
    run_.pause(settled_ns);
    deaths_ = 0;
}

void Disturber::kill_service()
{
    const std::uint64_t now = now_ns();
    run_.shared().note("kill of worker {}", run_.service().worker());
    kill_worker();
    recover(now);
}

Point Disturber::next_point()
{
    std::ranges::shuffle(points_, random_);
    Tried &least = *std::ranges::min_element(points_, {}, &Tried::times);
    ++least.times;
    return least.point;
}

void Disturber::kill_service_at_point()
{
    const Point point = next_point();
    const Service &service = run_.service();
    const std::uint64_t died = service.died();
    const bool of_device_death = point == Point::death_marked;
    service.plan(point, 1 + (of_restart(point) || of_device_death ? 0 : draw(4)));
    run_.shared().note("death at {} is planned", name_of(point));
    std::uint64_t died_at = now_ns();
    // It is passed when a device dies that has a pin for writing.
    for (int i = 0; of_device_death && i < 6; ++i)
        kill_device();
    if (!of_device_death && (of_restart(point) || draw(4) == 0))
        kill_worker();
    const auto dies = [&] {
        died_at = now_ns();
        return service.died() != died;
    };
    const bool reached = run_.wait_for(dies, until_point_ns);
    service.forget_plan();
    run_.shared().note("death at {}: {}", name_of(point), reached ? "has come" : "has not come");
    if (reached) {
        ++statistics_.points[point];
        ++statistics_.service_kills;
        ++deaths_;
    }
    recover(died_at);
}

void Disturber::stop_service()
{
    const std::uint64_t now = now_ns();
    run_.shared().note("worker {} is stopped", run_.service().worker());
    statistics_.stops += run_.service().signal_worker(SIGSTOP) ? 1 : 0;
    run_.pause(draw(200) * ms);
    if (draw(4) == 0)
        kill_worker();
    else
        static_cast<void>(run_.service().signal_worker(SIGCONT));
    recover(now);
}

// ---- devices

Child &Disturber::any_device()
{
    const Guest &guest = any_guest();
    const auto index = static_cast<unsigned>(draw(guest.device.size()));
    run_.wait_for([&] { return now_ns() >= guest.state.spared_until.load(); }, 100 * ms);
    return run_.device(guest.index, index);
}

void Disturber::kill_device()
{
    Child &device = any_device();
    run_.shared().note("kill of {}", device.name());
    device.kill();
    ++statistics_.device_kills;
    run_.pause(draw(30) * ms);
    device.start();
}

void Disturber::kill_device_at_point()
{
    constexpr Point points[] = {Point::device_before_tag, Point::device_between_dirty_and_summary,
                                Point::device_before_pin};
    Guest &guest = any_guest();
    const Point point = points[draw(std::size(points))];
    const auto index = static_cast<unsigned>(draw(guest.device.size()));
    run_.wait_for([&] { return now_ns() >= guest.state.spared_until.load(); }, 100 * ms);
    run_.shared().note("{} is to die at {}", run_.device(guest.index, index).name(), name_of(point));
    guest.device[index].die_at = static_cast<std::uint64_t>(point) + 1;
    const auto dead = [&] { return guest.device[index].die_at.load() == 0; };
    if (run_.wait_for(dead, until_point_ns)) {
        ++statistics_.points[point];
        ++statistics_.device_kills;
    }
}

void Disturber::stop_device()
{
    Child &device = any_device();
    run_.shared().note("{} is stopped", device.name());
    device.stop();
    ++statistics_.stops;
    run_.pause(draw(100) * ms);
    if (draw(2) == 0) {
        device.kill();
        ++statistics_.device_kills;
        device.start();
    } else {
        device.go_on();
    }
}

// A device stops within a section: its own guest waits and knows for whom, the others go on; the service may die
// meanwhile.
void Disturber::stall()
{
    Guest &guest = any_guest();
    const auto index = static_cast<unsigned>(draw(guest.device.size()));
    Child &device = run_.device(guest.index, index);
    guest.state.hold = 1; // tracking is switched by calls that wait, for this device too
    run_.expect_progress(now_ns());
    run_.expect([&] { return guest.state.switching.load() == 0; },
                [&] { return fmt::format("guest {} waits for a change of tracking", guest.index); });
    run_.shared().note("{} is to stop within a section", device.name());
    guest.device[index].stop_inside = 1;
    run_.expect([&] { return device.stopped(); },
                [&] { return device.name() + " is to stop within a section, and does not"; });
    if (draw(3) == 0)
        kill_worker();
    const std::uint64_t since = now_ns();
    const auto named = [&] { return guest.state.stalled_pid.load() == static_cast<std::uint64_t>(device.pid()); };
    run_.expect(named, [&] {
        return fmt::format("guest {} waits for {}, pid {}, and is not told so", guest.index, device.name(),
                           device.pid());
    });
    ++statistics_.stalls;
    run_.expect_progress(since, &guest);
    if (run_.goes_on(guest, since))
        throw Lost(fmt::format("lost: guest {} had a sync though {} is within a section", guest.index, device.name()));
    if (draw(2) == 0) {
        device.kill();
        ++statistics_.device_kills;
        device.start();
    } else {
        device.go_on();
    }
    guest.state.hold = 0;
    run_.shared().note("{} goes on, or its successor", device.name());
    recover(now_ns());
}

// ---- VMMs

void Disturber::kill_vmm()
{
    Child &vmm = run_.vmm(any_guest().index);
    run_.shared().note("kill of {}", vmm.name());
    vmm.kill();
    ++statistics_.vmm_kills;
    run_.pause(draw(30) * ms);
    vmm.start();
}

void Disturber::stop_vmm()
{
    Child &vmm = run_.vmm(any_guest().index);
    run_.shared().note("{} is stopped", vmm.name());
    vmm.stop();
    ++statistics_.stops;
    run_.pause(draw(100) * ms);
    vmm.go_on();
}

void Disturber::replace_vmm()
{
    Guest &guest = any_guest();
    run_.shared().note("vmm {} is replaced", guest.index);
    const std::uint64_t lives = guest.state.lives.load();
    guest.state.leave = 1;
    ::eventfd_write(guest.bell.get(), 1);
    run_.expect([&] { return guest.state.lives.load() > lives; },
                [&] { return fmt::format("vmm {} does not leave, or its successor does not begin", guest.index); });
    ++statistics_.vmm_leaves;
}

void Disturber::kill_visitor()
{
    run_.shared().note("kill of the visitor");
    run_.visitor().kill();
    ++statistics_.visitor_kills;
    run_.visitor().start();
}

} // namespace dirtyring::chaos
