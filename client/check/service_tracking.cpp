// Area M, the rest: ENABLE, SYNC, DISABLE.
#include "client/check/device.hpp"
#include "client/check/service_checks.hpp"

#include <random>

namespace dirtyring::check {
namespace {

constexpr std::uint64_t all = TrackedGuest::pages;

void enable_hwpt(Context &c, const TrackedGuest::Change &change)
{
    TrackedGuest guest(c, change);
    Device device(c, guest);
    guest.enable(false);
    device.write(1); // what it has cached from now on knows of no tracking
    device.write(2);
    device.set_dirty_silently(3);
    guest.enable(true);
    c.expect(!device.dirty(3), "M-21", "a leaf that was dirty before ENABLE", "D is set",
             "D clear when ENABLE completes");
    device.write({1, 2, 3});
    const Pages reported = guest.sync("a sync after ENABLE");
    c.expect(covers(reported, {1, 2, 3}), "M-22", "DMA after ENABLE, through what was cached before", text_of(reported),
             text_of({1, 2, 3}));
    guest.enable(false);
    (void)guest.rings[0].take();
    device.write({1, 2, 200});
    device.ring_doorbell();
    Pages untracked;
    (void)c.stays_false([&] { return !(untracked = pages_of(guest.rings[0].take())).empty(); });
    untracked.merge(guest.sync("a sync after DISABLE"));
    c.expect(untracked.empty(), "M-23", "DMA after DISABLE", text_of(untracked), "no run");
}

bool has_format(Context &c, std::uint32_t format)
{
    Guest guest(c, 4);
    dr_hwpt_alloc request = Guest::hwpt_request(guest.get<dr_object>(DR_IOAS_ALLOC, dr_empty{}).id);
    request.format = format;
    return guest.call(DR_HWPT_ALLOC, request).error() != EOPNOTSUPP;
}

// In each format that the service has.
void enable(Context &c)
{
    iommu::for_each_format([&](auto f) {
        if (!has_format(c, f.id))
            return;
        enable_hwpt(c, [](auto &r) { r.format = decltype(f)::id; });
        enable_hwpt(c, [](auto &r) {
            r.format = decltype(f)::id;
            r.flags |= DR_HWPT_ALWAYS_ON;
        });
    });
}

// Random pages in two slices, a few at a time; each sync has all of them.
void sync(Context &c)
{
    TrackedGuest guest(c, [](auto &r) { r.shards = 2; });
    constexpr std::uint64_t second = 1ull << 19; // the first page of the second slice
    guest.map(second, all, 0);
    Device device(c, guest);
    std::mt19937_64 random(1);
    for (int round = 0; round < 50; ++round) {
        Pages written;
        for (std::uint64_t n = random() % 20; n > 0; --n)
            written.insert(random() % 2 * second + random() % all);
        device.write(written);
        const Pages reported = guest.sync(fmt::format("sync {}", round));
        c.expect(covers(reported, written), "M-24", fmt::format("before the markers of sync {}", round),
                 text_of(reported), text_of(written));
    }
}

void completion(Context &c)
{
    TrackedGuest guest(c, [](auto &r) { r.shards = 2; });
    for (std::uint64_t i = 0; i < 10; ++i) {
        const dr_command sync = sync_command(guest.hwpt, guest.next_cookie());
        guest.submit(sync);
        guest.next_completion("SYNC of two rings");
        for (Ring &ring : guest.rings) {
            const Entries entries = ring.take();
            const bool there = !entries.empty() && entries.back() == dr_marker(DR_MARKER_SYNC, sync.cookie);
            c.expect(there, "M-25", "the rings when SYNC completed", "one whose last entry is not its marker",
                     "its marker in each");
        }
    }
    const std::uint64_t longest = (1ull << DR_PAYLOAD_BITS) - 1;
    guest.expect("M-8", sync_command(guest.hwpt, longest), 0, "SYNC with a cookie of 44 bits");
    for (Ring &ring : guest.rings)
        c.expect(ring.take() == Entries{dr_marker(DR_MARKER_SYNC, longest)}, "M-25", "a cookie of 44 bits",
                 "another entry than its marker", "the marker alone");
}

// Each sync waits for the section; what it wrote is before the marker.
void section(Context &c)
{
    TrackedGuest guest(c);
    Device device(c, guest);
    device.enter();
    device.write_inside(8);
    const dr_command sync = sync_command(guest.hwpt, guest.next_cookie());
    guest.submit(sync);
    c.expect(c.stays_false([&] { return guest.rings[0].head() != 0; }), "Q-9",
             "a section that stays open during a SYNC", "something was published", "nothing");
    device.leave();
    const Pages reported = guest.read_to_marker(sync.cookie, "a SYNC that met a section");
    c.expect(reported.contains(8), "M-24", "a SYNC that met a section", text_of(reported), "page 0x8, which it wrote");
}

// One thread has set D and is not at the summary; another finds D set and is done. The sync owes its page.
void half_marked(Context &c)
{
    TrackedGuest guest(c);
    Device slow(c, guest);
    Device quick(c, guest);
    slow.enter();
    slow.set_dirty_silently(33);
    quick.write(33);
    const dr_command sync = sync_command(guest.hwpt, guest.next_cookie());
    guest.submit(sync);
    c.pause(); // a sync that does not wait for the slow one has its markers out by now
    slow.summarize(33);
    slow.leave();
    const Pages reported = guest.read_to_marker(sync.cookie, "a SYNC during another thread's mark");
    c.expect(reported.contains(33), "M-24", "DMA that found the mark of a thread still in its section",
             text_of(reported), "page 0x21, which it wrote before the SYNC");
}

void room(Context &c)
{
    TrackedGuest guest(c, [](auto &r) { r.ring_entries = DR_CAPACITY_MIN; });
    Device device(c, guest);
    Pages written;
    for (std::uint64_t p = 0; p < 64; p += 2)
        written.insert(p);
    device.write(written);
    const dr_command sync = sync_command(guest.hwpt, guest.next_cookie());
    guest.submit(sync);
    const dr_command map = map_command(guest.ioas, all * page, page, 0);
    guest.submit(map);
    const dr_completion first = guest.next_completion("a MAP behind a SYNC that has no room", "M-26");
    c.expect(
        first.user_data == map.user_data && first.result == 0, "M-26", "a MAP behind a SYNC that has no room",
        fmt::format("the {} completed first, with {}", first.user_data == map.user_data ? "MAP" : "SYNC", first.result),
        "the MAP, with 0");
    const Pages reported = guest.read_to_marker(sync.cookie, "a SYNC of more than the ring holds");
    c.expect(covers(reported, written), "M-24", "a SYNC of more than the ring holds", text_of(reported),
             text_of(written));
    c.expect(guest.next_completion("a SYNC of more than the ring holds").result == 0, "M-8",
             "a SYNC of more than the ring holds", "it failed", "0");
}

const Check checks[] = {
    {"ENABLE and DISABLE", enable, {"M-21", "M-22", "M-23"}}, {"SYNC", sync, {"M-24", "M-25"}},
    {"markers and completions", completion, {"M-25"}},        {"SYNC and a section", section, {"M-24", "Q-9"}},
    {"SYNC and a half-made mark", half_marked, {"M-24"}},     {"SYNC without room", room, {"M-26"}},
};

} // namespace

std::span<const Check> tracking_checks()
{
    return checks;
}

} // namespace dirtyring::check
