// What a consumer and its front-end say: messages, commands, tail, kicks, sleep.
#include "client/check/played_service_guest.hpp"

#include <random>

namespace dirtyring::check {
namespace {

// It sets up and consumes, as ever.
void everyday(Stage &s)
{
    PlayedGuest guest(s);
    guest.start_and_wait();
    PlayedRing &ring = guest.fed();
    for (int round = 0; round < 20; ++round) {
        const bool wanted = round % 2 == 0;
        (void)take_signal(ring.kick);
        ring.want_kick(wanted);
        guest.feed(ring, guest.runs(std::min<std::uint64_t>(3, ring.room() - DR_MARKER_SLOTS)));
        guest.need_released(ring, fmt::format("runs of round {}", round));
        if (wanted)
            s.need(s.comes_true([&] { return take_signal(ring.kick); }), "C-5",
                   fmt::format("a release while `want_kick` is 1, round {}", round), s.nothing(), "a kick");
        ring.want_kick(false);
    }
}

// Slots beyond head say that nothing follows, to whoever reads them.
void bait(Stage &s)
{
    PlayedGuest guest(s);
    guest.start_and_wait();
    PlayedRing &ring = guest.fed();
    for (int round = 0; round < 8; ++round) {
        ring.bait(dr_marker(DR_MARKER_END, 0));
        guest.feed(ring, guest.runs(2));
        guest.need_released(ring, "end markers at and beyond head", "C-2");
    }
}

// Spins, so that what follows comes at another moment of the program's round each time.
void spin(std::chrono::nanoseconds time)
{
    for (const auto until = Deadline::Clock::now() + time; Deadline::Clock::now() < until;) {
    }
}

// An entry that comes between its last look and its arming calls nobody: it must look again.
void offer(PlayedGuest &guest, const Entries &entries, unsigned &uncalled)
{
    PlayedRing &ring = guest.fed();
    uncalled += !ring.publish(entries);
    for (int looks = 0; looks < 50'000; ++looks) { // no clock and no waiting: it goes on arming meanwhile
        if (ring.released())
            return;
    }
    guest.need_released(ring, "an entry");
}

void sleep(Stage &s)
{
    constexpr int rounds = 1000;
    PlayedGuest guest(s);
    guest.start_and_wait();
    std::mt19937_64 random(1);
    bool armed = false;
    unsigned uncalled = 0;
    const auto until = Deadline::Clock::now() + s.deadline.patience() / 2;
    for (int round = 0; round < rounds && Deadline::Clock::now() < until; ++round) {
        const Entries first = guest.runs(1);
        const Entries second = guest.runs(1);
        if (round % 50 == 0)
            armed = guest.comes_soon([&] { return guest.fed().waits(); }) || armed;
        offer(guest, first, uncalled);
        if (round % 4 != 0)
            spin(std::chrono::nanoseconds(random() % (round % 4 == 1 ? 20'000 : 1000)));
        offer(guest, second, uncalled);
        if (armed && uncalled > 0)
            s.verdicts.pass("C-6");
    }
    s.verdicts.skip("C-6", armed ? "every entry found it armed already" : "the program never armed");
}

// Without the feature there are no rings of guest-physical addresses.
void features(Stage &s)
{
    PlayedGuest guest(s);
    guest.features = DR_FEATURE_SUMMARY;
    guest.start();
    (void)guest.comes([&] { return guest.has_hwpt(); });
    if (!guest.greeted())
        throw Broken("the program sent no HELLO");
    s.expect(!guest.has_hwpt() || guest.hwpt().space != DR_SPACE_OA, "H-2", "a HWPT_ALLOC without DR_FEATURE_OA_SPACE",
             "space 1", "another space, or none");
}

// A newer service says more in each reply.
void more(Stage &s)
{
    PlayedGuest guest(s);
    guest.says_more = true;
    try {
        guest.start_and_wait();
        s.verdicts.pass("F-18");
    } catch (const Broken &e) {
        if (s.verdicts.outcome("C-4") != Outcome::pass)
            throw;
        s.expect(false, "F-18", "replies with 16 bytes more than version 1 knows", e.what(), "it goes on");
    }
}

const Situation situations[] = {
    {"everyday", everyday, {"C-4", "C-5", "E-2", "E-3", "F-1", "F-2", "F-3", "H-1"}},
    {"end markers beyond head", bait, {"C-2"}},
    {"falling asleep", sleep, {"C-6"}},
    {"a service without features", features, {"H-2"}},
    {"a newer service", more, {"F-18"}},
};

} // namespace

std::span<const Situation> consumer_situations()
{
    return situations;
}

void check_consumer(Verdicts &verdicts, const std::string &command, std::chrono::milliseconds patience)
{
    for (const auto &area : {consumer_situations(), consumer_copy_situations(), consumer_ring_situations()}) {
        for (const Situation &situation : area)
            play(situation, verdicts, command, patience);
    }
    verdicts.skip("E-1", "what it takes for dirty is its own affair: no word of it is shared");
    verdicts.skip("E-5", "what it uses a page of memory for is not seen");
    verdicts.skip("E-7", "the kit plays no device that the program could end");
}

} // namespace dirtyring::check
