// What the VMM does; vmm_judge.cpp has what it makes of the answers.
#include "tests/search/vmm.hpp"

#include <fmt/format.h>

#include <algorithm>

namespace dirtyring::search {

namespace {

const char *opcode_name(std::uint32_t opcode)
{
    static const char *const names[] = {"?", "MAP", "UNMAP", "SYNC", "ENABLE", "DISABLE", "SPLIT", "COLLAPSE"};
    return opcode < std::size(names) ? names[opcode] : "?";
}

bool is_range(const dr_command &c)
{
    return c.opcode == DR_OP_MAP || c.opcode == DR_OP_UNMAP;
}

std::string text(const dr_command &c)
{
    std::string s = opcode_name(c.opcode);
    if (is_range(c) || c.opcode == DR_OP_SPLIT || c.opcode == DR_OP_COLLAPSE)
        s += fmt::format(" {:#x} +{:#x}", c.iova, c.length);
    if (c.opcode == DR_OP_MAP)
        s += fmt::format(" to {:#x}", c.oa);
    if (c.opcode == DR_OP_SYNC)
        s += fmt::format(" {}", c.cookie);
    if (c.leaf_lg2 != 0)
        s += fmt::format(" 2^{}", c.leaf_lg2);
    return c.flags == 0 ? s : s + fmt::format(" flags {:#x}", c.flags);
}

Event beginning(const dr_command &c)
{
    switch (c.opcode) {
    case DR_OP_MAP:
        return Event::map_begins;
    case DR_OP_UNMAP:
        return (c.flags & DR_UNMAP_DISCARD) != 0    ? Event::unmap_discard
               : (c.flags & DR_UNMAP_DEFERRED) != 0 ? Event::unmap_deferred
                                                    : Event::unmap_now;
    case DR_OP_SPLIT:
        return Event::split_begins;
    case DR_OP_COLLAPSE:
        return Event::collapse_begins;
    case DR_OP_ENABLE:
        return Event::enable_begins;
    case DR_OP_DISABLE:
        return Event::disable_begins;
    default:
        return Event::sync_begins;
    }
}

} // namespace

Vmm::Vmm(World &world, Oracle &oracle)
    : world_(world), oracle_(oracle), submissions_(world.submissions.producer, &world.submissions.consumer),
      completions_(&world.completions.consumer, world.completions.producer, world.attributes.commands)
{
}

bool Vmm::awake()
{
    if (asleep_ && !world_.vmm_called)
        return false;
    world_.vmm_called = false;
    if (std::exchange(asleep_, false)) {
        world_.met(Event::vmm_called);
        completions_.disarm();
        submissions_.want_kick(false);
    }
    return true;
}

bool Vmm::tracking_on() const
{
    return enabled_ && std::none_of(flights_.begin(), flights_.end(),
                                    [](const auto &f) { return f.second.c.opcode == DR_OP_DISABLE; });
}

bool Vmm::enabling() const
{
    return std::any_of(flights_.begin(), flights_.end(),
                       [](const auto &f) { return f.second.c.opcode == DR_OP_ENABLE; });
}

// Must one of them wait for the other?
bool Vmm::meet(const Flight &a, const Flight &b)
{
    if (a.c.object != b.c.object || is_range(a.c) != is_range(b.c) || a.expected != 0 || b.expected != 0)
        return false;
    const auto alone = [](const dr_command &c) { return c.opcode == DR_OP_ENABLE || c.opcode == DR_OP_DISABLE; };
    return is_range(a.c) ? a.c.iova < b.end && b.c.iova < a.end : alone(a.c) || alone(b.c);
}

bool Vmm::submit(dr_command c, int expected)
{
    if (submissions_.room() == 0)
        return false;
    Flight f;
    c.user_data = next_user_data_++;
    f.c = c;
    f.end = c.length == UINT64_MAX ? world_.plan.aperture() : c.iova + c.length;
    f.expected = expected;
    f.time = ++world_.time;
    f.era = era_;
    f.lives = world_.lives;
    f.tracked = tracking_on();
    if (c.opcode == DR_OP_SYNC && f.tracked)
        f.before = oracle_.completed();
    if (c.opcode == DR_OP_DISABLE)
        ++disables_;
    f.disables = disables_;
    if (c.opcode == DR_OP_ENABLE && world_.hwpt) {
        look_at_rings();
        for (const auto &ring : world_.hwpt->rings) {
            ring->quiet_from = UINT64_MAX;
        }
    }
    if (c.opcode == DR_OP_MAP && expected == 0 && world_.hwpt) {
        for (std::uint64_t at = c.iova; at < f.end;) {
            const auto next = maps_.first_in(at, f.end);
            const std::uint64_t upto = next ? std::max(next->start, at) : f.end;
            if (upto > at)
                f.gaps.emplace_back(at, upto);
            at = next ? next->end : upto;
        }
        world_.hwpt->retained.map(c.iova, c.length, c.oa);
    }
    world_.say([&] { return fmt::format("the VMM submits {}: {}", c.user_data, text(c)); });
    world_.met(beginning(c), is_range(c) ? std::optional(c.iova) : std::nullopt);
    flights_.emplace(c.user_data, std::move(f));
    submissions_.put(0, c);
    submissions_.stage(1);
    if (submissions_.publish())
        world_.kicked = true;
    return true;
}

void Vmm::choose_range(const Plan::Area &area, std::uint64_t &from, std::uint64_t &length)
{
    Choices &choices = world_.choices;
    from = 0;
    length = area.length;
    if (area.length > block_size) {
        switch (choices.next(8)) {
        case 5:
            return;
        case 6:
            from = area.length - 2 * MiB;
            length = 2 * MiB;
            return;
        case 7:
            from = 4 * MiB;
            length = 2 * MiB;
            return;
        default:
            length = area.length - 2 * MiB;
            return;
        }
    }
    switch (choices.next(8)) {
    case 4:
        length = area.length / 2;
        return;
    case 5:
        from = area.length / 2;
        length = area.length / 2;
        return;
    case 6:
        from = choices.next(16) * page_size;
        length = (choices.next(16) + 1) * page_size;
        return;
    case 7:
        from = choices.next(block_pages) * page_size;
        length = (choices.next(block_pages - from / page_size) + 1) * page_size;
        return;
    default:
        return;
    }
}

void Vmm::submit_any()
{
    if (!awake())
        return;
    Choices &choices = world_.choices;
    const Attributes &a = world_.attributes;
    const std::uint64_t kind = choices.next(64);
    if (kind < a.toggles && world_.hwpt) {
        const bool disable = enabled_ != choices.one_in(8);
        submit({0, static_cast<std::uint32_t>(disable ? DR_OP_DISABLE : DR_OP_ENABLE), 0, world_.hwpt->id, 0, 0, 0, 0,
                0, 0});
    } else if (kind >= 16 && kind < 16 + a.resizes) {
        submit_resize();
    } else if (kind >= 40 && kind < 50) {
        submit_sync();
    } else if (kind == 63) {
        submit_wrong();
    } else {
        submit_map();
    }
}

bool Vmm::submit_enable()
{
    return awake() && submit({0, DR_OP_ENABLE, 0, world_.hwpt->id, 0, 0, 0, 0, 0, 0});
}

bool Vmm::submit_sync()
{
    return awake() && world_.hwpt && submit({0, DR_OP_SYNC, 0, world_.hwpt->id, 0, 0, 0, 0, ++cookie_, 0});
}

bool Vmm::submit_map_of(const Plan::Area &area)
{
    const std::uint64_t length = area.length > block_size ? area.length - 2 * MiB : area.length;
    return awake() &&
           submit({0, DR_OP_MAP, DR_MAP_READ | DR_MAP_WRITE, World::ioas, 0, area.iova, length, area.oas[0], 0, 0});
}

// Maps where nothing is, unmaps where something is; mostly.
bool Vmm::submit_map()
{
    Choices &choices = world_.choices;
    const auto &areas = world_.plan.areas();
    // A GiB is the first, and the reason for its schedule.
    const Plan::Area &area =
        world_.attributes.gib && choices.next(3) != 0 ? areas[0] : areas[choices.next(areas.size())];
    std::uint64_t from = 0;
    std::uint64_t length = 0;
    choose_range(area, from, length);
    const bool there = maps_.first_in(area.iova + from, area.iova + from + length).has_value();
    if (there != choices.one_in(5))
        return submit_unmap(area);
    dr_command c{0, DR_OP_MAP, DR_MAP_READ | DR_MAP_WRITE, World::ioas, 0, area.iova + from, length, 0, 0, 0};
    c.oa = area.oas[choices.next(area.oas.size())] + from;
    const std::uint64_t rights = choices.next(8);
    if (rights == 6)
        c.flags = DR_MAP_WRITE;
    if (rights == 7)
        c.flags = DR_MAP_READ;
    if (choices.one_in(6))
        c.flags |= DR_MAP_IDEMPOTENT;
    // Runs of an IOVA ring are told apart by what is heard of the unmap before.
    const auto meets = [&](const auto &f) {
        return f.second.expected == 0 && is_range(f.second.c) && f.second.c.iova < c.iova + c.length &&
               c.iova < f.second.end;
    };
    if (world_.attributes.space == DR_SPACE_IOVA && std::any_of(flights_.begin(), flights_.end(), meets))
        return false;
    return submit(c);
}

bool Vmm::submit_unmap(const Plan::Area &area)
{
    Choices &choices = world_.choices;
    dr_command c{0, DR_OP_UNMAP, 0, World::ioas, 0, area.iova, area.length, 0, 0, 0};
    switch (choices.next(8)) {
    case 4: // one map, or a few
    case 5:
        if (const auto e = maps_.first_in(area.iova, area.iova + area.length)) {
            c.iova = e->start;
            c.length = e->end - e->start;
        }
        break;
    case 6:
        choose_range(area, c.iova, c.length);
        c.iova += area.iova;
        break;
    case 7: // several areas
        c.length = choices.one_in(2) ? UINT64_MAX : std::min(world_.plan.aperture() - c.iova, 16 * block_size);
        break;
    default:
        break;
    }
    constexpr std::uint32_t harvests[] = {0, 0, 0, DR_UNMAP_DEFERRED, DR_UNMAP_DEFERRED, DR_UNMAP_DISCARD};
    c.flags = harvests[choices.next(std::size(harvests))];
    if (choices.one_in(4))
        c.flags |= DR_UNMAP_EMPTY_OK;
    return submit(c);
}

bool Vmm::submit_rest(const Flight &f, std::uint64_t done)
{
    dr_command c = f.c;
    c.iova += done;
    c.length = f.end - c.iova;
    return submit(c);
}

bool Vmm::submit_resize()
{
    if (!world_.hwpt)
        return false;
    Choices &choices = world_.choices;
    const auto &areas = world_.plan.areas();
    const Plan::Area &area = areas[choices.next(areas.size())];
    std::uint64_t from = 0;
    std::uint64_t length = 0;
    choose_range(area, from, length);
    if (choices.one_in(4)) { // from within a leaf
        from = choices.next(16) * page_size;
        length = area.length - from;
    }
    const Attributes &a = world_.attributes;
    const unsigned largest = std::min(a.leaf_lg2_max, iommu::entry_lg2(world_.hwpt->geometry.root_level));
    constexpr unsigned sizes[] = {12, 21, 30, 13, 16, 25};
    const unsigned lg2 = sizes[choices.next(std::size(sizes))];
    const bool known = lg2 <= largest && iommu::with_format(a.format, [&](auto f) {
                                             return iommu::leaf_sizes<decltype(f)>(a.all_sizes) >> lg2 & 1;
                                         }) != 0;
    const bool split = choices.next(2) == 0;
    return submit({0, static_cast<std::uint32_t>(split ? DR_OP_SPLIT : DR_OP_COLLAPSE), 0, world_.hwpt->id, lg2,
                   area.iova + from, length, 0, 0, 0},
                  known ? 0 : -EINVAL);
}

bool Vmm::submit_wrong()
{
    if (!world_.hwpt)
        return false;
    const std::uint32_t id = world_.hwpt->id;
    const auto ioas = World::ioas;
    switch (world_.choices.next(7)) {
    case 0:
        return submit({0, 99, 0, id, 0, 0, 0, 0, 0, 0}, -EINVAL);
    case 1:
        return submit({0, DR_OP_MAP, DR_MAP_READ, ioas, 0, 8, page_size, 0, 0, 0}, -EINVAL);
    case 2:
        return submit({0, DR_OP_MAP, DR_MAP_READ, ioas + 1000, 0, 0, page_size, 0, 0, 0}, -ENOENT);
    case 3:
        return submit({0, DR_OP_MAP, DR_MAP_READ, ioas, 0, world_.plan.aperture(), page_size, 0, 0, 0}, -ERANGE);
    case 4:
        return submit({0, DR_OP_MAP, DR_MAP_READ, ioas, 0, 0, page_size, world_.plan.memory(), 0, 0}, -EFAULT);
    case 5:
        return submit({0, DR_OP_UNMAP, DR_UNMAP_DEFERRED | DR_UNMAP_DISCARD, ioas, 0, 0, page_size, 0, 0, 0}, -EINVAL);
    default:
        return submit({0, DR_OP_SYNC, 0, id + 1000, 0, 0, 0, 0, 1, 0}, -ENOENT);
    }
}

void Vmm::reap(std::uint64_t most)
{
    if (!awake())
        return;
    for (std::uint64_t n = 0; n < most;) {
        const auto completed = completions_.peek(most - n);
        if (completed.empty())
            break;
        const std::vector<dr_completion> copies(completed.begin(), completed.end());
        n += copies.size();
        if (completions_.release(copies.size()))
            world_.kicked = true;
        for (const dr_completion &c : copies)
            judge(c);
    }
    judge_markers();
}

void Vmm::sleep()
{
    if (!awake() || flights_.empty())
        return;
    if (!completions_.arm()) {
        completions_.disarm();
        return;
    }
    asleep_ = true;
    world_.say([] { return "the VMM sleeps"; });
    world_.met(Event::vmm_sleeps);
}

void Vmm::sleep_at(DirtyRing &ring)
{
    if (ring.asleep || ring.reader.tail() != ring.mine()->head)
        return;
    ring.called = false;
    ring.asleep = ring.reader.arm();
    if (ring.asleep)
        world_.met(Event::consumer_sleeps);
}

bool Vmm::waits_at(const DirtyRing &ring) const
{
    return world_.attributes.reader == Reader::waits &&
           std::any_of(flights_.begin(), flights_.end(), [&](const auto &f) {
               return f.second.c.opcode == DR_OP_SYNC && f.second.expected == 0 &&
                      ring.read.contains(f.second.c.cookie);
           });
}

void Vmm::drain(HwptWorld &hwpt, unsigned which, std::uint64_t most)
{
    DirtyRing &ring = *hwpt.rings[which];
    if (ring.asleep && !ring.called)
        return;
    if (std::exchange(ring.asleep, false)) {
        world_.met(Event::consumer_called);
        ring.reader.disarm();
    }
    ring.called = false;
    ring.look();
    world_.say([&] { return fmt::format("the VMM reads ring {} of hwpt {}", which, hwpt.id); });
    for (most = std::min(most, ring.capacity); most > 0 && !waits_at(ring);) {
        const std::uint64_t index = ring.reader.tail();
        std::uint64_t taken = 0;
        bool marker = false;
        while (taken < most && !marker) {
            const auto next = ring.reader.peek(1);
            if (next.empty())
                break;
            marker = dr_is_marker(next[0]) && dr_marker_kind(next[0]) == DR_MARKER_SYNC;
            take(hwpt, which, next[0], index + taken++);
        }
        if (taken == 0)
            break;
        most -= taken;
        if (ring.reader.release(taken))
            ring.rung = true;
        if (marker)
            reap(); // the copy is looked at before it takes in more
    }
    judge_markers();
}

void Vmm::drain_all()
{
    for (const auto &hwpt : world_.gone) {
        for (unsigned i = 0; i < hwpt->rings.size(); ++i)
            drain(*hwpt, i);
    }
    if (world_.hwpt) {
        for (unsigned i = 0; i < world_.hwpt->rings.size(); ++i)
            drain(*world_.hwpt, i);
    }
}

std::string Vmm::describe() const
{
    std::string all;
    for (const auto &[user_data, f] : flights_)
        all += fmt::format("{}: {}; ", user_data, text(f.c));
    for (const Waiting &w : waiting_)
        all += fmt::format("marker {}; ", w.cookie);
    return all;
}

std::uint64_t Vmm::states(std::optional<std::uint64_t> iova) const
{
    const unsigned slice_lg2 = world_.attributes.slice_lg2;
    const std::uint64_t start = iova ? *iova >> slice_lg2 << slice_lg2 : 0;
    const std::uint64_t end = iova ? start + (1ull << slice_lg2) : world_.plan.aperture();
    std::uint64_t bits = 0;
    const auto set = [&](State s) { bits |= Coverage::bit(s); };
    bool enabling = false;
    bool disabling = false;
    for (const auto &[user_data, f] : flights_) {
        const bool here = f.c.iova < end && start < f.end;
        switch (f.c.opcode) {
        case DR_OP_MAP:
            set(State::map_out);
            if (here)
                set(State::map_begun);
            break;
        case DR_OP_UNMAP:
            set((f.c.flags & DR_UNMAP_DISCARD) != 0    ? State::unmap_discard_out
                : (f.c.flags & DR_UNMAP_DEFERRED) != 0 ? State::unmap_deferred_out
                                                       : State::unmap_now_out);
            if (here)
                set(State::unmapping);
            for (const HeldPin &p : held_pins()) {
                if (p.start < f.end && f.c.iova < p.end)
                    set(State::pinned_unmap_out);
            }
            break;
        case DR_OP_SPLIT:
        case DR_OP_COLLAPSE:
            set(f.c.opcode == DR_OP_SPLIT ? State::split_out : State::collapse_out);
            if (here)
                set(State::resizing);
            break;
        case DR_OP_ENABLE:
            set(State::enable_out);
            enabling = true;
            break;
        case DR_OP_DISABLE:
            set(State::disable_out);
            disabling = true;
            break;
        default:
            set(State::sync_out);
        }
    }
    set(disabling ? State::disabling : enabled_ ? State::on : enabling ? State::enabling : State::off);
    set(maps_.first_in(start, end) ? State::mapped : State::empty);
    return bits;
}

} // namespace dirtyring::search
