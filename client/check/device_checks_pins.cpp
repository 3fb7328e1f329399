// What a device does with pins.
#include "client/check/device_checks_watch.hpp"

#include <algorithm>

namespace dirtyring::check {
namespace {

void need_pins(const PlayedHwpt &hwpt)
{
    if (hwpt.pins == 0)
        throw Broken("the program attached without pins");
}

void need_given_back(PlayedHwpt &hwpt)
{
    if (!hwpt.comes([&] { return hwpt.gave_back(); }))
        throw Broken("the program gave no pin back");
}

// Swept as often as it can be while its pins come and go.
void pins(Stage &s)
{
    PlayedHwpt hwpt(s);
    hwpt.start_and_attach();
    need_pins(hwpt);
    Watch watch(s, hwpt);
    const auto until = Deadline::Clock::now() + s.deadline.patience() / 3;
    for (int i = 0; i < 200 && watch.look(300us) && Deadline::Clock::now() < until; ++i)
        watch.sweep();
    if (watch.written().empty() || !hwpt.gave_back())
        throw Broken("the program gave back no pin under which it had written");
    s.verdicts.pass("D-18");
    s.verdicts.pass("D-19");
    if (watch.holds_pins())
        s.verdicts.pass("D-16");
    else
        s.verdicts.skip("D-16", "no pin was seen held");
}

// All of the space is closed.
void closed(Stage &s)
{
    PlayedHwpt hwpt(s);
    for (unsigned shard = 0; shard < hwpt.header().shards; ++shard) {
        hwpt.control(shard).closed[0].count = 1;
        hwpt.control(shard).closed[0].range[0] = {0, ~0ull};
    }
    hwpt.start_and_attach();
    need_pins(hwpt);
    const auto held = [&] {
        const auto slots = hwpt.slots();
        return std::any_of(slots.begin(), slots.end(), [](const dr_pin &p) { return (p.count & 1) != 0; });
    };
    if (!hwpt.comes([&] { return hwpt.has_pinned(); }))
        throw Broken("the program took no pin");
    s.expect(hwpt.comes([&] { return !held(); }) || !held(), "D-17", "a pin of a range that is closed",
             fmt::format("held: {}", s.nothing()), "it is given back");
    s.expect(hwpt.never_comes([&] { return !hwpt.changed().empty(); }), "D-17", "a range that is closed",
             text_of(hwpt.changed()), "no page written");
}

// No table bit is left to turn on: who rings, rings for a pin.
void doorbell(Stage &s)
{
    PlayedHwpt hwpt(s);
    hwpt.fill_summary();
    hwpt.control().asleep = DR_ASLEEP_PINS;
    hwpt.start_and_attach();
    need_pins(hwpt);
    need_given_back(hwpt);
    s.expect(hwpt.comes([&] { return hwpt.rung(); }), "D-20", "a pin given back while `asleep` is 2", s.nothing(),
             "a ring of its shard's doorbell");
}

const Situation situations[] = {
    {"pins", pins, {"D-18", "D-16", "D-19"}},
    {"pins of a closed range", closed, {"D-17"}},
    {"a walker that waits for pins", doorbell, {"D-20"}},
};

} // namespace

std::span<const Situation> device_pin_situations()
{
    return situations;
}

} // namespace dirtyring::check
