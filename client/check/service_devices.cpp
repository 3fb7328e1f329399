// Devices that die, stay inside, or hold pins.
#include "client/check/device.hpp"
#include "client/check/service_checks.hpp"

namespace dirtyring::check {
namespace {

constexpr std::uint64_t all = TrackedGuest::pages;

// A sync that must not complete yet.
dr_command waiting_sync(Context &c, TrackedGuest &guest, Rule rule, const std::string &why)
{
    const dr_command sync = sync_command(guest.hwpt, guest.next_cookie());
    guest.submit(sync);
    c.need(c.stays_false([&] { return guest.completed().has_value(); }), rule, why, "a SYNC completed", "it waits");
    return sync;
}

void known_at_once(Context &c)
{
    TrackedGuest guest(c, [](auto &r) { r.shards = 4; });
    for (std::uint64_t p = 0; p < 5; ++p) {
        Device device(c, guest);
        device.enter();
        device.write_inside(p);
        const dr_command sync = sync_command(guest.hwpt, guest.next_cookie());
        guest.submit(sync);
        const bool waits = c.stays_false([&] { return guest.completed().has_value(); });
        c.need(waits, "O-14", "a SYNC, with a device that attached just now in a section", "it completed", "it waits");
        device.leave();
        const Pages reported = guest.read_to_marker(sync.cookie, "a SYNC that met a new device");
        c.expect(reported.contains(p), "O-14", "a SYNC that met a new device", text_of(reported),
                 fmt::format("page {:#x}, which it wrote", p));
        guest.next_completion("a SYNC that met a new device");
        device.detach();
    }
}

void closed(Context &c)
{
    TrackedGuest guest(c);
    const auto write = [](Device &device) { device.write_inside(40); };
    DeviceProcess device(c, guest, write);
    device.close_socket();
    const dr_command sync = waiting_sync(c, guest, "S-10", "a device in a section, whose connection has closed");
    device.leave_section();
    const Pages reported = guest.read_to_marker(sync.cookie, "a SYNC that waited for a device without connection");
    c.expect(reported.contains(40), "S-10", "a device without connection, when it left its section", text_of(reported),
             "page 0x28, which it wrote");
    guest.next_completion("a SYNC that waited for a device without connection");
    guest.refused("O-7", DR_DESTROY, dr_object{0, guest.hwpt}, EBUSY, "while the device's process lives");
}

// Until the service has noticed that the device's process has ended: memory is added only where no device is.
void wait_for_death(Context &c, TrackedGuest &guest)
{
    int error = EBUSY;
    for (std::uint64_t i = 0; error == EBUSY && !c.deadline.over(); ++i) {
        const dr_memory_region more{0, 0, (1ull << 40) + i * page, page, 0};
        error = guest.call(DR_MEMORY_ADD, more, {guest.memory.get()}).error();
    }
    c.need(error == 0, "S-11", "MEMORY_ADD, when the only device's process has ended",
           fmt::format("refused with {} for {}", error_name(error), c.nothing()), "it done");
}

void dead(Context &c)
{
    TrackedGuest guest(c);
    // It dies in its section, between the Dirty bit and the summary of its last page.
    const auto write = [](Device &device) {
        device.write_inside(50);
        device.set_dirty_silently(60);
    };
    DeviceProcess device(c, guest, write);
    const dr_command sync = waiting_sync(c, guest, "Q-9", "a device in a section");
    device.kill();
    Pages reported = guest.read_to_marker(sync.cookie, "a SYNC that waited for a device that was killed");
    guest.next_completion("a SYNC that waited for a device that was killed");
    wait_for_death(c, guest);
    reported.merge(guest.sync("a sync after the death of a device"));
    c.expect(covers(reported, {50, 60}), "S-11", "a device that was killed in its section", text_of(reported),
             text_of({50, 60}));
}

// ---- pins -----------------------------------------------------------------------------------------------------------

void pinned_unmap(Context &c)
{
    TrackedGuest guest(c);
    Device device(c, guest, 4);
    device.enter();
    device.hold_pin(0, 10, 12, true);
    device.leave();
    device.refused("O-13", DR_DEVICE_DETACH, dr_empty{}, EBUSY, "with a pin");
    device.write(200);
    Pages reported;
    const bool came = c.comes_true([&] {
        reported.merge(pages_of(guest.rings[0].take()));
        return reported.contains(200);
    });
    c.expect(came, "S-14", "page 0xc8, written while a pin is held", c.nothing(), "a run");
    guest.submit(unmap_command(guest.ioas, 0, all * page));
    const bool waits = c.stays_false([&] { return guest.completed().has_value() || device.leaf(11) == nullptr; });
    c.expect(waits, "S-12", "UNMAP of what is pinned", "it completed, or the leaf is gone", "both wait for the pin");
    device.enter();
    device.write_inside(11); // as the marks of an unpin
    device.give_back_pin(0);
    device.leave();
    if (!waits)
        return;
    const bool done = guest.next_completion("UNMAP, when the pin was given back").result == 0;
    c.expect(done && pages_of(guest.rings[0].take()).contains(11), "M-14", "UNMAP of what was pinned",
             "no run of page 0xb", "one");
}

void pinned_sync(Context &c)
{
    TrackedGuest guest(c);
    Device device(c, guest, 4);
    device.enter();
    device.hold_pin(1, 30, 30, true);
    device.leave();
    const dr_command sync = waiting_sync(c, guest, "S-13", "a pin for writing");
    device.enter();
    device.write_inside(30);
    device.give_back_pin(1);
    device.leave();
    const Pages reported = guest.read_to_marker(sync.cookie, "a SYNC that waited for a pin");
    c.expect(reported.contains(30), "S-13", "a SYNC that waited for a pin", text_of(reported),
             "page 0x1e, which was pinned");
}

void pinned_dead(Context &c)
{
    TrackedGuest guest(c);
    const auto hold = [](Device &device) {
        device.hold_pin(0, 70, 72, true);
        device.leave();
        device.enter();
    };
    DeviceProcess device(c, guest, hold, 1);
    device.leave_section();
    device.kill();
    wait_for_death(c, guest);
    const Pages reported = guest.sync("a sync after the death of a device with a pin");
    c.expect(covers(reported, {70, 71, 72}), "S-15", "a device that was killed with a pin for writing",
             text_of(reported), text_of({70, 71, 72}));
}

const Check checks[] = {
    {"a device that has just attached", known_at_once, {"O-14"}},
    {"a device whose connection has closed", closed, {"S-10"}},
    {"a device that dies", dead, {"S-11"}},
    {"a pin and UNMAP", pinned_unmap, {"O-13", "S-12", "S-14"}},
    {"a pin and SYNC", pinned_sync, {"S-13"}},
    {"a pin whose device dies", pinned_dead, {"S-15"}},
};

} // namespace

std::span<const Check> device_checks()
{
    return checks;
}

} // namespace dirtyring::check
