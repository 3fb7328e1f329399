// Area O: objects, and what each request refuses.
#include "client/check/device.hpp"
#include "client/check/service_checks.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>

namespace dirtyring::check {
namespace {

void guests(Context &c)
{
    Peer peer(c);
    peer.hello();
    for (const std::uint32_t entries : {0u, 1u, 3u, 100u, DR_COMMAND_CAPACITY_MAX * 2, UINT32_MAX})
        peer.refused("O-1", DR_GUEST_CREATE, new_guest(entries), EINVAL, fmt::format("{} entries", entries));
    std::set<std::string> tokens{std::string(DR_TOKEN_BYTES, '\0')};
    constexpr int count = 4;
    for (int i = 0; i < count; ++i) {
        const Guest guest(c, i % 2 == 0 ? DR_COMMAND_CAPACITY_MIN : DR_COMMAND_CAPACITY_MAX);
        tokens.emplace(reinterpret_cast<const char *>(guest.info.token), DR_TOKEN_BYTES);
    }
    c.expect(tokens.size() == count + 1, "O-2", fmt::format("tokens of {} guests", count),
             fmt::format("{} that differ and are not zero", tokens.size() - 1), fmt::format("{}", count));
}

void memory(Context &c)
{
    Guest guest(c, 4);
    const Fd file = memory_file(16 * page);
    const std::vector<int> fds{file.get()};
    const dr_memory_region wrong[] = {{0, 1, 0, page, 0},
                                      {0, 0, 1, page, 0},
                                      {0, 0, 0, page + 1, 0},
                                      {0, 0, 0, page, 1},
                                      {0, 0, 0, 0, 0},
                                      {0, 0, ~0ull << 12, 2 * page, 0},
                                      {0, 0, 0, page, ~0ull << 12},
                                      {0, 0, page, ~0ull << 12, 0},
                                      {0, 0, 1ull << DR_OA_LG2, page, 0}};
    for (const dr_memory_region &r : wrong)
        guest.refused(
            "O-3", DR_MEMORY_ADD, r, EINVAL,
            fmt::format("oa {:#x}, length {:#x}, offset {:#x}, reserved {}", r.oa, r.length, r.offset, r.reserved),
            fds);
    const Fd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
    const Fd event(::eventfd(0, EFD_CLOEXEC));
    for (const Fd *fd : {&null, &event})
        guest.refused("O-3", DR_MEMORY_ADD, dr_memory_region{0, 0, 0, page, 0}, EBADF, "a descriptor of no memory",
                      {fd->get()});
    guest.add_memory(4 * page, 4 * page, file);
    for (const auto &[first, count] : {std::pair{4u, 4u}, {0u, 5u}, {7u, 1u}, {0u, 16u}})
        guest.refused("O-3", DR_MEMORY_ADD, dr_memory_region{0, 0, first * page, count * page, 0}, EEXIST,
                      fmt::format("pages {} +{} over 4 +4", first, count), fds);
    for (std::uint64_t i = 1; i < DR_GUEST_REGIONS_MAX; ++i)
        guest.add_memory((100 + 2 * i) * page, page, file);
    guest.refused("O-3", DR_MEMORY_ADD, dr_memory_region{0, 0, 1000 * page, page, 0}, ENOSPC,
                  fmt::format("region {}", DR_GUEST_REGIONS_MAX + 1), fds);
    TrackedGuest tracked(c);
    const Device device(c, tracked);
    tracked.refused("O-3", DR_MEMORY_ADD, dr_memory_region{0, 0, 1ull << 30, page, 0}, EBUSY, "with a device attached",
                    fds);
}

void hwpts(Context &c)
{
    Guest guest(c, 4);
    const std::uint32_t ioas = guest.get<dr_object>(DR_IOAS_ALLOC, dr_empty{}).id;
    const auto refused = [&](int error, const std::string &what, auto change) {
        dr_hwpt_alloc request = Guest::hwpt_request(ioas);
        change(request);
        guest.refused("O-4", DR_HWPT_ALLOC, request, error, what);
    };
    const auto each = [&](const char *field, std::uint32_t dr_hwpt_alloc::*member,
                          std::initializer_list<std::uint32_t> values, int error) {
        for (const std::uint32_t v : values)
            refused(error, fmt::format("{} {}", field, v), [&](dr_hwpt_alloc &r) { r.*member = v; });
    };
    each("aperture_lg2", &dr_hwpt_alloc::aperture_lg2, {0, 20, 49, UINT32_MAX}, EINVAL);
    each("shards of 4 GiB", &dr_hwpt_alloc::shards, {0, 3, 8, UINT32_MAX}, EINVAL);
    each("leaf_lg2_max", &dr_hwpt_alloc::leaf_lg2_max, {0, 13, 39}, EINVAL);
    each("space", &dr_hwpt_alloc::space, {2, UINT32_MAX}, EINVAL);
    each("ring_entries", &dr_hwpt_alloc::ring_entries, {0, 4, 9, DR_CAPACITY_MAX * 2}, EINVAL);
    each("flags", &dr_hwpt_alloc::flags,
         {DR_HWPT_ALWAYS_ON, DR_HWPT_DIRTY_TRACKING | DR_HWPT_DIRTY_OPTIONAL, UINT32_MAX}, EINVAL);
    each("levels", &dr_hwpt_alloc::levels, {2, 7, UINT32_MAX}, EINVAL);
    each("format", &dr_hwpt_alloc::format, {0, UINT32_MAX}, EOPNOTSUPP);
    each("ioas", &dr_hwpt_alloc::ioas, {0, ioas + 1}, ENOENT);
    dr_hwpt_alloc request = Guest::hwpt_request(ioas);
    request.aperture_lg2 = 39;
    request.shards = 4;
    const auto hwpt = guest.get<dr_hwpt>(DR_HWPT_ALLOC, request);
    c.expect(hwpt.shards == 4 && hwpt.slice_lg2 == 37, "O-5", "HWPT_ALLOC of 4 shards and 2^39 bytes",
             fmt::format("{} shards, slice_lg2 {}", hwpt.shards, hwpt.slice_lg2), "4 and 37");
    refused(EBUSY, "an ioas with an hwpt", [](auto &) {});
    guest.refused("O-6", DR_RING_GET, dr_ring_get{0, hwpt.id, 4}, ENOENT, "shard 4 of 4");
    guest.refused("O-6", DR_RING_GET, dr_ring_get{0, hwpt.id + 1, 0}, ENOENT, "an hwpt that is not there");
    guest.refused("O-6", DR_RING_GET, dr_ring_get{0, ioas, 0}, ENOENT, "an ioas");
    TrackedGuest untracked(c, [](auto &r) { r.flags = 0; });
    untracked.refused("O-6", DR_RING_GET, dr_ring_get{0, untracked.hwpt, 0}, EOPNOTSUPP, "of an hwpt without tracking");
}

void destroy(Context &c)
{
    TrackedGuest guest(c);
    const auto refused = [&](std::uint32_t id, int error, const char *what) {
        guest.refused("O-7", DR_DESTROY, dr_object{0, id}, error, what);
    };
    const std::uint32_t old = guest.hwpt;
    refused(0, ENOENT, "object 0");
    refused(guest.ioas, EBUSY, "an ioas with an hwpt");
    {
        Device device(c, guest);
        refused(old, EBUSY, "an hwpt with a device");
        device.detach();
    }
    guest.get<dr_empty>(DR_DESTROY, dr_object{0, old});
    refused(old, ENOENT, "an hwpt that was destroyed");
    dr_hwpt_alloc request = Guest::hwpt_request(guest.ioas);
    const std::uint32_t next = guest.get<dr_hwpt>(DR_HWPT_ALLOC, request).id;
    c.expect(next != old && next != guest.ioas, "O-8", "an hwpt made after one was destroyed",
             fmt::format("id {}", next), "one that was never there");
    guest.expect("O-10", map_command(guest.ioas, 0, page, 0), 0, "MAP where the destroyed hwpt had one");

    Guest other(c, 4);
    other.refused("O-9", DR_DESTROY, dr_object{0, next}, ENOENT, "an object of another guest");
    other.refused("O-9", DR_RING_GET, dr_ring_get{0, next, 0}, ENOENT, "of another guest's hwpt");
}

// A sync that waits for room is in flight for as long as we like.
void in_flight(Context &c)
{
    TrackedGuest guest(c, [](auto &r) { r.ring_entries = DR_CAPACITY_MIN; });
    {
        Device device(c, guest);
        for (std::uint64_t p = 0; p < 64; p += 2)
            device.write(p);
        device.detach();
    }
    const dr_command waiting = sync_command(guest.hwpt, guest.next_cookie());
    guest.submit(waiting);
    const bool waits = c.stays_false([&] { return guest.completed().has_value(); });
    guest.get<dr_empty>(DR_DESTROY, dr_object{0, guest.hwpt});
    if (waits) {
        const dr_completion completion = guest.next_completion("a SYNC whose hwpt was destroyed");
        c.expect(completion.result == -ECANCELED, "O-11", "a SYNC whose hwpt was destroyed",
                 fmt::format("result {}", completion.result), fmt::format("-ECANCELED, {}", -ECANCELED));
    }
    const Entries entries = guest.rings[0].take();
    const auto ends = std::count(entries.begin(), entries.end(), dr_marker(DR_MARKER_END, 0));
    c.expect(ends == 1, "Q-17", "the ring of a destroyed hwpt", fmt::format("{} end markers", ends), "one");
}

void attach(Context &c)
{
    TrackedGuest guest(c);
    Peer peer(c);
    peer.hello();
    const auto refused = [&](int error, const std::string &what, auto change) {
        dr_device_attach request = guest.attach_request();
        change(request);
        peer.refused("O-12", DR_DEVICE_ATTACH, request, error, what);
    };
    refused(EACCES, "a wrong token", [](auto &r) { r.token[0] ^= 1; });
    refused(EACCES, "the secret for a token",
            [&](auto &r) { std::memcpy(r.token, guest.created.secret, sizeof r.token); });
    refused(ENOENT, "the id of an ioas", [&](auto &r) { r.hwpt = guest.ioas; });
    refused(EINVAL, "no thread", [](auto &r) { r.threads = 0; });
    refused(EINVAL, "65 threads", [](auto &r) { r.threads = DR_DEVICE_THREADS_MAX + 1; });
    refused(EINVAL, "4097 pins", [](auto &r) { r.pins = DR_DEVICE_PINS_MAX + 1; });
    refused(EINVAL, "2^32 pins in all", [](auto &r) {
        r.threads = 64;
        r.pins = 1u << 26;
    });
    refused(EINVAL, "an unknown flag", [](auto &r) { r.flags |= 4; });
    refused(EINVAL, "no format", [](auto &r) { r.formats = 0; });
    refused(EINVAL, "a format that is not the hwpt's", [](auto &r) { r.formats = DR_FORMAT_BIT(DR_FORMAT_VTDSS); });
    refused(EINVAL, "no name", [](auto &r) { r.name[0] = '\0'; });
    refused(EINVAL, "a name without an end", [](auto &r) { std::memset(r.name, 'n', sizeof r.name); });
    refused(EINVAL, "a name with a newline", [](auto &r) { r.name[1] = '\n'; });
    refused(EINVAL, "a name with something behind it", [](auto &r) { r.name[sizeof r.name - 1] = 'n'; });
    refused(EINVAL, "a device that cannot track", [](auto &r) { r.flags = 0; });
    Peer old(c);
    old.hello(DR_FEATURE_OA_SPACE);
    old.refused("O-12", DR_DEVICE_ATTACH, guest.attach_request(), EOPNOTSUPP, "without the summary feature");

    Device device(c, guest);
    device.enter();
    device.refused("O-13", DR_DEVICE_DETACH, dr_empty{}, EBUSY, "inside a section");
    device.leave();
    device.detach();
}

void life(Context &c)
{
    auto guest = std::make_unique<TrackedGuest>(c);
    Device device(c, *guest);
    const dr_device_attach request = guest->attach_request();
    guest.reset();
    c.expect(device.hangs_up(), "O-16", "a device whose front-end has closed its connection", c.nothing(),
             "the connection closed");
    int error = 0;
    for (int i = 0; i < 100 && error == 0; ++i, std::this_thread::sleep_for(10ms)) {
        Peer late(c);
        late.hello();
        error = late.call(DR_DEVICE_ATTACH, request).error();
    }
    c.expect(error == EACCES, "O-15", "DEVICE_ATTACH to a guest that is gone",
             error == 0 ? "it was done" : fmt::format("refused with {}", error_name(error)), "EACCES");
}

// A successor, or the same front-end whose connection broke.
void takeover(Context &c)
{
    TrackedGuest guest(c);
    dr_guest_create request = new_guest(4);
    for (const std::uint32_t flag : {DR_GUEST_TAKE, DR_GUEST_AGAIN}) {
        Peer stranger(c);
        stranger.hello();
        request.flags = flag;
        stranger.refused("O-18", DR_GUEST_CREATE, request, ENOENT, fmt::format("flag {:#x}, nobody's secret", flag));
    }
    Peer successor(c);
    successor.hello();
    request = guest.created;
    request.flags = DR_GUEST_TAKE;
    const auto info = successor.get<dr_guest>(DR_GUEST_CREATE, request, {}, nullptr, 4);
    c.expect(std::memcmp(info.token, guest.info.token, sizeof info.token) == 0, "O-17", "a guest that is taken over",
             "another token", "its token");
    c.expect(guest.hangs_up(), "O-17", "the front-end whose guest was taken over", c.nothing(),
             "the connection closed");

    // The reply is lost, and the request comes again.
    const auto twice = [&](dr_request number, const Bytes &payload, std::uint32_t sequence, std::size_t required) {
        std::array<Reply, 2> replies;
        for (Reply &reply : replies) {
            successor.send(Peer::message(number, payload, sequence));
            reply = successor.receive(number, sequence, required, 0);
        }
        c.expect(replies[0].payload == replies[1].payload && replies[0].error() == 0, "O-19",
                 fmt::format("{} twice with one sequence", request_name(number)), replies[1].outcome(),
                 replies[0].outcome());
        return std::move(replies[0]);
    };
    const auto ioas =
        twice(DR_IOAS_ALLOC, payload_of(dr_empty{}), info.sequence + 1, sizeof(dr_object)).as<dr_object>();
    twice(DR_DESTROY, payload_of(ioas), info.sequence + 2, sizeof(dr_empty));
}

// Its connection is closed and its process goes on.
void returns(Context &c)
{
    TrackedGuest guest(c);
    const dr_device_attach request = guest.attach_request();
    std::array<dr_device, 2> devices;
    for (dr_device &device : devices) {
        Peer peer(c);
        peer.hello();
        const Reply reply = peer.call(DR_DEVICE_ATTACH, request);
        c.need(!reply.refused(), "O-20", "DEVICE_ATTACH", reply.outcome(), "it done");
        device = reply.as<dr_device>();
    }
    c.expect(devices[0].id == devices[1].id, "O-20", "DEVICE_ATTACH again with one key",
             fmt::format("device {}", devices[1].id), fmt::format("device {}", devices[0].id));
}

void destroys(Context &c)
{
    dr_guest_create request = new_guest(4);
    request.linger_ms = 60'000;
    Peer front_end(c);
    front_end.hello();
    front_end.get<dr_guest>(DR_GUEST_CREATE, request, {}, nullptr, 4);
    front_end.get<dr_empty>(DR_GUEST_DESTROY, dr_empty{});
    request.flags = DR_GUEST_TAKE;
    Peer late(c);
    late.hello();
    late.refused("O-21", DR_GUEST_CREATE, request, ENOENT, "the secret of a guest that was destroyed");
}

std::string text_of(const dr_hwpt_status &s)
{
    return fmt::format("format {}, flags {:#x}, {} devices, {} in the way", s.format, s.flags, s.devices, s.in_the_way);
}

void capabilities(Context &c)
{
    TrackedGuest guest(c, [](auto &r) { r.flags = DR_HWPT_DIRTY_OPTIONAL; });
    guest.enable(false);
    std::vector<std::unique_ptr<Peer>> devices;
    const auto attach = [&](const dr_device_attach &request) {
        Peer &device = *devices.emplace_back(std::make_unique<Peer>(c));
        device.hello();
        const Reply reply = device.call(DR_DEVICE_ATTACH, request);
        c.need(!reply.refused(), "O-24", "DEVICE_ATTACH to an hwpt that is optional and not enabled", reply.outcome(),
               "it done");
        return reply.as<dr_device>().id;
    };
    const auto expect_status = [&](std::uint32_t flags, std::uint32_t attached, std::uint32_t in_the_way,
                                   const char *when) {
        const dr_hwpt_status wanted{0, DR_FORMAT_AMDV1, flags, attached, in_the_way};
        const auto got = guest.get<dr_hwpt_status>(DR_HWPT_STATUS, dr_object{0, guest.hwpt});
        c.expect(text_of(got) == text_of(wanted), "O-23", fmt::format("HWPT_STATUS {}", when), text_of(got),
                 text_of(wanted));
    };
    const auto expect_info = [&](std::uint32_t above, std::uint32_t id, const dr_device_attach &declared) {
        const auto got = guest.get<dr_device_info>(DR_DEVICE_INFO, dr_object{0, above});
        c.expect(got.id == id && got.hwpt == guest.hwpt && got.flags == declared.flags &&
                     got.formats == declared.formats && std::memcmp(got.name, declared.name, sizeof got.name) == 0,
                 "O-22", fmt::format("DEVICE_INFO of the device above {}", above),
                 fmt::format("device {} of hwpt {}, flags {:#x}, formats {:#x}, another name perhaps", got.id, got.hwpt,
                             got.flags, got.formats),
                 fmt::format("device {} of hwpt {}, flags {:#x}, formats {:#x}, \"{}\"", id, guest.hwpt, declared.flags,
                             declared.formats, declared.name));
    };
    guest.refused("O-22", DR_DEVICE_INFO, dr_object{0, 0}, ENOENT, "without a device");
    guest.refused("O-23", DR_HWPT_STATUS, dr_object{0, guest.ioas}, ENOENT, "of an ioas");
    const dr_device_attach able = guest.attach_request();
    dr_device_attach unable = guest.attach_request();
    unable.flags = 0;
    const std::uint32_t first = attach(able);
    expect_status(DR_TRACKING_SUPPORTED, 1, 0, "with a device that can track");
    const std::uint32_t second = attach(unable);
    expect_info(0, first, able);
    expect_info(first, second, unable);
    guest.refused("O-22", DR_DEVICE_INFO, dr_object{0, second}, ENOENT, "above the last device");
    expect_status(0, 2, second, "with one that cannot");
    guest.expect("O-26", command(DR_OP_ENABLE, guest.hwpt), -ENODEV, "ENABLE with a device that cannot track");
    guest.expect("O-26", command(DR_OP_DISABLE, guest.hwpt), -EALREADY, "DISABLE after that");
    devices.back()->get<dr_empty>(DR_DEVICE_DETACH, dr_empty{});
    guest.enable(true);
    expect_status(DR_TRACKING_SUPPORTED | DR_TRACKING_ENABLED, 1, 0, "when it is enabled");
    unable.key = new_key();
    devices.back()->refused("O-25", DR_DEVICE_ATTACH, unable, EINVAL,
                            "a device that cannot track, while it is enabled");
}

const Check checks[] = {
    {"guests", guests, {"O-1", "O-2"}},
    {"MEMORY_ADD", memory, {"O-3"}},
    {"HWPT_ALLOC and RING_GET", hwpts, {"O-4", "O-5", "O-6", "F-17"}},
    {"DESTROY", destroy, {"O-7", "O-8", "O-9", "O-10"}},
    {"commands in flight at a DESTROY", in_flight, {"O-11", "Q-17"}},
    {"DEVICE_ATTACH and DEVICE_DETACH", attach, {"O-12", "O-13"}},
    {"the end of a guest", life, {"O-15", "O-16"}},
    {"a guest taken over", takeover, {"O-17", "O-18", "O-19"}},
    {"a device that comes back", returns, {"O-20"}},
    {"GUEST_DESTROY", destroys, {"O-21"}},
    {"capabilities", capabilities, {"O-22", "O-23", "O-24", "O-25", "O-26"}},
};

} // namespace

std::span<const Check> object_checks()
{
    return checks;
}

} // namespace dirtyring::check
