// Area S: who may write what, and peers that break the rules of shared memory.
#include "client/check/device.hpp"
#include "client/check/service_checks.hpp"
#include "iommu/geometry.hpp"

#include <fcntl.h>
#include <random>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

namespace dirtyring::check {
namespace {

std::string file_of(const Fd &fd)
{
    char name[256] = {};
    const ssize_t n = ::readlink(fmt::format("/proc/self/fd/{}", fd.get()).c_str(), name, sizeof name - 1);
    return n > 0 ? name : "?";
}

void sealed(Context &c, const Fd &fd, const char *what, bool writable, bool present)
{
    constexpr int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
    const int has = ::fcntl(fd.get(), F_GET_SEALS);
    c.expect(has >= 0 && (has & seals) == seals, "S-1", what, fmt::format("seals {:#x} ({})", has, file_of(fd)),
             fmt::format("{:#x}", seals));
    struct stat status {
    };
    ::fstat(fd.get(), &status);
    c.expect((status.st_mode & 07777) == 0600, "S-2", what, fmt::format("mode {:o}", status.st_mode & 07777), "600");
    const int mode = ::fcntl(fd.get(), F_GETFL) & O_ACCMODE;
    c.expect(mode == (writable ? O_RDWR : O_RDONLY), "S-2", what, fmt::format("opened with {}", mode),
             writable ? "reading and writing" : "reading only");
    if (present)
        c.expect(status.st_blocks * 512 >= status.st_size, "S-3", what,
                 fmt::format("{} of {} bytes there", status.st_blocks * 512, status.st_size), "all");
}

void event(Context &c, const Fd &fd, const char *what)
{
    const std::string file = file_of(fd);
    c.expect(file.find("eventfd") != std::string::npos, "F-8", what, file, "an eventfd");
}

void rights(Context &c)
{
    TrackedGuest guest(c);
    const Device device(c, guest, 4);
    sealed(c, guest.front_end_fd, "the front-end's memfd", true, true);
    sealed(c, guest.service_fd, "the service's memfd", false, true);
    sealed(c, guest.rings[0].producer_fd, "a producer region", false, true);
    sealed(c, guest.rings[0].consumer_fd, "a consumer region", true, true);
    sealed(c, device.fds[0], "tables", true, false);
    sealed(c, device.fds[1], "translation", false, false);
    sealed(c, device.fds[2], "cells", true, true);
    event(c, guest.kick_event, "the kick of a command ring");
    event(c, guest.call_event, "the call of a command ring");
    event(c, guest.rings[0].call, "the call of a ring");
    event(c, guest.rings[0].kick_event, "the kick of a ring");
    event(c, device.fds[3], "a doorbell");
}

void tails(Context &c)
{
    Bystander bystander(c);
    TrackedGuest guest(c, [](auto &r) { r.ring_entries = 16; });
    Device device(c, guest);
    Ring &ring = guest.rings[0];
    Pages written;
    for (std::uint64_t p = 0; p < TrackedGuest::pages; p += 2)
        written.insert(p);
    device.write(written);
    Pages reported = pages_of(ring.wait_for_entries("Q-11", "after its device wrote and rang"));
    const std::uint64_t good = ring.tail();
    for (const std::uint64_t lie : {good + 1000, good - 1, std::uint64_t{1} << 63, UINT64_MAX}) {
        ring.set_tail(lie);
        ring.kick();
        bystander.expect_undisturbed(fmt::format("tail {:#x}", lie));
        const std::uint64_t head = ring.head();
        c.need(head - good <= 16, "S-5", fmt::format("tail {:#x} in a ring of 16 with tail {}", lie, good),
               fmt::format("head {}", head), fmt::format("at most {}", good + 16));
        ring.set_tail(good);
    }
    reported.merge(guest.sync("a sync after tails that lied"));
    c.expect(covers(reported, written), "S-5", "a sync after tails that lied", text_of(reported), text_of(written));
}

void heads(Context &c)
{
    Bystander bystander(c);
    for (const std::uint64_t head : {std::uint64_t{5}, std::uint64_t{1} << 63, UINT64_MAX}) {
        Guest guest(c, 4);
        word(guest.submission_region().head).store(head, std::memory_order_seq_cst);
        guest.kick();
        bystander.expect_undisturbed(fmt::format("a head of submissions of {:#x}", head));
        c.expect(guest.taken() == 0, "S-6", fmt::format("head {:#x} in a ring of 4", head),
                 fmt::format("{} taken", guest.taken()), "none");
    }
    // Back behind the service's tail.
    Guest guest(c, 4);
    guest.run({}, "a command with opcode 0");
    word(guest.submission_region().head).store(0, std::memory_order_seq_cst);
    guest.kick();
    bystander.expect_undisturbed("a head of submissions that goes back");
    c.expect(c.stays_false([&] { return guest.taken() != 1; }), "S-6", "head 0 after 1 was taken",
             fmt::format("{} taken", guest.taken()), "1");
}

// Their counters at the brim, and blocking: whoever writes to them waits for good.
void events(Context &c)
{
    Bystander bystander(c);
    TrackedGuest guest(c);
    Device device(c, guest);
    Ring &ring = guest.rings[0];
    for (const Fd *fd : {&ring.call, &guest.call_event}) {
        ::fcntl(fd->get(), F_SETFL, ::fcntl(fd->get(), F_GETFL) & ~O_NONBLOCK);
        (void)take_signal(*fd);
        ::eventfd_write(fd->get(), UINT64_MAX - 1);
    }
    for (std::uint64_t i = 0; i < 4; ++i) {
        word(ring.consumer().armed).store(ring.head() + 1, std::memory_order_seq_cst);
        word(guest.completion_consumer().armed).store(i + 3, std::memory_order_seq_cst); // MAP and ENABLE were before
        device.write(i);
        const Pages reported = guest.sync("a sync with eventfds that block");
        c.expect(covers(reported, {i}), "S-7", "a sync with eventfds that block", text_of(reported), text_of({i}));
    }
    bystander.expect_undisturbed("eventfds that block");
}

// A device that writes what it likes into its tables.
void scribbles(Context &c)
{
    Bystander bystander(c);
    TrackedGuest guest(c);
    Device device(c, guest);
    const dr_translation_header &h = device.geometry();
    std::mt19937_64 random(3);
    // The first tables of some level, and some beyond.
    const auto known = [&] {
        return iommu::first_table(h, 0) + iommu::first_number(h.slice_lg2, static_cast<unsigned>(random() % 3));
    };
    const auto at = [&](std::uint64_t offset) -> std::uint64_t & { return *device.tables.as<std::uint64_t>(offset); };
    Pages reported;
    for (int i = 0; i < 2000; ++i) {
        at(h.table_bits + known() / 64 * 8) = random();
        at(h.line_words + (known() + random() % 8) * 8) = random();
        at(h.table_pages + (known() + random() % 4) * page + random() % 512 * 8) = random();
        at(h.table_pages + random() % 2 * page + random() % 512 * 8) = random();
        device.ring_doorbell();
        if (i % 100 == 0)
            reported.merge(guest.sync("a sync of a guest whose device scribbles"));
    }
    reported.merge(guest.sync("a sync of a guest whose device scribbles"));
    const auto beyond = reported.lower_bound(TrackedGuest::pages);
    c.expect(beyond == reported.end(), "S-9", "runs after a device scribbled over its tables",
             beyond == reported.end() ? "" : fmt::format("page {:#x}", *beyond),
             fmt::format("pages below {:#x}, which are mapped", TrackedGuest::pages));
    bystander.expect_undisturbed("a device that scribbles over its tables");
}

void silence(Context &c)
{
    Bystander bystander(c);
    Guest deaf(c, 4);
    // Requests whose replies nobody reads, until the service takes no more.
    const Bytes request = Peer::message(999, payload_of(dr_empty{}), 0);
    for (int i = 0;
         i < 10'000 && ::send(deaf.socket(), request.data(), request.size(), MSG_NOSIGNAL | MSG_DONTWAIT) > 0; ++i) {
    }
    bystander.expect_undisturbed("a client that reads no replies");
    TrackedGuest guest(c, [](auto &r) { r.ring_entries = DR_CAPACITY_MIN; });
    Device device(c, guest);
    device.enter();
    for (std::uint64_t p = 0; p < 64; p += 2)
        device.write_inside(p);
    guest.submit(sync_command(guest.hwpt, 1));
    bystander.expect_undisturbed("a device that stays in its section");
    device.leave();
    bystander.expect_undisturbed("a consumer that does not release");
    Peer half(c);
    half.send(Bytes(7));
    bystander.expect_undisturbed("half a message");
}

const Check checks[] = {
    {"rights", rights, {"S-1", "S-2", "S-3", "S-4", "F-8"}},
    {"tails that lie", tails, {"S-5", "S-8"}},
    {"heads that lie", heads, {"S-6", "S-8"}},
    {"eventfds that block", events, {"S-7", "S-8"}},
    {"tables scribbled over", scribbles, {"S-8", "S-9"}},
    {"peers that are silent", silence, {"S-8"}},
};

} // namespace

std::span<const Check> memory_checks()
{
    return checks;
}

} // namespace dirtyring::check
