// Area M, maps: what a change does to devices and to what is dirty.
#include "client/check/device.hpp"
#include "client/check/service_checks.hpp"

#include <algorithm>
#include <cerrno>
#include <unistd.h>

namespace dirtyring::check {
namespace {

using iommu::FaultReason;

constexpr std::uint64_t all = TrackedGuest::pages;

std::optional<std::size_t> position(const Entries &entries, std::uint64_t entry)
{
    const auto at = std::find(entries.begin(), entries.end(), entry);
    if (at == entries.end())
        return std::nullopt;
    return static_cast<std::size_t>(at - entries.begin());
}

FaultReason fault_of(Device &device, std::uint64_t p)
{
    device.enter();
    const FaultReason reason = device.write_inside(p);
    device.leave();
    return reason;
}

void translations(Context &c)
{
    TrackedGuest guest(c);
    Device device(c, guest);
    const auto expect = [&](FaultReason wanted, const char *what) {
        const FaultReason got = fault_of(device, 3 * all);
        c.expect(got == wanted, "M-11", what, fmt::format("fault {}", static_cast<unsigned>(got)),
                 fmt::format("fault {}", static_cast<unsigned>(wanted)));
    };
    const auto change = [&](const dr_command &command, const char *what) { guest.expect("M-6", command, 0, what); };
    expect(FaultReason::not_present, "a DMA write where nothing is mapped");
    change(map_command(guest.ioas, 3 * all * page, page, 7 * page), "MAP of a page");
    const std::uint64_t before = device.generation(3 * all);
    expect(FaultReason::none, "a DMA write after MAP");
    std::uint64_t value = 0;
    const bool read = ::pread(guest.memory.get(), &value, sizeof value, 7 * page) == sizeof value;
    c.expect(read && value != 0, "M-11", "a DMA write after MAP to OA 0x7000", "it did not reach that page", "it does");
    guest.expect("M-7", unmap_command(guest.ioas, 3 * all * page, page), 0, "UNMAP of a page");
    c.expect(device.generation(3 * all) != before, "Q-8", "after UNMAP", fmt::format("generation {} as before", before),
             "another one");
    expect(FaultReason::not_present, "a DMA write after UNMAP, through what was cached");
    change(map_command(guest.ioas, 3 * all * page, page, 0, DR_MAP_READ), "MAP for reading");
    expect(FaultReason::write_denied, "a DMA write where the map is for reading");
}

void grace(Context &c)
{
    TrackedGuest guest(c);
    Device device(c, guest);
    device.enter();
    device.write_inside(9);
    guest.submit(unmap_command(guest.ioas, 0, all * page));
    c.need(c.stays_false([&] { return guest.completed().has_value(); }), "M-13",
           "UNMAP of a page that a section has translated", "it completed while the section was open", "it waits");
    device.leave();
    if (guest.next_completion("UNMAP after the section").result == 0)
        c.expect(pages_of(guest.rings[0].take()).contains(9), "M-14", "UNMAP of a page that a section wrote",
                 "no run of it", "one");
}

// Unreleased entries keep the walker from sweeping, so what is written after them stays in the table.
void make_table_dirty(Context &c, TrackedGuest &guest, Device &device, std::uint64_t p)
{
    device.write(0);
    Pages reported;
    const bool came = c.comes_true([&] {
        reported.merge(pages_of(guest.rings[0].peek()));
        return reported.contains(0);
    });
    c.need(came, "Q-11", "page 0x0, after its device wrote and rang", c.nothing(), "a run");
    device.write(p);
    if (!device.dirty(p))
        throw Broken("the page was swept before its UNMAP");
}

void harvest_now(Context &c)
{
    TrackedGuest guest(c);
    guest.expect("M-7", unmap_command(guest.ioas, 0, all * page), 0, "UNMAP of everything");
    (void)guest.rings[0].take();
    std::set<std::uint64_t> epochs{0};
    Device device(c, guest);
    for (std::uint64_t i = 0; i < 5; ++i) {
        guest.map(0, 100, 0);
        guest.map(100, 100, 100);
        make_table_dirty(c, guest, device, 150 + i);
        const auto unmapped = guest.run(unmap_command(guest.ioas, 100 * page, 100 * page), "UNMAP of a dirty page");
        Entries entries = guest.rings[0].peek();
        c.expect(unmapped.result == 0 && unmapped.done == 100 * page, "M-7", "UNMAP of a dirty page",
                 fmt::format("result {}, done {:#x}", unmapped.result, unmapped.done), "0 and 0x64000");
        c.expect(pages_of(entries).contains(150 + i), "M-14",
                 fmt::format("page {:#x}, when its UNMAP completed", 150 + i), "no run in the ring", "one");
        const std::uint64_t epoch = unmapped.epoch;
        c.expect(epochs.insert(epoch).second, "M-18", "UNMAP in IOVA space", fmt::format("epoch {}, as before", epoch),
                 "one of its own");
        const auto marker = position(entries, dr_marker(DR_MARKER_EPOCH, epoch));
        if (c.expect(marker.has_value(), "M-18", fmt::format("UNMAP with epoch {}", epoch), "no marker with it",
                     "one")) {
            const Pages behind = pages_of({entries.begin() + static_cast<std::ptrdiff_t>(*marker), entries.end()});
            c.expect(behind.lower_bound(100) == behind.end(), "M-19",
                     fmt::format("behind the marker of epoch {}", epoch), text_of(behind),
                     "no page that its UNMAP took out");
        }
        guest.rings[0].release();
        const Pages later = guest.sync("a sync behind an UNMAP");
        c.expect(later.lower_bound(100) == later.end(), "M-19", fmt::format("behind the marker of epoch {}", epoch),
                 text_of(later), "no page that its UNMAP took out");
        epochs.insert(guest.run(unmap_command(guest.ioas, 0, 100 * page), "UNMAP of the rest").epoch);
        (void)guest.rings[0].take();
    }
}

void harvest_later(Context &c)
{
    TrackedGuest guest(c);
    guest.expect("M-7", unmap_command(guest.ioas, 0, all * page), 0, "UNMAP of everything");
    (void)guest.rings[0].take();
    guest.map(0, 100, 0);
    guest.map(100, 100, 100);
    Device device(c, guest);
    make_table_dirty(c, guest, device, 150);
    guest.expect("M-7", unmap_command(guest.ioas, 100 * page, 100 * page, DR_UNMAP_DEFERRED), 0, "UNMAP DEFERRED");
    const Pages deferred = guest.sync("a sync behind an UNMAP DEFERRED");
    c.expect(deferred.contains(150), "M-15", "page 0x96, after UNMAP DEFERRED and a sync", text_of(deferred),
             "a run of it");

    guest.map(100, 100, 100);
    make_table_dirty(c, guest, device, 160);
    guest.expect("M-7", unmap_command(guest.ioas, 100 * page, 100 * page, DR_UNMAP_DISCARD), 0, "UNMAP DISCARD");
    const Pages discarded = guest.sync("a sync behind an UNMAP DISCARD");
    c.expect(!discarded.contains(160), "M-16", "page 0xa0, after UNMAP DISCARD and a sync", text_of(discarded),
             "no run of it");
}

// Two slices, and a map in each: a marker belongs into the rings whose slice lost one.
void epochs(Context &c)
{
    TrackedGuest guest(c, [](auto &r) { r.shards = 2; });
    constexpr std::uint64_t second = 1ull << 19; // the first page of the second slice
    guest.map(second, 1, 0);
    const auto one = guest.run(unmap_command(guest.ioas, second * page, page), "UNMAP in the second slice");
    const Entries first_ring = guest.rings[0].take();
    const Entries second_ring = guest.rings[1].take();
    const std::uint64_t marker = dr_marker(DR_MARKER_EPOCH, one.epoch);
    c.expect(one.epoch != 0 && position(second_ring, marker).has_value(), "M-18", "UNMAP in the second slice",
             fmt::format("epoch {} and no marker in its ring", one.epoch), "a marker in its ring");
    c.expect(!position(first_ring, marker).has_value(), "M-18", "UNMAP in the second slice",
             "a marker in the first ring", "none there");
    guest.map(second, 1, 0);
    const auto both = guest.run(unmap_command(guest.ioas, 0, UINT64_MAX), "UNMAP across two slices");
    for (Ring &ring : guest.rings)
        c.expect(position(ring.take(), dr_marker(DR_MARKER_EPOCH, both.epoch)).has_value(), "M-18",
                 "UNMAP across two slices", fmt::format("a ring without the marker of epoch {}", both.epoch),
                 "one in each");

    TrackedGuest oa(c, [](auto &r) { r.space = DR_SPACE_OA; });
    Device device(c, oa);
    device.write(4);
    const auto none = oa.run(unmap_command(oa.ioas, 0, all * page), "UNMAP in OA space");
    const Entries entries = oa.rings[0].take();
    const bool marked = std::any_of(entries.begin(), entries.end(), [](std::uint64_t e) {
        return dr_is_marker(e) && dr_marker_kind(e) == DR_MARKER_EPOCH;
    });
    c.expect(none.epoch == 0 && !marked, "M-20", "UNMAP in OA space",
             fmt::format("epoch {}, {} epoch marker", none.epoch, marked ? "an" : "no"), "0 and none");
}

// ENABLE overtakes an UNMAP that waits for a pin: in its only slice, then in its second one, when the first is out
// already.
void overtaken(Context &c)
{
    TrackedGuest guest(c, [](auto &r) { r.shards = 2; });
    constexpr std::uint64_t second = 1ull << 19; // the first page of the second slice
    guest.expect("M-7", unmap_command(guest.ioas, 0, all * page), 0, "UNMAP of everything");
    guest.enable(false);
    Device device(c, guest, 1);
    for (Ring &ring : guest.rings)
        (void)ring.take();
    const auto unmap_meanwhile = [&](std::uint64_t first, const char *what) {
        device.hold_pin(0, second, second, true);
        guest.submit(unmap_command(guest.ioas, first * page, (second + 1 - first) * page));
        c.need(c.stays_false([&] { return guest.completed().has_value(); }), "S-12", what, "it completed",
               "it waits for the pin");
        guest.submit(command(DR_OP_ENABLE, guest.hwpt));
        c.need(guest.next_completion("ENABLE beside an UNMAP that waits for a pin").result == 0, "M-8",
               "ENABLE beside an UNMAP that waits for a pin", "it failed", "0");
        device.enter();
        device.write_inside(second); // as the marks of an unpin
        device.give_back_pin(0);
        device.leave();
        device.ring_doorbell();
        return guest.next_completion(what);
    };

    guest.map(second, 1, 0);
    const char *const one = "UNMAP that ENABLE overtakes while it waits for a pin";
    const auto whole = unmap_meanwhile(second, one);
    c.expect(whole.result == 0 && whole.epoch != 0 &&
                 position(guest.rings[1].take(), dr_marker(DR_MARKER_EPOCH, whole.epoch)).has_value(),
             "M-18", one, fmt::format("result {}, epoch {}, or no marker with it", whole.result, whole.epoch),
             "0 and an epoch whose marker is in the ring");

    guest.enable(false);
    guest.map(second - 1, 1, 0);
    guest.map(second, 1, 1);
    const char *const two = "UNMAP that ENABLE overtakes between two slices";
    const auto cut = unmap_meanwhile(second - 1, two);
    c.expect(cut.result == -EAGAIN && cut.done == page && cut.epoch == 0, "M-30", two,
             fmt::format("result {}, done {:#x}, epoch {}", cut.result, cut.done, cut.epoch), "-EAGAIN, 0x1000 and 0");
}

void room(Context &c)
{
    constexpr std::uint64_t dirty = 16;
    TrackedGuest guest(c, [](auto &r) {
        r.ring_entries = DR_CAPACITY_MIN;
        r.min_interval_us = 100; // sweeps go on though nothing is released
    });
    guest.expect("M-7", unmap_command(guest.ioas, 0, all * page), 0, "UNMAP of everything");
    (void)guest.rings[0].take();
    Device device(c, guest);
    Pages written;
    for (std::uint64_t p = 0; p < dirty; ++p)
        guest.map(2 * p, 1, p); // pages apart: a run each
    for (std::uint64_t p = 0; p < dirty; ++p)
        written.insert(2 * p);
    device.write(written);
    const Ring &ring = guest.rings[0];
    const bool filled = c.comes_true([&] { return ring.head() - ring.tail() >= DR_CAPACITY_MIN - DR_MARKER_SLOTS; });
    c.need(filled, "Q-11", "a ring of 8, when 16 pages apart are dirty", fmt::format("head {}", ring.head()),
           "as many runs as it holds");
    Pages reported;
    std::uint64_t from = 0;
    bool met_again = false;
    while (from < 2 * dirty) {
        c.need(!c.deadline.over(), "M-17", "UNMAP of 16 runs through a ring of 8, emptied each time", c.nothing(),
               "its end");
        const auto rest =
            guest.run(unmap_command(guest.ioas, from * page, (2 * dirty - from) * page, DR_UNMAP_EMPTY_OK),
                      "UNMAP of more than the ring holds, which is full", "M-17");
        const bool sane = rest.done % page == 0 && rest.done <= (2 * dirty - from) * page;
        c.need((rest.result == 0 || rest.result == -EAGAIN) && sane &&
                   (rest.result == 0) == (rest.done == (2 * dirty - from) * page),
               "M-17", "UNMAP of more than the ring holds",
               fmt::format("result {}, done {:#x}", rest.result, rest.done), "0 and all of it, or -EAGAIN and less");
        met_again = met_again || rest.result == -EAGAIN;
        from += rest.done / page;
        reported.merge(pages_of(guest.rings[0].take()));
    }
    c.expect(met_again, "M-17", "UNMAP of 16 runs through a ring of 8", "no -EAGAIN", "one");
    c.expect(covers(reported, written), "M-14", "UNMAP of 16 runs through a ring of 8", text_of(reported),
             text_of(written));
}

const Check checks[] = {
    {"translations", translations, {"M-11", "Q-8"}},
    {"UNMAP and a section", grace, {"M-13", "M-14"}},
    {"UNMAP", harvest_now, {"M-14", "M-18", "M-19"}},
    {"UNMAP DEFERRED and DISCARD", harvest_later, {"M-15", "M-16"}},
    {"epochs", epochs, {"M-18", "M-20"}},
    {"UNMAP and ENABLE", overtaken, {"M-18", "M-30"}},
    {"UNMAP through a small ring", room, {"M-17"}},
};

} // namespace

std::span<const Check> map_checks()
{
    return checks;
}

} // namespace dirtyring::check
