// Area Q: what a dirty ring carries, and when.
#include "client/check/device.hpp"
#include "client/check/service_checks.hpp"

#include <algorithm>

namespace dirtyring::check {
namespace {

// Written pages come without being asked for; when they do, everything cached about them is stale and D is clear.
void sweep(Context &c)
{
    TrackedGuest guest(c);
    Device device(c, guest);
    for (const std::uint64_t p : {std::uint64_t{3}, std::uint64_t{77}, std::uint64_t{255}}) {
        const std::uint64_t before = device.generation(p);
        device.write(p);
        Pages reported;
        const bool came = c.comes_true([&] {
            reported.merge(pages_of(guest.rings[0].take()));
            return reported.contains(p);
        });
        c.need(came, "Q-11", fmt::format("page {:#x}, after its device wrote and rang", p), c.nothing(), "a run");
        c.expect(!device.dirty(p), "Q-7", fmt::format("the leaf of page {:#x}, which is in a run", p), "D is set",
                 "D clear: nobody wrote again");
        c.expect(device.generation(p) != before, "Q-8", fmt::format("page {:#x}, which is in a run", p),
                 fmt::format("generation {} as before", before), "another one");
    }
}

void grace(Context &c)
{
    TrackedGuest guest(c);
    Device device(c, guest);
    device.enter();
    device.write_inside(5);
    device.ring_doorbell();
    const bool kept = c.stays_false([&] { return pages_of(guest.rings[0].peek()).contains(5); });
    c.expect(kept, "Q-9", "page 0x5, written in a section that is still open", "a run", "none");
    device.leave();
    const Pages reported = guest.sync("a sync after the section");
    c.expect(!kept || reported.contains(5), "Q-9", "page 0x5, when the section is over", text_of(reported), "a run");
}

void call(Context &c)
{
    TrackedGuest guest(c);
    Device device(c, guest);
    Ring &ring = guest.rings[0];
    // Disarmed: entries come, no call does.
    device.write(1);
    ring.wait_for_entries("Q-11", "after its device wrote and rang");
    c.expect(c.stays_false([&] { return take_signal(ring.call); }), "Q-14", "a ring that is disarmed", "a call",
             "none");
    ring.release();
    word(ring.consumer().armed).store(ring.head() + 1000, std::memory_order_seq_cst);
    device.write(1);
    ring.wait_for_entries("Q-11", "after its device wrote and rang");
    c.expect(c.stays_false([&] { return take_signal(ring.call); }), "Q-14", "a ring that is armed 1000 entries on",
             "a call", "none");
    ring.release();
    (void)guest.sync("a sync, so that nothing is on its way");
    for (int i = 0; i < 5; ++i) {
        const bool quiet = c.comes_true([&] {
            (void)ring.take();
            return ring.arm();
        });
        c.need(quiet, "Q-13", "a ring to which nobody writes", "entry after entry", "none");
        device.write(2);
        c.need(c.comes_true([&] { return take_signal(ring.call); }), "Q-13", "a ring that is armed for the next entry",
               c.nothing(), "a call");
        const bool moved = c.comes_true([&] { return ring.head() >= word(ring.consumer().armed).load(); });
        c.expect(moved, "Q-14", "after a call", fmt::format("head {}", ring.head()),
                 fmt::format("{} or beyond", word(ring.consumer().armed).load()));
        (void)ring.take();
    }
}

Pages every_other(std::uint64_t upto)
{
    Pages pages;
    for (std::uint64_t p = 0; p < upto; p += 2)
        pages.insert(p);
    return pages;
}

void full(Context &c)
{
    constexpr std::uint64_t capacity = 16;
    TrackedGuest guest(c, [](auto &r) { r.ring_entries = capacity; });
    Device device(c, guest);
    Ring &ring = guest.rings[0];
    const Pages written = every_other(TrackedGuest::pages);
    device.write(written);
    Entries first = ring.wait_for_entries("Q-11", "after its device wrote and rang");
    c.pause(); // as much as there is room for
    const Entries more = ring.peek();
    first.insert(first.end(), more.begin(), more.end());
    const std::uint64_t tail = ring.tail();
    device.write(written);
    c.pause();
    Entries again;
    for (std::uint64_t i = 0; i < first.size(); ++i)
        again.push_back(ring.entry(tail + i));
    c.expect(again == first, "Q-3", "slots that were published and not released", "they changed", "the same entries");

    // From here on a kick only where it is asked for.
    Pages reported = pages_of(first);
    ring.release();
    const bool all = c.comes_true([&] {
        reported.merge(pages_of(ring.take()));
        return covers(reported, written);
    });
    c.expect(all, "Q-12", "a full ring from which entries are released", text_of(reported), text_of(written));
    c.expect(all, "Q-10", "a ring with less room than there were dirty pages", text_of(reported), text_of(written));
}

void pacing_by_release(Context &c)
{
    TrackedGuest guest(c);
    Device device(c, guest);
    Ring &ring = guest.rings[0];
    device.write(10);
    ring.wait_for_entries("Q-11", "after its device wrote and rang");
    const std::uint64_t head = ring.head();
    device.write(20);
    device.ring_doorbell();
    c.expect(c.stays_false([&] { return ring.head() != head; }), "Q-16",
             "min_interval_us 0, nothing released since the last run", fmt::format("head {}", ring.head()),
             fmt::format("{}", head));
    Pages reported = pages_of(ring.peek());
    ring.release();
    const bool came = c.comes_true([&] {
        reported.merge(pages_of(ring.take()));
        return reported.contains(20);
    });
    c.expect(came, "Q-12", "a ring that rested until its runs were released", text_of(reported), "page 0x14");
}

void pacing_by_time(Context &c)
{
    static constexpr auto interval = 400ms;
    TrackedGuest guest(c, [](auto &r) { r.min_interval_us = std::chrono::microseconds(interval).count(); });
    Device device(c, guest);
    Ring &ring = guest.rings[0];
    c.pause(); // the walker has gone to sleep: its next sweep begins after the write
    const auto before = Deadline::Clock::now();
    device.write(10);
    ring.wait_for_entries("Q-11", "after its device wrote and rang");
    ring.release();
    device.write(20);
    ring.wait_for_entries("Q-11", "after its device wrote and rang again");
    const auto between = std::chrono::duration_cast<std::chrono::milliseconds>(Deadline::Clock::now() - before);
    c.expect(between >= interval / 2, "Q-15", fmt::format("min_interval_us of {} ms", interval.count()),
             fmt::format("two sweeps that found something within {} ms", between.count()), "a rest between them");
}

void spaces(Context &c)
{
    // Guest-physical addresses: page p of IOVA space is page 255 - p of the guest.
    TrackedGuest guest(c, [](auto &r) {
        r.space = DR_SPACE_OA;
        r.shards = 4;
    });
    guest.expect("M-7", unmap_command(guest.ioas, 0, TrackedGuest::pages * page), 0, "UNMAP of everything");
    const auto at = [](std::uint64_t p) { return (p / 2) << 18 | p % 2; }; // two in each of four slices of 1 GiB
    for (std::uint64_t p = 0; p < 8; ++p)
        guest.map(at(p), 1, 255 - p);
    Device device(c, guest);
    for (std::uint64_t p = 0; p < 8; p += 2)
        device.write(at(p));
    const Pages reported = guest.sync("a sync of four rings in OA space");
    const Pages written{255, 253, 251, 249};
    c.expect(covers(reported, written), "M-24", "four rings in OA space", text_of(reported), text_of(written));
    const bool within =
        std::all_of(reported.begin(), reported.end(), [](std::uint64_t p) { return p >= 248 && p < 256; });
    c.expect(within, "S-9", "four rings in OA space", text_of(reported), "pages 0xf8 to 0xff, which are mapped");
}

void large_leaves(Context &c)
{
    // On a multiple of 2 MiB on both sides, so a service may use leaves and units of 2 MiB.
    TrackedGuest guest(c, [](auto &r) { r.leaf_lg2_max = 21; });
    Device device(c, guest);
    const Pages written{3, 700};
    device.write(written);
    const Pages reported = guest.sync("a sync with leaves of up to 2 MiB");
    c.expect(covers(reported, written), "M-24", "leaves of up to 2 MiB", text_of(reported), text_of(written));
    c.verdicts.skip("Q-6", "no run of 2 MiB units came, also with leaves of that size");
}

const Check checks[] = {
    {"a page that is written", sweep, {"Q-2", "Q-4", "Q-5", "Q-7", "Q-8", "Q-11"}},
    {"a section that stays open", grace, {"Q-9"}},
    {"calls", call, {"Q-13", "Q-14"}},
    {"a full ring", full, {"Q-3", "Q-4", "Q-10", "Q-12"}},
    {"pacing by release", pacing_by_release, {"Q-12", "Q-16"}},
    {"pacing by time", pacing_by_time, {"Q-15"}},
    {"rings in OA space", spaces, {"Q-5", "M-24", "S-9"}},
    {"large leaves", large_leaves, {"M-24", "Q-6"}},
};

} // namespace

std::span<const Check> ring_checks()
{
    return checks;
}

} // namespace dirtyring::check
