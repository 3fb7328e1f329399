// dirtyringd and requests: what each refuses and with which errno, as ring/control.h says.
#include "tests/service/service_peers.hpp"

#include <sys/resource.h>

namespace dirtyring::test {
namespace {

// ---- requests -------------------------------------------------------------------------------------------------------

// A connection on which a request is in place, and the request.
struct Place {
    std::unique_ptr<Peer> peer;
    Bytes payload;
    std::vector<Fd> fds;
};

using MakePlace = Place (*)(const Daemon &);

struct RequestCase {
    dr_request request;
    MakePlace make;

    friend void PrintTo(const RequestCase &c, std::ostream *out) { *out << c.request; }
};

Place hello_place(const Daemon &daemon)
{
    return {std::make_unique<Peer>(daemon), payload_of(dr_hello{0, 1, 0}), {}};
}

Place guest_create_place(const Daemon &daemon)
{
    auto peer = std::make_unique<Peer>(daemon);
    peer->hello();
    return {std::move(peer), payload_of(new_guest(4)), {}};
}

Place memory_add_place(const Daemon &daemon)
{
    Place place{std::make_unique<RawGuest>(daemon), payload_of(dr_memory_region{0, 0, 0, page, 0}), {}};
    place.fds.push_back(memory_file(page));
    return place;
}

Place ioas_alloc_place(const Daemon &daemon)
{
    return {std::make_unique<RawGuest>(daemon), payload_of(dr_empty{}), {}};
}

Place hwpt_alloc_place(const Daemon &daemon)
{
    auto guest = std::make_unique<RawGuest>(daemon);
    const auto ioas = guest->get<dr_object>(DR_IOAS_ALLOC, dr_empty{}).id;
    return {std::move(guest), payload_of(RawGuest::hwpt_request(ioas)), {}};
}

Place ring_get_place(const Daemon &daemon)
{
    auto guest = std::make_unique<TrackedGuest>(daemon);
    const dr_ring_get request{0, guest->hwpt, 0};
    return {std::move(guest), payload_of(request), {}};
}

Place destroy_place(const Daemon &daemon)
{
    auto guest = std::make_unique<TrackedGuest>(daemon);
    const dr_object request{0, guest->hwpt};
    return {std::move(guest), payload_of(request), {}};
}

Place device_attach_place(const Daemon &daemon)
{
    auto device = std::make_unique<RawDevice>(daemon);
    const dr_device_attach request = device->request();
    return {std::move(device), payload_of(request), {}};
}

Place device_detach_place(const Daemon &daemon)
{
    auto device = std::make_unique<RawDevice>(daemon);
    device->get<dr_device>(DR_DEVICE_ATTACH, device->request());
    return {std::move(device), payload_of(dr_empty{}), {}};
}

class ServiceRequest : public testing::TestWithParam<RequestCase>
{
  protected:
    Reply call(Place &place, const Bytes &payload)
    {
        std::vector<int> fds;
        for (const Fd &fd : place.fds)
            fds.push_back(fd.get());
        return place.peer->call_bytes(GetParam().request, payload, fds);
    }
    static void state_size(Bytes &payload, std::size_t size)
    {
        const auto word = static_cast<std::uint32_t>(size);
        std::memcpy(payload.data(), &word, sizeof word);
    }

    Daemon daemon;
    Place place = GetParam().make(daemon);
};

INSTANTIATE_TEST_SUITE_P(
    All, ServiceRequest,
    testing::Values(RequestCase{DR_HELLO, hello_place}, RequestCase{DR_GUEST_CREATE, guest_create_place},
                    RequestCase{DR_MEMORY_ADD, memory_add_place}, RequestCase{DR_IOAS_ALLOC, ioas_alloc_place},
                    RequestCase{DR_HWPT_ALLOC, hwpt_alloc_place}, RequestCase{DR_RING_GET, ring_get_place},
                    RequestCase{DR_DESTROY, destroy_place}, RequestCase{DR_DEVICE_ATTACH, device_attach_place},
                    RequestCase{DR_DEVICE_DETACH, device_detach_place}, RequestCase{DR_GUEST_DESTROY, ioas_alloc_place},
                    RequestCase{DR_HWPT_STATUS, destroy_place}),
    [](const auto &tested) { return "Number" + std::to_string(tested.param.request); });

TEST_P(ServiceRequest, IsHeldToItsSizeAndDoneAfterRefusals)
{
    Bytes wrong_size = place.payload;
    state_size(wrong_size, wrong_size.size() + 4);
    expect_refused(call(place, wrong_size), EINVAL);
    if (place.payload.size() > sizeof(std::uint32_t)) {
        Bytes short_one(place.payload.begin(), place.payload.begin() + 4);
        state_size(short_one, short_one.size());
        expect_refused(call(place, short_one), EINVAL);
    }
    Bytes longer = place.payload;
    longer.resize(longer.size() + 9);
    state_size(longer, longer.size());
    longer.back() = std::byte{1};
    expect_refused(call(place, longer), E2BIG);
    longer.back() = std::byte{0};
    expect_done(call(place, longer));
}

TEST_P(ServiceRequest, IsRefusedOnAConnectionOfAnotherKind)
{
    RawGuest front_end(daemon);
    RawDevice device(daemon);
    device.get<dr_device>(DR_DEVICE_ATTACH, device.request());
    const std::set<dr_request> of_front_ends{DR_MEMORY_ADD, DR_IOAS_ALLOC,    DR_HWPT_ALLOC, DR_RING_GET,
                                             DR_DESTROY,    DR_GUEST_DESTROY, DR_HWPT_STATUS};
    if (of_front_ends.count(GetParam().request) != 0 || GetParam().request == DR_GUEST_CREATE) {
        expect_refused(device.call_bytes(GetParam().request, place.payload), EPROTO);
    }
    if (GetParam().request == DR_DEVICE_ATTACH || GetParam().request == DR_DEVICE_DETACH) {
        expect_refused(front_end.call_bytes(GetParam().request, place.payload), EPROTO);
    }
}

TEST(ServiceGuestCreate, WantsAPowerOfTwoOfEntries)
{
    Daemon daemon;
    Peer peer(daemon);
    peer.hello();
    for (const std::uint32_t entries : {0u, 1u, 3u, 100u, 8192u, 1u << 31, UINT32_MAX}) {
        SCOPED_TRACE(entries);
        expect_refused(peer.call(DR_GUEST_CREATE, new_guest(entries)), EINVAL);
    }
    expect_done(peer.call(DR_GUEST_CREATE, new_guest(DR_COMMAND_CAPACITY_MAX)));
}

TEST(ServiceGuestCreate, OneForAConnection)
{
    Daemon daemon;
    RawGuest guest(daemon);
    expect_refused(guest.call(DR_GUEST_CREATE, new_guest(4)), EBUSY);
}

TEST(ServiceGuestCreate, GivesEachGuestTokensOfItsOwn)
{
    Daemon daemon;
    RawGuest a(daemon);
    RawGuest b(daemon);
    std::set<Bytes> tokens{bytes_of(a.info.token), bytes_of(b.info.token), bytes_of(a.created.secret),
                           bytes_of(b.created.secret), Bytes(DR_TOKEN_BYTES)};
    EXPECT_EQ(tokens.size(), 5u);
}

TEST(ServiceGuestCreate, WantsASecretAndFlagsThatItKnows)
{
    Daemon daemon;
    Peer peer(daemon);
    peer.hello();
    dr_guest_create request = new_guest(4);
    request.flags = 4;
    expect_refused(peer.call(DR_GUEST_CREATE, request), EINVAL);
    request.flags = DR_GUEST_TAKE;
    expect_refused(peer.call(DR_GUEST_CREATE, request), ENOENT);
    request = {};
    request.command_entries = 4;
    expect_refused(peer.call(DR_GUEST_CREATE, request), EINVAL);
}

TEST(ServiceMemoryAdd, WantsWholePagesThatDoNotWrap)
{
    Daemon daemon;
    RawGuest guest(daemon);
    const Fd memory = memory_file(page);
    const dr_memory_region wrong[] = {
        {0, 1, 0, page, 0},
        {0, 0, 1, page, 0},
        {0, 0, 0, page + 1, 0},
        {0, 0, 0, page, 1},
        {0, 0, 0, 0, 0},
        {0, 0, ~0ull << 12, 2 * page, 0},
        {0, 0, 0, page, ~0ull << 12},
        {0, 0, page, ~0ull << 12, 0},
    };
    for (const dr_memory_region &region : wrong) {
        SCOPED_TRACE(testing::Message() << "oa " << region.oa << " length " << region.length << " offset "
                                        << region.offset);
        expect_refused(guest.call(DR_MEMORY_ADD, region, {memory.get()}), EINVAL);
    }
}

TEST(ServiceMemoryAdd, ThatOverlapsIsRefused)
{
    Daemon daemon;
    RawGuest guest(daemon);
    const Fd memory = memory_file(16 * page);
    guest.add_memory(4 * page, 4 * page, memory);
    for (const auto &[oa, length] : {std::pair(4 * page, 4 * page),
                                     {0 * page, 5 * page},
                                     {7 * page, page},
                                     {5 * page, page},
                                     {0 * page, 16 * page}})
        expect_refused(guest.call(DR_MEMORY_ADD, dr_memory_region{0, 0, oa, length, 0}, {memory.get()}), EEXIST);
    guest.add_memory(0, 4 * page, memory);
    guest.add_memory(8 * page, 4 * page, memory);
}

TEST(ServiceMemoryAdd, EndsAtTheMostRegions)
{
    Daemon daemon;
    RawGuest guest(daemon);
    const Fd memory = memory_file(page);
    for (std::uint64_t i = 0; i < DR_GUEST_REGIONS_MAX; ++i)
        guest.add_memory(2 * i * page, page, memory);
    expect_refused(guest.call(DR_MEMORY_ADD, dr_memory_region{0, 0, 1000 * page, page, 0}, {memory.get()}), ENOSPC);
}

TEST(ServiceMemoryAdd, ComesBeforeTheFirstDevice)
{
    Daemon daemon;
    RawDevice device(daemon);
    device.get<dr_device>(DR_DEVICE_ATTACH, device.request());
    const dr_memory_region more{0, 0, 1ull << 30, page, 0};
    const Fd memory = memory_file(page);
    expect_refused(device.guest.call(DR_MEMORY_ADD, more, {memory.get()}), EBUSY);
    device.get<dr_empty>(DR_DEVICE_DETACH, dr_empty{});
    expect_done(device.guest.call(DR_MEMORY_ADD, more, {memory.get()}));
}

TEST(ServiceIoasAlloc, EndsAtTheMostObjectsAndGoesOnAfterADestroy)
{
    Daemon daemon;
    RawGuest guest(daemon);
    Reply reply;
    std::uint32_t last = 0;
    for (int i = 0; i < 1000 && (reply = guest.call(DR_IOAS_ALLOC, dr_empty{})).error() == 0; ++i)
        last = reply.as<dr_object>().id;
    expect_refused(reply, ENOSPC);
    guest.get<dr_empty>(DR_DESTROY, dr_object{0, last});
    EXPECT_NE(guest.get<dr_object>(DR_IOAS_ALLOC, dr_empty{}).id, last);
}

class ServiceHwptAlloc : public testing::Test
{
  protected:
    void expect(int error, const std::function<void(dr_hwpt_alloc &)> &change)
    {
        dr_hwpt_alloc request = RawGuest::hwpt_request(ioas);
        change(request);
        expect_refused(guest.call(DR_HWPT_ALLOC, request), error);
    }

    Daemon daemon;
    RawGuest guest{daemon};
    std::uint32_t ioas = guest.get<dr_object>(DR_IOAS_ALLOC, dr_empty{}).id;
};

// However early descriptors run out: refused, nothing half done, and made once there are some.
TEST_F(ServiceHwptAlloc, FailsWholeWhenDescriptorsRunOut)
{
    const std::size_t before = daemon.settled_descriptors();
    rlimit usual{};
    ASSERT_EQ(::prlimit(daemon.process().pid(), RLIMIT_NOFILE, nullptr, &usual), 0);
    unsigned refused = 0;
    for (rlim_t descriptors = before - 2;; ++descriptors) {
        const rlimit few{descriptors, usual.rlim_max};
        ASSERT_EQ(::prlimit(daemon.process().pid(), RLIMIT_NOFILE, &few, nullptr), 0);
        const Reply reply = guest.call(DR_HWPT_ALLOC, RawGuest::hwpt_request(ioas));
        ASSERT_EQ(::prlimit(daemon.process().pid(), RLIMIT_NOFILE, &usual, nullptr), 0);
        ASSERT_FALSE(reply.closed);
        if (reply.error() == 0)
            break;
        ++refused;
        expect_refused(reply, EMFILE);
        EXPECT_EQ(daemon.settled_descriptors(), before) << descriptors;
        ASSERT_LT(descriptors, before + 100);
    }
    EXPECT_GT(refused, 5u);
}

TEST_F(ServiceHwptAlloc, WantsFieldsWithinTheirRange)
{
    for (const std::uint32_t v : {0u, 20u, 49u, 64u, UINT32_MAX})
        expect(EINVAL, [&](auto &r) { r.aperture_lg2 = v; });
    for (const std::uint32_t v : {1u, 2u, 7u, UINT32_MAX}) // 2^32 bytes
        expect(EINVAL, [&](auto &r) { r.levels = v; });
    for (const std::uint32_t v : {0u, 3u, 8u, 128u, 1u << 31, UINT32_MAX}) // slices of a space of 4 GiB
        expect(EINVAL, [&](auto &r) { r.shards = v; });
    for (const std::uint32_t v : {0u, 11u, 13u, 20u, 39u, UINT32_MAX})
        expect(EINVAL, [&](auto &r) { r.leaf_lg2_max = v; });
    for (const std::uint32_t v : {2u, UINT32_MAX})
        expect(EINVAL, [&](auto &r) { r.space = v; });
    for (const std::uint32_t v : {0u, 1u, 4u, 9u, DR_CAPACITY_MAX * 2, UINT32_MAX})
        expect(EINVAL, [&](auto &r) { r.ring_entries = v; });
    for (const std::uint32_t v : {2u, 17u, 18u, 32u, UINT32_MAX})
        expect(EINVAL, [&](auto &r) { r.flags = v; });
    expect(EINVAL, [](auto &r) {
        r.flags = DR_HWPT_DIRTY_OPTIONAL;
        r.format = DR_FORMAT_SMMUV3_S2; // its devices set Dirty from the start
    });
    for (const std::uint32_t v : {3u, UINT32_MAX})
        expect(EINVAL, [&](auto &r) { r.split = v; });
    for (const std::uint32_t v : {1u, UINT32_MAX}) // of AMD v1
        expect(EINVAL, [&](auto &r) { r.bbml = v; });
    expect_done(guest.call(DR_HWPT_ALLOC, RawGuest::hwpt_request(ioas)));
}

TEST_F(ServiceHwptAlloc, RefusesFormatsItDoesNotKnow)
{
    for (const std::uint32_t v : {0u, 5u, UINT32_MAX})
        expect(EOPNOTSUPP, [&](auto &r) { r.format = v; });
    dr_hwpt_alloc request = RawGuest::hwpt_request(ioas);
    request.format = 5;
    EXPECT_THAT(guest.call(DR_HWPT_ALLOC, request).sentence(),
                testing::AllOf(testing::HasSubstr("5"), testing::HasSubstr("vtdss (2)")));
}

// The number of levels is the format's affair.
TEST_F(ServiceHwptAlloc, TakesTheLevelsOfEachFormat)
{
    struct Range {
        dr_format format;
        unsigned min;
        unsigned max;
    };
    for (const Range range : {Range{DR_FORMAT_AMDV1, 1, 6}, Range{DR_FORMAT_VTDSS, 3, 5},
                              Range{DR_FORMAT_SMMUV3_S2, 2, 4}, Range{DR_FORMAT_SMMUV3_S1, 2, 4}}) {
        for (unsigned levels = 0; levels <= 7; ++levels) {
            dr_hwpt_alloc request = RawGuest::hwpt_request(ioas);
            request.format = range.format;
            request.aperture_lg2 = 21;
            request.levels = levels;
            if (levels != 0 && (levels < range.min || levels > range.max)) {
                expect_refused(guest.call(DR_HWPT_ALLOC, request), EINVAL);
                continue;
            }
            const auto made = guest.get<dr_hwpt>(DR_HWPT_ALLOC, request);
            EXPECT_EQ(made.slice_lg2, 21u);
            guest.get<dr_empty>(DR_DESTROY, dr_object{0, made.id});
        }
    }
}

TEST_F(ServiceHwptAlloc, WantsAnIoas)
{
    expect(ENOENT, [&](auto &r) { r.ioas = ioas + 1; });
    const std::uint32_t hwpt = guest.get<dr_hwpt>(DR_HWPT_ALLOC, RawGuest::hwpt_request(ioas)).id;
    expect(ENOENT, [&](auto &r) { r.ioas = hwpt; });
}

TEST_F(ServiceHwptAlloc, OneForAnIoas)
{
    guest.get<dr_hwpt>(DR_HWPT_ALLOC, RawGuest::hwpt_request(ioas));
    expect(EBUSY, [](auto &) {});
}

TEST_F(ServiceHwptAlloc, SaysHowTheSpaceIsSliced)
{
    dr_hwpt_alloc request = RawGuest::hwpt_request(ioas);
    request.aperture_lg2 = 39;
    request.shards = 4;
    const auto reply = guest.get<dr_hwpt>(DR_HWPT_ALLOC, request);
    EXPECT_EQ(reply.shards, 4u);
    EXPECT_EQ(reply.slice_lg2, 37u);
    for (std::uint32_t shard = 0; shard < 4; ++shard) {
        const RawRing ring = guest.ring(reply.id, shard);
        EXPECT_EQ(ring.producer().header.start, std::uint64_t{shard} << 37);
        EXPECT_EQ(ring.producer().header.last, ((std::uint64_t{shard} + 1) << 37) - 1);
        EXPECT_EQ(ring.producer().header.capacity, 64u);
    }
}

TEST_F(ServiceHwptAlloc, TakesTheLargest)
{
    dr_hwpt_alloc request = RawGuest::hwpt_request(ioas);
    request.aperture_lg2 = 48;
    request.shards = DR_SHARDS_MAX;
    request.leaf_lg2_max = 30;
    EXPECT_EQ(guest.get<dr_hwpt>(DR_HWPT_ALLOC, request).shards, DR_SHARDS_MAX);
}

TEST(ServiceRingGet, WantsAShardThatIsThere)
{
    Daemon daemon;
    TrackedGuest guest(daemon);
    expect_refused(guest.call(DR_RING_GET, dr_ring_get{0, guest.hwpt, 1}), ENOENT);
    expect_refused(guest.call(DR_RING_GET, dr_ring_get{0, guest.hwpt, UINT32_MAX}), ENOENT);
    expect_refused(guest.call(DR_RING_GET, dr_ring_get{0, guest.hwpt + 1, 0}), ENOENT);
    expect_refused(guest.call(DR_RING_GET, dr_ring_get{0, guest.ioas, 0}), ENOENT);
}

TEST(ServiceRingGet, WantsDirtyTracking)
{
    Daemon daemon;
    TrackedGuest guest(daemon, [](auto &r) { r.flags = 0; });
    expect_refused(guest.call(DR_RING_GET, dr_ring_get{0, guest.hwpt, 0}), EOPNOTSUPP);
}

TEST(ServiceDestroy, WantsAnObjectThatIsFree)
{
    Daemon daemon;
    RawDevice device(daemon);
    TrackedGuest &guest = device.guest;
    expect_refused(guest.call(DR_DESTROY, dr_object{0, 0}), ENOENT);
    expect_refused(guest.call(DR_DESTROY, dr_object{0, 999}), ENOENT);
    expect_refused(guest.call(DR_DESTROY, dr_object{0, guest.ioas}), EBUSY);
    device.get<dr_device>(DR_DEVICE_ATTACH, device.request());
    expect_refused(guest.call(DR_DESTROY, dr_object{0, guest.hwpt}), EBUSY);
    device.get<dr_empty>(DR_DEVICE_DETACH, dr_empty{});
    expect_done(guest.call(DR_DESTROY, dr_object{0, guest.hwpt}));
    expect_refused(guest.call(DR_DESTROY, dr_object{0, guest.hwpt}), ENOENT);
    expect_done(guest.call(DR_DESTROY, dr_object{0, guest.ioas}));
}

TEST(ServiceDestroy, OfAnotherGuestsObjectsIsRefused)
{
    Daemon daemon;
    TrackedGuest guest(daemon);
    RawGuest other(daemon);
    expect_refused(other.call(DR_DESTROY, dr_object{0, guest.hwpt}), ENOENT);
    expect_refused(other.call(DR_RING_GET, dr_ring_get{0, guest.hwpt, 0}), ENOENT);
}

TEST(ServiceDeviceAttach, WantsTheTokenOfAGuest)
{
    Daemon daemon;
    RawDevice device(daemon);
    for (std::size_t i = 0; i < DR_TOKEN_BYTES; ++i) {
        dr_device_attach request = device.request();
        request.token[i] ^= 1;
        expect_refused(device.call(DR_DEVICE_ATTACH, request), EACCES);
    }
    dr_device_attach request = device.request();
    std::memcpy(request.token, device.guest.created.secret, sizeof request.token);
    expect_refused(device.call(DR_DEVICE_ATTACH, request), EACCES);
    expect_done(device.call(DR_DEVICE_ATTACH, device.request()));
}

TEST(ServiceDeviceAttach, WantsAnHwptOfThatGuest)
{
    Daemon daemon;
    RawDevice device(daemon);
    for (const std::uint32_t hwpt : {0u, device.guest.ioas, device.guest.hwpt + 1}) {
        dr_device_attach request = device.request();
        request.hwpt = hwpt;
        expect_refused(device.call(DR_DEVICE_ATTACH, request), ENOENT);
    }
}

TEST(ServiceDeviceAttach, WantsOneTo64ThreadsAndAKey)
{
    Daemon daemon;
    RawDevice device(daemon);
    for (const std::uint32_t threads : {0u, DR_DEVICE_THREADS_MAX + 1, UINT32_MAX}) {
        dr_device_attach request = device.request();
        request.threads = threads;
        expect_refused(device.call(DR_DEVICE_ATTACH, request), EINVAL);
    }
    dr_device_attach request = device.request();
    request.key = 0;
    expect_refused(device.call(DR_DEVICE_ATTACH, request), EINVAL);
    request = device.request();
    request.threads = DR_DEVICE_THREADS_MAX;
    expect_done(device.call(DR_DEVICE_ATTACH, request));
}

TEST(ServiceDeviceAttach, RefusesFlagsItDoesNotKnow)
{
    Daemon daemon;
    RawDevice device(daemon);
    dr_device_attach request = device.request();
    request.flags |= 4;
    expect_refused(device.call(DR_DEVICE_ATTACH, request), EINVAL);
}

TEST(ServiceDeviceAttach, RefusesADeviceThatCannotTrackWhereTrackingIsRequired)
{
    Daemon daemon;
    RawDevice device(daemon);
    dr_device_attach request = device.request();
    request.flags = 0;
    expect_refused(device.call(DR_DEVICE_ATTACH, request), EINVAL);

    TrackedGuest untracked(daemon, [](auto &r) { r.flags = 0; });
    request.hwpt = untracked.hwpt;
    std::memcpy(request.token, untracked.info.token, sizeof request.token);
    expect_done(device.call(DR_DEVICE_ATTACH, request));
}

TEST(ServiceDeviceAttach, WantsTheSummaryFeature)
{
    Daemon daemon;
    RawDevice device(daemon);
    Peer old(daemon);
    old.get<dr_hello>(DR_HELLO, dr_hello{0, 1, DR_FEATURE_OA_SPACE});
    expect_refused(old.call(DR_DEVICE_ATTACH, device.request()), EOPNOTSUPP);
}

TEST(ServiceDeviceAttach, OneForAConnection)
{
    Daemon daemon;
    RawDevice device(daemon);
    expect_done(device.call(DR_DEVICE_ATTACH, device.request()));
    expect_refused(device.call(DR_DEVICE_ATTACH, device.request()), EBUSY);
}

TEST(ServiceDeviceAttach, EndsAtTheMostDevicesAndGoesOnAfterADetach)
{
    Daemon daemon;
    RawDevice first(daemon);
    std::vector<std::unique_ptr<Peer>> devices;
    Reply reply;
    do {
        devices.push_back(std::make_unique<Peer>(daemon));
        devices.back()->hello();
        reply = devices.back()->call(DR_DEVICE_ATTACH, first.request());
    } while (reply.error() == 0 && devices.size() < 500);
    expect_refused(reply, ENOSPC);
    expect_done(devices.front()->call(DR_DEVICE_DETACH, dr_empty{}));
    expect_done(devices.back()->call(DR_DEVICE_ATTACH, first.request()));
}

} // namespace
} // namespace dirtyring::test
