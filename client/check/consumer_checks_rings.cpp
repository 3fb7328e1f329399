// What a consumer makes of what it reads: markers, headers, heads.
#include "client/check/played_service_guest.hpp"

#include <algorithm>

namespace dirtyring::check {
namespace {

void unknown_markers(Stage &s)
{
    PlayedGuest guest(s);
    guest.start_and_wait();
    PlayedRing &ring = guest.fed();
    for (const std::uint64_t kind : {5, 77, 127}) {
        Entries entries = guest.runs(1);
        entries.push_back(kind << 12 | 0xabcdeull << 20);
        guest.feed(ring, entries);
        const std::string what = fmt::format("a marker of kind {}", kind);
        guest.need_released(ring, what, "C-8");
        guest.feed(ring, guest.runs(1));
        guest.need_released(ring, what, "C-8");
        s.verdicts.pass("C-8");
    }
}

// The markers of a sync, ring by ring, behind one with the cookie of nobody.
void sync(Stage &s)
{
    PlayedGuest guest(s);
    guest.hold_syncs = true;
    guest.start_and_wait();
    if (!guest.fed_until([&] { return !guest.syncs.empty(); }))
        throw Broken("the program made no SYNC");
    const dr_command command = guest.syncs.front();
    const std::uint64_t commands = guest.commands;
    const auto goes_on = [&] { return guest.subject.ended() || guest.hung_up() || guest.commands != commands; };
    const auto expect_waiting = [&](const std::string &what) {
        s.need(guest.never_comes(goes_on), "C-11", what, guest.subject.state(),
               "it waits for its marker in every ring");
    };
    const std::uint64_t cookie = command.cookie;
    const auto pass_on = [&](PlayedRing &ring, std::uint64_t of) {
        guest.feed(ring, {dr_marker(DR_MARKER_SYNC, of)});
        (void)guest.comes([&] { return ring.released(); });
    };
    for (PlayedRing &ring : guest.rings())
        pass_on(ring, cookie ^ 1);
    expect_waiting("markers with the cookie of another sync");
    for (std::size_t i = 0; i < guest.rings().size(); ++i) {
        pass_on(guest.rings()[i], cookie);
        if (i + 1 < guest.rings().size())
            expect_waiting(fmt::format("its marker in {} of {} rings", i + 1, guest.rings().size()));
    }
    guest.finish(command, 0);
    if (!guest.comes(goes_on))
        throw Broken("the program did nothing more after its sync, so that nothing tells when it took it for done");
    s.verdicts.pass("C-11");
}

void end(Stage &s)
{
    PlayedGuest guest(s);
    guest.start_and_wait();
    for (PlayedRing &ring : guest.rings())
        guest.feed(ring, {dr_marker(DR_MARKER_END, 0)});
    const auto waiting = [&] {
        return std::any_of(guest.rings().begin(), guest.rings().end(),
                           [](PlayedRing &ring) { return ring.released() && ring.waits(); });
    };
    const auto over = [&] { return guest.subject.ended() || guest.hung_up(); };
    if (!guest.comes([&] { return over() || waiting(); }))
        throw Broken("the program neither ended nor armed: whether it waits is not seen");
    s.expect(guest.comes(over) || !waiting(), "C-12", "an end marker in every ring",
             "it armed for an entry behind it and waits", "it waits for nothing more there");
}

struct Wrong {
    const char *what;
    PlayedRing::Distort how;
};

void headers(Stage &s)
{
    const Wrong wrongs[] = {{"a ring with another magic", [](dr_ring_header &h) { h.magic ^= 1ull << 40; }},
                            {"a ring of version 2", [](dr_ring_header &h) { h.version = 2; }},
                            {"a ring of kind 2", [](dr_ring_header &h) { h.kind = DR_RING_SUBMISSION; }},
                            {"a ring with entries of 16 bytes", [](dr_ring_header &h) { h.entry_size = 16; }},
                            {"a ring of 2^40 entries", [](dr_ring_header &h) { h.capacity = 1ull << 40; }},
                            {"a ring of 3 entries", [](dr_ring_header &h) { h.capacity = 3; }}};
    for (const Wrong &wrong : wrongs) {
        PlayedGuest guest(s);
        guest.distort = wrong.how;
        guest.first_entries = {dr_marker(DR_MARKER_SYNC, 0), dr_marker(DR_MARKER_SYNC, 0)};
        guest.start();
        if (!guest.comes([&] { return guest.got_rings; }))
            throw Broken("the program made no RING_GET");
        const auto used = [&] {
            return std::any_of(guest.rings().begin(), guest.rings().end(),
                               [](const PlayedRing &ring) { return ring.tail() != 0; });
        };
        s.expect(guest.never_comes(used), "C-1", wrong.what, "it was read", "it is not used");
    }
}

void heads(Stage &s)
{
    for (const bool back : {true, false}) {
        PlayedGuest guest(s);
        guest.start_and_wait();
        PlayedRing &ring = guest.fed();
        guest.feed(ring, guest.runs(4));
        guest.need_released(ring, "runs");
        (void)guest.comes_soon([&] { return ring.waits(); });
        const std::uint64_t tail = ring.tail();
        const std::uint64_t head = back ? tail - 2 : tail + guest.hwpt().ring_entries + 2;
        ring.set_head(head);
        ring.disarm();
        signal(ring.call);
        const std::string what =
            fmt::format("head {} with tail {} and {} slots", head, tail, guest.hwpt().ring_entries);
        const auto moved = [&] { return ring.tail() != tail; };
        // A program that stops reading may arm again, end, or do nothing any more, after it has taken the call.
        const auto looked = [&] { return ring.armed() != DR_DISARMED || !is_signalled(ring.call); };
        if (!s.comes_true([&] { return moved() || looked() || guest.subject.ended(); }))
            throw Broken("the program did not look after a call");
        s.need(s.stays_false(moved), "C-3", what, fmt::format("tail became {}", ring.tail()), "it stops reading");
    }
}

const Situation situations[] = {
    {"markers that nobody knows", unknown_markers, {"C-8"}},
    {"a sync", sync, {"C-11"}},
    {"the end of its rings", end, {"C-12"}},
    {"rings that are none", headers, {"C-1"}},
    {"a head that cannot be", heads, {"C-3"}},
};

} // namespace

std::span<const Situation> consumer_ring_situations()
{
    return situations;
}

} // namespace dirtyring::check
