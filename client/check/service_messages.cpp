// Areas F and H: messages and the handshake.
#include "client/check/device.hpp"
#include "client/check/service_checks.hpp"

#include <fcntl.h>
#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <unistd.h>

namespace dirtyring::check {
namespace {

// Until what was sent has been read, but not for long: a service may leave it there until more has come.
void let_it_read(const Peer &peer)
{
    int unread = 0;
    for (int i = 0; i < 50 && ::ioctl(peer.socket(), SIOCOUTQ, &unread) == 0 && unread > 0; ++i)
        std::this_thread::sleep_for(200us);
}

void pieces(Context &c)
{
    Peer peer(c);
    for (const std::byte b : Peer::message(DR_HELLO, payload_of(dr_hello{0, DR_PROTOCOL_VERSION, 0}), 7)) {
        peer.send({b});
        let_it_read(peer);
    }
    const Reply reply = peer.receive(DR_HELLO, 7, sizeof(dr_hello), 0);
    c.expect(!reply.refused(), "F-10", "HELLO byte by byte", reply.outcome(), "it done");
}

void order(Context &c)
{
    Peer peer(c);
    Bytes all = Peer::message(DR_HELLO, payload_of(dr_hello{0, DR_PROTOCOL_VERSION, 0}), 1);
    for (const Bytes &next :
         {Peer::message(DR_GUEST_CREATE, payload_of(new_guest(4)), 2), Peer::message(1000, payload_of(dr_empty{}), 3),
          Peer::message(DR_IOAS_ALLOC, payload_of(dr_empty{}), 4)})
        all.insert(all.end(), next.begin(), next.end());
    peer.send(all);
    peer.receive(DR_HELLO, 1, sizeof(dr_hello), 0);
    peer.receive(DR_GUEST_CREATE, 2, sizeof(dr_guest), 4);
    peer.receive(1000, 3, sizeof(dr_empty), 0);
    peer.receive(DR_IOAS_ALLOC, 4, sizeof(dr_object), 0);
    pollfd readable{peer.socket(), POLLIN, 0};
    c.expect(c.stays_false([&] { return ::poll(&readable, 1, 0) > 0; }), "F-4", "after four replies to four requests",
             "the service sent something more", "nothing");
}

void headers(Context &c)
{
    constexpr std::uint32_t version = DR_PROTOCOL_VERSION;
    constexpr dr_message_header wrong[] = {{DR_HELLO, 0, 16, 1},
                                           {DR_HELLO, 2, 16, 1},
                                           {DR_HELLO, 3, 16, 1},
                                           {DR_HELLO, version | DR_MESSAGE_REPLY, 16, 1},
                                           {DR_HELLO, version, 0, 1},
                                           {DR_HELLO, version, 3, 1},
                                           {DR_HELLO, version, DR_MESSAGE_MAX + 1, 1},
                                           {DR_HELLO, version, UINT32_MAX, 1}};
    Bystander bystander(c);
    for (const dr_message_header &h : wrong) {
        Peer peer(c);
        Bytes bytes(sizeof h);
        std::memcpy(bytes.data(), &h, sizeof h);
        peer.send(bytes);
        c.need(peer.hangs_up(), "F-9", fmt::format("a header with flags {:#x} and size {}", h.flags, h.size),
               c.nothing(), "the connection closed");
    }
    bystander.expect_undisturbed("headers that make no sense");
}

void unknown(Context &c)
{
    Peer peer(c);
    for (const std::uint32_t request : {0u, 999u, UINT32_MAX})
        peer.refused("F-11", peer.call_bytes(request, payload_of(dr_empty{})), EOPNOTSUPP,
                     fmt::format("request {}", request));
    const Reply reply = peer.call(DR_HELLO, dr_hello{0, DR_PROTOCOL_VERSION, 0});
    c.expect(!reply.refused(), "F-16", "HELLO after unknown requests", reply.outcome(), "it done");
}

// Wrong sizes are refused, and the right request is done afterwards, with zeroes behind it.
template <class In>
Reply hold_to_size(Context &c, Peer &peer, dr_request request, const In &in, const std::vector<int> &fds = {})
{
    const char *name = request_name(request);
    const Bytes right = payload_of(in);
    const auto sized = [&](std::size_t size, std::size_t stated) {
        Bytes bytes = right;
        bytes.resize(size);
        const auto word = static_cast<std::uint32_t>(stated);
        std::memcpy(bytes.data(), &word, sizeof word);
        return bytes;
    };
    peer.refused("F-12", peer.call_bytes(request, sized(right.size(), right.size() + 4), fds), EINVAL,
                 fmt::format("{} that states 4 bytes more than it has", name));
    if (right.size() > sizeof(dr_empty))
        peer.refused("F-12", peer.call_bytes(request, sized(sizeof(dr_empty), sizeof(dr_empty)), fds), EINVAL,
                     fmt::format("{} of 4 bytes", name));
    Bytes longer = sized(right.size() + 9, right.size() + 9);
    longer.back() = std::byte{1};
    peer.refused("F-13", peer.call_bytes(request, longer, fds), E2BIG,
                 fmt::format("{} with a byte of 1 behind it", name));
    longer.back() = std::byte{0};
    Reply reply = peer.call_bytes(request, longer, fds);
    c.expect(!reply.refused(), "F-13", fmt::format("{} with zeroes behind it", name), reply.outcome(), "it done");
    c.expect(!reply.refused(), "F-16", fmt::format("{} after refusals", name), reply.outcome(), "it done");
    return reply;
}

void sizes(Context &c)
{
    Peer peer(c);
    const Fd memory = memory_file(page);
    hold_to_size(c, peer, DR_HELLO, dr_hello{0, DR_PROTOCOL_VERSION, DR_FEATURES_ALL});
    const auto guest = hold_to_size(c, peer, DR_GUEST_CREATE, new_guest(4)).as<dr_guest>();
    hold_to_size(c, peer, DR_MEMORY_ADD, dr_memory_region{0, 0, 0, page, 0}, {memory.get()});
    const std::uint32_t ioas = hold_to_size(c, peer, DR_IOAS_ALLOC, dr_empty{}).as<dr_object>().id;
    const std::uint32_t hwpt = hold_to_size(c, peer, DR_HWPT_ALLOC, Guest::hwpt_request(ioas)).as<dr_hwpt>().id;
    hold_to_size(c, peer, DR_RING_GET, dr_ring_get{0, hwpt, 0});
    Peer device(c);
    device.hello();
    hold_to_size(c, device, DR_DEVICE_ATTACH, new_device(hwpt, guest.token));
    hold_to_size(c, peer, DR_DEVICE_INFO, dr_object{0, 0});
    hold_to_size(c, peer, DR_HWPT_STATUS, dr_object{0, hwpt});
    hold_to_size(c, device, DR_DEVICE_DETACH, dr_empty{});
    hold_to_size(c, peer, DR_DESTROY, dr_object{0, hwpt});
}

struct Pipe {
    Pipe()
    {
        int ends[2];
        if (::pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0)
            throw std::runtime_error("pipe");
        read_end = Fd(ends[0]);
        write_end = Fd(ends[1]);
    }
    Fd read_end;
    Fd write_end;
};

void descriptors(Context &c)
{
    const Fd memory = memory_file(page);
    Guest guest(c, 4);
    const dr_memory_region region{0, 0, 0, page, 0};
    Pipe pipe;
    guest.refused("F-14", DR_IOAS_ALLOC, dr_empty{}, EINVAL, "a descriptor where none is expected",
                  {pipe.write_end.get()});
    guest.refused("F-14", DR_MEMORY_ADD, region, EINVAL, "without a descriptor");
    guest.refused("F-14", DR_MEMORY_ADD, region, EINVAL, "2 descriptors", {memory.get(), pipe.write_end.get()});
    guest.refused("F-14", DR_MEMORY_ADD, region, EINVAL, "161 descriptors",
                  std::vector<int>(DR_MESSAGE_FDS_MAX + 1, pipe.write_end.get()));
    pipe.write_end = Fd();
    char byte = 0;
    c.expect(c.comes_true([&] { return ::read(pipe.read_end.get(), &byte, 1) == 0; }), "F-15",
             "the write end of a pipe in refused requests", fmt::format("it was still open after {}", c.nothing()),
             "closed");
    guest.add_memory(0, page, memory);
}

// ---- handshake ------------------------------------------------------------------------------------------------------

void hello(Context &c)
{
    for (std::uint32_t request = DR_GUEST_CREATE; request <= DR_HWPT_STATUS; ++request) {
        Peer peer(c);
        peer.refused("H-3", peer.call_bytes(request, payload_of(dr_empty{})), EPROTO,
                     fmt::format("{} before HELLO", request_name(request)));
    }
    Peer peer(c);
    peer.refused("H-4", DR_HELLO, dr_hello{0, 0, DR_FEATURES_ALL}, EPROTONOSUPPORT, "version 0");
    const auto agreed = peer.get<dr_hello>(DR_HELLO, dr_hello{0, 99, ~0ull});
    c.expect(agreed.version == DR_PROTOCOL_VERSION && (agreed.features & ~DR_FEATURES_ALL) == 0, "H-5",
             "HELLO of version 99 with all features",
             fmt::format("version {}, features {:#x}", agreed.version, agreed.features),
             fmt::format("version 1 and features within {:#x}", DR_FEATURES_ALL));
    peer.refused("H-6", DR_HELLO, dr_hello{0, DR_PROTOCOL_VERSION, 0}, EPROTO, "a second one");
    for (const std::uint64_t offered :
         {std::uint64_t{0}, std::uint64_t{DR_FEATURE_SUMMARY}, ~std::uint64_t{DR_FEATURE_SUMMARY}}) {
        Peer other(c);
        const auto got = other.get<dr_hello>(DR_HELLO, dr_hello{0, DR_PROTOCOL_VERSION, offered});
        c.expect(got.features == (offered & agreed.features), "H-5", fmt::format("HELLO with features {:#x}", offered),
                 fmt::format("features {:#x}", got.features), fmt::format("{:#x}", offered & agreed.features));
    }
}

void kinds(Context &c)
{
    TrackedGuest guest(c);
    Device device(c, guest);
    const Fd memory = memory_file(page);
    for (const std::uint32_t request :
         {DR_IOAS_ALLOC, DR_HWPT_ALLOC, DR_RING_GET, DR_DESTROY, DR_GUEST_CREATE, DR_DEVICE_INFO, DR_HWPT_STATUS})
        device.refused("H-6", device.call_bytes(request, payload_of(dr_empty{})), EPROTO,
                       fmt::format("{} on a device", request_name(request)));
    guest.refused("H-6", DR_DEVICE_ATTACH, guest.attach_request(), EPROTO, "on a front-end");
    guest.refused("H-6", DR_DEVICE_DETACH, dr_empty{}, EPROTO, "on a front-end");
    guest.refused("H-7", DR_GUEST_CREATE, new_guest(4), EBUSY, "on a front-end");
    device.refused("H-7", DR_DEVICE_ATTACH, guest.attach_request(), EBUSY, "on an attached device");
    device.detach();
    device.refused("H-6", DR_DEVICE_DETACH, dr_empty{}, EPROTO, "a second one");
}

const Check checks[] = {
    {"messages in pieces", pieces, {"F-10"}},
    {"several requests at once", order, {"F-1", "F-2", "F-3", "F-4", "F-5", "F-8"}},
    {"headers that make no sense", headers, {"F-9"}},
    {"unknown requests", unknown, {"F-6", "F-7", "F-11", "F-16"}},
    {"wrong sizes", sizes, {"F-12", "F-13", "F-16"}},
    {"wrong descriptors", descriptors, {"F-14", "F-15"}},
    {"HELLO", hello, {"H-3", "H-4", "H-5", "H-6"}},
    {"kinds of connections", kinds, {"H-6", "H-7"}},
};

} // namespace

std::span<const Check> message_checks()
{
    return checks;
}

} // namespace dirtyring::check
