#include "tests/search/run.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

namespace dirtyring::search {

namespace {

// In enum Point those of devices come first.
constexpr Point first_of_service = Point::walker_before_advance;
constexpr unsigned depth_max = 2;
constexpr unsigned patience = 5000; // rounds of everybody
constexpr unsigned asleep_patience = 500;
constexpr std::uint64_t rare_span = 16; // points until something happens within what is rare
// Maps are long: others step in between every so many leaves.
constexpr std::uint64_t leaves_between = 61;

// Points that few schedules come by.
bool is_rare(Point p)
{
    constexpr Point rare[] = {Point::unmap_replica_taken, Point::unmap_marked,  Point::split_replica,
                              Point::split_replicas,      Point::split_limited, Point::split_broken,
                              Point::collapse_swapped,    Point::collapse_read, Point::collapse_finished,
                              Point::enable_cleaned,      Point::ring_ended,    Point::death_marked};
    return std::find(std::begin(rare), std::end(rare), p) != std::end(rare);
}

} // namespace

Run::Run(Choices &choices, Coverage &coverage, bool telling)
    : world_(choices, coverage, telling), oracle_(world_), vmm_(world_, oracle_), service_(world_),
      devices_(world_, oracle_, vmm_, service_), hwpts_(world_, vmm_, service_, devices_)
{
    world_.states = [this](auto iova) { return states(iova); };
    service_.ended = [this] {
        devices_.service_died();
        hwpts_.service_died();
    };
    at_point = [this](Point p) { interfere(p); };
    service_.start();
}

std::optional<Finding> Run::run()
{
    start_ahead();
    calm_ = false;
    world_.short_of_memory = world_.attributes.short_of_memory;
    while (!world_.finding && world_.choices.begin_step()) {
        draw_gap();
        move();
        end_step();
    }
    calm_ = true;
    world_.short_of_memory = false;
    if (!world_.finding)
        come_to_rest();
    end_step();
    return world_.finding;
}

void Run::start_ahead()
{
    if (world_.attributes.head_start == 0)
        return;
    for (const Plan::Area &area : world_.plan.areas()) {
        static_cast<void>(vmm_.submit_map_of(area));
        settle_all(&Run::all_quiet);
    }
    for (unsigned n = 0; n < world_.attributes.devices; ++n) {
        devices_.attach();
        settle_all(&Run::all_quiet);
    }
    if (world_.attributes.head_start == 2 && vmm_.submit_enable())
        settle_all(&Run::all_quiet);
    world_.told.clear();
}

void Run::end_step()
{
    told_.push_back(std::exchange(world_.told, {}));
}

// Points until something happens; 0: nothing does within this step.
void Run::draw_gap()
{
    constexpr std::uint64_t spans[] = {0, 0, 0, 0, 1, 4, 16, 128};
    const std::uint64_t span = breaking() ? rare_span : spans[world_.choices.next(std::size(spans))];
    gap_ = span == 0 ? 0 : world_.choices.next(span) + 1;
}

void Run::interfere(Point p)
{
    const bool of_service = p >= first_of_service;
    if (of_service && service_.dying())
        throw ServiceDeath{};
    if (p == Point::unmap_unlinked && world_.hwpt)
        world_.hwpt->unlinked.assign(world_.hwpt->unlinked.size(), true);
    if (p == Point::sweep_published && world_.hwpt)
        world_.hwpt->unlinked.assign(world_.hwpt->unlinked.size(), false);
    if (calm_ || world_.finding || (p == Point::map_leaf_stored && ++leaves_ % leaves_between != 0))
        return;
    if (p == Point::device_between_dirty_and_summary && depth_ < depth_max && devices_.may_die() &&
        world_.choices.one_in(vmm_.enabling() ? 4 : 24)) // rare otherwise, as leaves are clean only for a while
        throw DeviceDeath{};
    if (depth_ >= depth_max)
        return;
    if ((p == Point::device_between_dirty_and_summary || p == Point::device_before_pin) && devices_.may_die() &&
        world_.choices.one_in(12))
        return step_in([&] {
            if (breaking())
                draw_gap();
            pass_by(p);
        });
    const bool rare = is_rare(p);
    if (rare && world_.attributes.mortal && world_.choices.one_in(16))
        die(p);
    const bool due = gap_ > 0 && --gap_ == 0;
    if (!due && !(rare && world_.choices.one_in(8)))
        return;
    if (of_service && world_.attributes.mortal && world_.choices.next(4) == 3)
        die(p);
    step_in([&] {
        if (rare || breaking()) // others too may be interrupted while it is so
            gap_ = world_.choices.next(rare_span) + 1;
        for (std::uint64_t n = world_.choices.next(5) + 1; n > 0 && !world_.finding; --n)
            move();
    });
    draw_gap();
    if (of_service && service_.dying())
        throw ServiceDeath{};
}

void Run::die(Point p)
{
    world_.say([&] { return fmt::format("the service dies at point {}", static_cast<unsigned>(p)); });
    world_.coverage.died(p, world_.states(std::nullopt));
    throw ServiceDeath{};
}

// Within a step of somebody else.
template <class Steps> void Run::step_in(Steps steps)
{
    ++depth_;
    Devices::Running *running = devices_.running();
    devices_.set_running(nullptr);
    steps();
    devices_.set_running(running);
    --depth_;
}

void Run::move()
{
    Choices &choices = world_.choices;
    if (devices_.owed() && choices.one_in(8))
        return see_off();
    const std::uint64_t kind = choices.next(64);
    if (kind < 22)
        return serve();
    if (kind < 42)
        return devices_.act();
    if (kind < 48) {
        vmm_.submit_any();
        if (choices.one_in(8))
            hurry();
        return;
    }
    const bool lazy = world_.attributes.reader == Reader::lazy;
    if (kind < 52) {
        if (lazy && !choices.one_in(4))
            return;
        return vmm_.reap(choices.next(2) == 0 ? UINT64_MAX : choices.next(3) + 1);
    }
    if (kind < 54) {
        if (world_.hwpt && (!lazy || choices.one_in(4)))
            vmm_.drain(*world_.hwpt, static_cast<unsigned>(choices.next(world_.attributes.shards)),
                       !lazy && choices.next(2) == 0 ? UINT64_MAX : choices.next(3) + 1);
        return;
    }
    if (kind < 60)
        return control();
    if (kind < 61) {
        constexpr std::uint64_t times[] = {5'000, 100'000, 250'000, 1'000'000};
        world_.now += times[choices.next(std::size(times))];
        return;
    }
    if (kind < 63 && world_.attributes.sleeps) {
        const auto who = static_cast<unsigned>(choices.next(2 * world_.attributes.shards + 2));
        if (who < world_.attributes.shards)
            return service_.sleep_shard(who);
        if (who == 2 * world_.attributes.shards)
            return service_.sleep_home();
        if (who > 2 * world_.attributes.shards)
            return vmm_.sleep();
        if (world_.hwpt)
            vmm_.sleep_at(*world_.hwpt->rings[who - world_.attributes.shards]);
        return;
    }
    if (kind == 63 && world_.attributes.mortal && choices.next(4) == 3)
        service_.kill();
}

void Run::serve()
{
    Choices &choices = world_.choices;
    if (!service_.alive()) {
        if (choices.next(4) != 3)
            service_.start();
        return;
    }
    const std::uint64_t kind = choices.next(8);
    if (kind < 5) {
        const auto shard = static_cast<unsigned>(choices.next(world_.attributes.shards));
        if (shard == world_.attributes.slow && !choices.one_in(8))
            return;
        // While ENABLE cleans, others shall come in between.
        const std::uint64_t most = vmm_.enabling() ? 1 : world_.attributes.gib && choices.next(2) != 0 ? 64 : 6;
        const std::uint64_t steps = choices.next(most) + 1;
        for (std::uint64_t n = 0; n < steps && service_.alive(); ++n)
            service_.step_shard(shard);
    } else if (kind < 7) {
        service_.step_home();
    } else {
        service_.drain(static_cast<unsigned>(choices.next(2)));
    }
}

void Run::see_off()
{
    devices_.take_reports();
    for (std::uint64_t n = world_.choices.next(4) + 1; n > 0; --n)
        devices_.see_off();
    devices_.detach();
}

// The service and the VMM go on; devices stand still.
void Run::hurry()
{
    for (unsigned round = 0; round < 8 && service_.alive() && world_.hwpt && !world_.finding; ++round) {
        service_.step_home();
        for (unsigned shard = 0; shard < world_.attributes.shards && service_.alive(); ++shard)
            service_.step_shard(shard);
        if (world_.attributes.reader != Reader::lazy)
            vmm_.drain_all();
        vmm_.reap();
    }
}

// A device stands between D and the summary, or before it takes a pin.
void Run::pass_by(Point p)
{
    if (p == Point::device_before_pin) {
        if (devices_.last_area() != nullptr)
            vmm_.submit_unmap(*devices_.last_area());
        return hurry();
    }
    if (world_.choices.one_in(2))
        devices_.others_go_on(true);
    if (vmm_.submit_sync())
        world_.say([] { return "in between"; });
    if (world_.choices.one_in(2)) {
        service_.step_home();
        for (unsigned shard = 0; shard < world_.attributes.shards && service_.alive(); ++shard)
            service_.step_shard(shard);
        devices_.others_go_on(false);
    }
    hurry();
}

void Run::control()
{
    switch (world_.choices.next(8)) {
    case 0:
    case 1:
        // A worker serves nobody before its guests' command rings go on.
        if (service_.alive() && service_.life().home_begun)
            devices_.attach();
        return;
    case 2:
    case 3:
    case 4:
        return see_off();
    case 5:
        return hwpts_.make_large();
    default:
        return world_.hwpt ? hwpts_.destroy() : hwpts_.make();
    }
}

bool Run::all_quiet()
{
    return vmm_.idle();
}

// Who comes or goes gets a step further. No more: a device that attaches or detaches wakes every shard.
void Run::finish_changes()
{
    devices_.take_reports();
    devices_.see_off();
    if (world_.hwpt && !world_.hwpt->destroying) {
        if (devices_.attaching() || devices_.none())
            devices_.attach();
    } else if (world_.hwpt) {
        hwpts_.destroy();
    } else {
        hwpts_.make();
    }
}

// Goes on as everybody would who is asleep unless something calls.
bool Run::settle_all(bool (Run::*over)())
{
    for (unsigned round = 0; round < patience && !world_.finding; ++round) {
        const std::uint64_t until = service_.settle();
        vmm_.drain_all();
        vmm_.reap();
        finish_changes();
        const bool rest = world_.hwpt && !world_.hwpt->destroying && devices_.come_to_rest();
        if (rest && (this->*over)())
            return true;
        if (until != UINT64_MAX)
            world_.now = std::max(world_.now, until);
    }
    return false;
}

void Run::come_to_rest()
{
    if (!settle_all(&Run::all_quiet) && !world_.finding)
        return world_.wrong("hang", "at the end something never ends: " + vmm_.describe());
    if (world_.finding)
        return;
    while (devices_.owed() || devices_.attaching())
        settle_all(&Run::all_quiet);
    for (const auto &hwpt : world_.gone) {
        for (const auto &ring : hwpt->rings) {
            if (ring->asleep && !ring->ended && !ring->full_at_end)
                world_.wrong("end", fmt::format("a consumer of hwpt {} sleeps, and is not called", hwpt->id));
        }
    }
    const bool optional = world_.attributes.optional;
    if (!vmm_.enabled()) {
        if (!vmm_.submit_enable())
            return world_.wrong("hang", "the VMM cannot submit an ENABLE");
        if (!settle_all(&Run::all_quiet))
            return world_.wrong("hang", "an ENABLE at the end never ends: " + vmm_.describe());
        if (!vmm_.enabled() && optional)
            return; // there is a device that cannot be tracked
    }
    const std::uint64_t before = oracle_.newest_stamp();
    devices_.write_everywhere();
    if (world_.finding)
        return;
    expect_reported(oracle_.completed(before));
    if (world_.finding)
        return;
    if (!vmm_.submit_sync())
        return world_.wrong("hang", "the VMM cannot submit a SYNC");
    if (!settle_all(&Run::all_quiet))
        return world_.wrong("hang", "a SYNC at the end never ends: " + vmm_.describe());
    if (world_.hwpt->retained.retained() != 0)
        world_.wrong("epoch", "a map waits for the marker of its UNMAP, which never comes");
}

// Without a SYNC: the bells are enough.
void Run::expect_reported(const Oracle::Snapshot &written)
{
    const auto nothing = [](std::uint64_t) { return false; };
    for (unsigned round = 0; oracle_.missing(written, nothing); ++round) {
        if (round == asleep_patience) {
            const Oracle::Complete late = *oracle_.missing(written, nothing);
            return world_.wrong("asleep",
                                fmt::format("write {} of device {} to OA page {:#x} is not reported before a SYNC",
                                            late.stamp, late.device, late.page));
        }
        settle_all(&Run::all_quiet);
        if (world_.finding)
            return;
    }
}

// A leaf is being replaced, and devices wait for it.
bool Run::breaking() const
{
    for (unsigned i = 0; world_.hwpt && i < world_.attributes.shards; ++i) {
        if ((world_.hwpt->control(i)->breaking & 1) != 0)
            return true;
    }
    return false;
}

std::uint64_t Run::states(std::optional<std::uint64_t> iova) const
{
    std::uint64_t bits = vmm_.states(iova);
    const auto set = [&](State s) { bits |= Coverage::bit(s); };
    if (world_.hwpt) {
        for (unsigned i = 0; i < world_.attributes.shards; ++i) {
            if (world_.hwpt->unlinked[i])
                set(State::retired);
        }
        if (world_.hwpt->destroying)
            set(State::destroying);
        if (breaking())
            set(State::breaking);
    }
    if (service_.not_begun_again())
        set(State::not_begun_again);
    if (devices_.owed())
        set(State::bury_owed);
    if (devices_.attaching())
        set(State::attaching);
    set(world_.lives <= 1 ? State::first_life : State::later_life);
    return bits;
}

} // namespace dirtyring::search
