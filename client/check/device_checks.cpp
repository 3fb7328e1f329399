// What a device does in tables as it expects them: marks, sections, generations, doorbells, its end.
#include "client/check/device_checks_watch.hpp"

namespace dirtyring::check {
namespace {

// It writes, and each page that changed is marked; again after each sweep.
void everyday(Stage &s)
{
    PlayedHwpt hwpt(s);
    hwpt.start_and_attach();
    Watch watch(s, hwpt);
    bool goes_on = true;
    for (int i = 0; i < 20 && goes_on; ++i)
        goes_on = watch.look(300us);
    const auto until = Deadline::Clock::now() + s.deadline.patience() / 2;
    while (goes_on && watch.rewritten().size() < 5 && Deadline::Clock::now() < until) {
        watch.sweep();
        goes_on = watch.look(5ms);
    }
    if (watch.written().empty())
        throw Broken(fmt::format("the program wrote nothing below 64 MiB; {}", hwpt.subject.state()));
    s.verdicts.pass("D-2");
    s.verdicts.pass("D-10");
    if (!hwpt.has_pinned())
        s.verdicts.pass("D-9");
    if (watch.quiet_between())
        s.verdicts.pass("D-13");
    for (const Rule rule : {Rule("D-3"), Rule("D-4")}) {
        if (watch.rewritten().empty())
            s.verdicts.skip(rule, "the program wrote no page that it had written before a sweep");
        else
            s.verdicts.pass(rule);
    }
}

// `asleep` is 1 before any table bit is on, so that each that comes on is owed a ring.
void doorbell(Stage &s)
{
    Watch::need_sound(s);
    PlayedHwpt hwpt(s);
    hwpt.control().asleep = DR_ASLEEP;
    hwpt.start_and_attach();
    const auto asleep = [&](std::uint64_t value) {
        word(hwpt.control().asleep).store(value, std::memory_order_seq_cst);
    };
    for (int round = 0; round < 5 && !hwpt.subject.ended(); ++round) {
        if (!hwpt.comes([&] { return hwpt.any_table_bit(); }))
            throw Broken("the program turned no table bit on");
        const bool rung = hwpt.comes([&] { return hwpt.rung(); });
        if (!rung && hwpt.inside())
            throw Broken("the program is still in the section in which it turned a table bit on");
        s.need(rung, "D-14", fmt::format("a table bit that came on while `asleep` is 1, time {}", round), s.nothing(),
               "a ring of its shard's doorbell");
        int tries = 0;
        do {
            asleep(DR_AWAKE);
            hwpt.clean();
            hwpt.advance();
            hwpt.grace();
            (void)hwpt.rung();
            hwpt.clean();
            asleep(DR_ASLEEP);
            if (++tries > 1000)
                return; // it is too quick to be found without a table bit; it rang before
        } while (hwpt.any_table_bit());
    }
}

void detach(Stage &s)
{
    PlayedHwpt hwpt(s);
    hwpt.start_and_attach();
    if (!hwpt.comes([&] { return hwpt.detached; }))
        throw Broken(fmt::format("the program did not detach; {}", hwpt.subject.state()));
    const auto wrote = [&] { return !hwpt.changed_after_detach().empty(); };
    (void)hwpt.comes_soon(wrote); // or it ends
    const bool quiet = hwpt.never_comes(wrote);
    s.expect(quiet, "D-15", "after DEVICE_DETACH", text_of(hwpt.changed_after_detach()), "no DMA any more");
}

// Tracking begins while it runs.
void enable(Stage &s)
{
    Watch::need_sound(s);
    PlayedHwpt hwpt(s);
    hwpt.control().context = iommu::AmdV1::context(false);
    hwpt.start_and_attach();
    Watch watch(s, hwpt);
    const auto half = Deadline::Clock::now() + s.deadline.patience() / 4;
    for (std::size_t before = 0; watch.look(5ms) && watch.written().size() < 500 && Deadline::Clock::now() < half;) {
        // Until it writes the same pages again and no others, or enough of them to come back to some.
        if (watch.wrote() && watch.written().size() == before)
            break;
        before = watch.written().size();
    }
    if (hwpt.subject.ended() || watch.written().empty())
        throw Broken("the program wrote nothing before tracking was enabled and goes on after it");
    s.expect(!hwpt.entries_touched(), "D-21", "walks while `context` is 0", "A or D is set", "entries as they were");
    watch.blame([](std::uint64_t) { return Rule("D-7"); });
    hwpt.clean();
    word(hwpt.control().context).store(iommu::AmdV1::context(true), std::memory_order_seq_cst); // S7
    hwpt.advance();
    hwpt.grace();
    hwpt.remember(hwpt.changed());
    const auto until = Deadline::Clock::now() + s.deadline.patience() / 2;
    while (watch.look(5ms) && watch.rewritten().size() < 5 && Deadline::Clock::now() < until) {
    }
    if (watch.rewritten().empty())
        throw Broken("the program wrote no page both before tracking was enabled and after it");
    s.verdicts.pass("D-7");
}

void more(Stage &s)
{
    PlayedHwpt hwpt(s);
    hwpt.says_more = true;
    hwpt.start_and_attach();
    const bool wrote = hwpt.comes([&] { return hwpt.entries_touched(); });
    if (!wrote) {
        Watch::need_sound(s);
        if (s.verdicts.outcome("D-2") != Outcome::pass)
            throw Broken("the program wrote nothing");
    }
    s.expect(wrote, "F-18", "replies with 16 bytes more than version 1 knows", hwpt.subject.state(), "it goes on");
}

const Situation situations[] = {
    {"everyday", everyday, {"D-2", "D-3", "D-4", "D-9", "D-10", "D-13", "F-1", "F-2", "F-3", "H-1"}},
    {"a walker that sleeps", doorbell, {"D-14"}},
    {"ENABLE", enable, {"D-7", "D-21"}},
    {"DETACH", detach, {"D-15"}},
    {"a newer service", more, {"F-18"}},
};

} // namespace

std::span<const Situation> device_situations()
{
    return situations;
}

void check_device(Verdicts &verdicts, const std::string &command, std::chrono::milliseconds patience)
{
    for (const auto &area : {device_situations(), device_table_situations(), device_pin_situations()}) {
        for (const Situation &situation : area)
            play(situation, verdicts, command, patience);
    }
    verdicts.skip("F-3", "the program sent no descriptors, and need not");
    verdicts.skip("H-2", "no feature is one that a device could do without or use nevertheless");
    verdicts.skip("D-5", "the order of a load and a walk within one section is not seen");
}

} // namespace dirtyring::check
