// What devices say that they can do, and what becomes of those that cannot be tracked.
#include "tests/service/service_peers.hpp"

#include <thread>

namespace dirtyring::test {
namespace {

using testing::HasSubstr;

void optional(dr_hwpt_alloc &request)
{
    request.flags = DR_HWPT_DIRTY_OPTIONAL;
}

// As a device without Dirty bits asks.
dr_device_attach unable(const TrackedGuest &guest)
{
    dr_device_attach request = new_device(guest.hwpt, guest.info.token);
    request.flags = 0;
    return request;
}

class RawDeviceOf : public Peer
{
  public:
    RawDeviceOf(const Daemon &daemon, const dr_device_attach &request) : Peer(daemon)
    {
        hello();
        reply = call(DR_DEVICE_ATTACH, request);
    }
    void detach() { get<dr_empty>(DR_DEVICE_DETACH, dr_empty{}); }
    [[nodiscard]] std::uint32_t id() const { return reply.as<dr_device>().id; }

    Reply reply;
};

dr_hwpt_status status(TrackedGuest &guest)
{
    return guest.get<dr_hwpt_status>(DR_HWPT_STATUS, dr_object{0, guest.hwpt});
}

int enable(TrackedGuest &guest)
{
    return guest.run(command(DR_OP_ENABLE, guest.hwpt));
}

int disable(TrackedGuest &guest)
{
    return guest.run(command(DR_OP_DISABLE, guest.hwpt));
}

// ---- for each device ------------------------------------------------------------------------------------------------

TEST(ServiceDeviceInfo, TellsWhatEachDeviceDeclared)
{
    Daemon daemon;
    dirtyring_hwpt attributes{};
    attributes.untracked = 1;
    dirtyring_vm *raw = nullptr;
    check(dirtyring_connect(daemon.socket().c_str(), &raw));
    const Library vm(raw);
    std::uint32_t ioas = 0;
    std::uint32_t hwpt = 0;
    check(dirtyring_ioas_alloc(raw, &ioas));
    check(dirtyring_hwpt_alloc(raw, ioas, &attributes, &hwpt));
    struct dirtyring_device_info info {
    };
    EXPECT_EQ(dirtyring_device_info(raw, 0, &info), -ENOENT);

    std::vector<Device> devices;
    const auto attach = [&](const char *name, std::uint32_t cannot_track, std::uint32_t formats) {
        dirtyring_attach attach{};
        attach.token = dirtyring_token(raw);
        attach.hwpt = hwpt;
        attach.name = name;
        attach.cannot_track = cannot_track;
        attach.not_coherent = cannot_track;
        attach.formats = formats;
        dirtyring_device *device = nullptr;
        const int error = dirtyring_device_attach(daemon.socket().c_str(), &attach, &device);
        devices.emplace_back(device);
        return error;
    };
    ASSERT_EQ(attach("virtio-net 0000:00:03.0", 0, DR_FORMAT_BIT(DR_FORMAT_AMDV1)), 0);
    ASSERT_EQ(attach(nullptr, 1, 0), 0);
    EXPECT_EQ(attach("a name that has one character to", 0, 0), -EINVAL);
    ASSERT_EQ(attach("a name that needs all the bytes", 0, 0), 0);

    ASSERT_EQ(dirtyring_device_info(raw, 0, &info), 0);
    EXPECT_STREQ(info.name, "virtio-net 0000:00:03.0");
    EXPECT_EQ(info.hwpt, hwpt);
    EXPECT_EQ(info.pid, ::getpid());
    EXPECT_EQ(info.flags, DR_DEVICE_CAN_TRACK | DR_DEVICE_COHERENT);
    EXPECT_EQ(info.formats, DR_FORMAT_BIT(DR_FORMAT_AMDV1));
    const std::uint32_t first = info.id;
    ASSERT_EQ(dirtyring_device_info(raw, first, &info), 0);
    EXPECT_STREQ(info.name, "unnamed");
    EXPECT_EQ(info.flags, 0u);
    EXPECT_EQ(info.formats, DR_FORMAT_BIT(1) | DR_FORMAT_BIT(2) | DR_FORMAT_BIT(3) | DR_FORMAT_BIT(4));
    const std::uint32_t second = info.id;
    EXPECT_GT(second, first);
    ASSERT_EQ(dirtyring_device_info(raw, second, &info), 0);
    EXPECT_STREQ(info.name, "a name that needs all the bytes");
    EXPECT_EQ(dirtyring_device_info(raw, info.id, &info), -ENOENT);

    struct dirtyring_hwpt_status told {
    };
    ASSERT_EQ(dirtyring_hwpt_status(raw, hwpt, &told), 0);
    EXPECT_EQ(told.format, static_cast<unsigned>(DR_FORMAT_AMDV1));
    EXPECT_EQ(told.devices, 3u);
    EXPECT_EQ(told.in_the_way, second);
    EXPECT_EQ(told.supported, 0u);
    EXPECT_EQ(dirtyring_hwpt_status(raw, ioas, &told), -ENOENT);
    devices[0].reset();
    ASSERT_EQ(dirtyring_device_info(raw, 0, &info), 0);
    EXPECT_EQ(info.id, second);
}

TEST(ServiceCapabilities, AreCheckedWhenADeviceAttaches)
{
    Daemon daemon;
    RawDevice device(daemon);
    const auto refused = [&](const char *sentence, auto change) {
        dr_device_attach request = device.request();
        change(request);
        const Reply reply = device.call(DR_DEVICE_ATTACH, request);
        expect_refused(reply, EINVAL);
        EXPECT_THAT(reply.sentence(), HasSubstr(sentence));
    };
    refused("flags 0x4", [](auto &r) { r.flags = 4; });
    refused("walks no format", [](auto &r) { r.formats = 0; });
    refused("walks none that is known here; hwpt", [](auto &r) { r.formats = 1u << 31; });
    refused("walks vtdss (2), smmuv3s1 (4); hwpt 2 is in amdv1 (1)",
            [](auto &r) { r.formats = DR_FORMAT_BIT(DR_FORMAT_VTDSS) | DR_FORMAT_BIT(DR_FORMAT_SMMUV3_S1); });
    refused("name", [](auto &r) { std::memset(r.name, 0, sizeof r.name); });
    refused("name", [](auto &r) { std::memset(r.name, 'n', sizeof r.name); });
    refused("name", [](auto &r) { r.name[sizeof r.name - 1] = 'n'; });
    for (const int c : std::initializer_list<int>{'\n', '\r', '\t', 0x1b, 0x7f, 0x80, 0xff})
        refused("name", [c](auto &r) { r.name[1] = static_cast<char>(c); });
    expect_done(device.call(DR_DEVICE_ATTACH, device.request()));
}

TEST(ServiceCapabilities, VtdTablesAreTrackedWithCoherentWalksOnly)
{
    Daemon daemon;
    for (const auto &[format, flags, error] : {std::tuple{DR_FORMAT_AMDV1, DR_HWPT_DIRTY_TRACKING, 0},
                                               {DR_FORMAT_VTDSS, DR_HWPT_DIRTY_TRACKING, EINVAL},
                                               {DR_FORMAT_VTDSS, 0u, 0},
                                               {DR_FORMAT_VTDSS, DR_HWPT_DIRTY_OPTIONAL, 0}}) {
        TrackedGuest guest(daemon, [&, f = format, flag = flags](auto &r) {
            r.format = f;
            r.flags = flag;
        });
        dr_device_attach request = new_device(guest.hwpt, guest.info.token);
        request.flags = DR_DEVICE_CAN_TRACK;
        const RawDeviceOf device(daemon, request);
        EXPECT_EQ(device.reply.error(), error) << device.reply.sentence();
        if (error != 0) {
            EXPECT_THAT(device.reply.sentence(), HasSubstr("vtdss (2) only with coherent walks"));
        }
        if (flags == DR_HWPT_DIRTY_OPTIONAL) {
            EXPECT_EQ(enable(guest), -ENODEV);
        }
    }
}

TEST(ServiceCapabilities, AreThoseOfTheDeviceThatComesBack)
{
    Daemon daemon;
    TrackedGuest guest(daemon, optional);
    dr_device_attach request = unable(guest);
    const RawDeviceOf device(daemon, request);
    expect_done(device.reply);
    request.flags = DR_DEVICE_CAN_TRACK;
    expect_refused(RawDeviceOf(daemon, request).reply, EINVAL);
    request.flags = 0;
    const RawDeviceOf again(daemon, request);
    EXPECT_EQ(again.id(), device.id());
    EXPECT_EQ(status(guest).devices, 1u);
}

// ---- try and fail ---------------------------------------------------------------------------------------------------

TEST(ServiceOptionalTracking, IsRefusedWhileADeviceIsInTheWay)
{
    Daemon daemon;
    TrackedGuest guest(daemon, optional);
    const Device able = guest.attach();
    RawDeviceOf other(daemon, unable(guest));
    RawDeviceOf another(daemon, unable(guest));
    expect_done(other.reply);
    expect_done(another.reply);
    EXPECT_EQ(enable(guest), -ENODEV);
    EXPECT_EQ(disable(guest), -EALREADY);
    EXPECT_EQ(status(guest).in_the_way, other.id());
    other.detach();
    EXPECT_EQ(enable(guest), -ENODEV);
    EXPECT_EQ(status(guest).in_the_way, another.id());
    another.detach();
    EXPECT_EQ(status(guest).flags, DR_TRACKING_SUPPORTED);
    EXPECT_EQ(enable(guest), 0);
    EXPECT_EQ(status(guest).flags, DR_TRACKING_SUPPORTED | DR_TRACKING_ENABLED);
    EXPECT_EQ(enable(guest), -EALREADY);

    const Reply refused = another.call(DR_DEVICE_ATTACH, unable(guest));
    expect_refused(refused, EINVAL);
    EXPECT_THAT(refused.sentence(), HasSubstr("\"a test's\" cannot set Dirty bits"));
    const RawRing ring = guest.ring(guest.hwpt);
    dma_write(able, 7 * page);
    EXPECT_EQ(guest.run(sync_command(guest.hwpt, 1)), 0);
    EXPECT_THAT(pages_of(ring.take()), testing::Contains(7u)) << "those that can are tracked as ever";
    EXPECT_EQ(disable(guest), 0);
    expect_done(another.call(DR_DEVICE_ATTACH, unable(guest)));
    EXPECT_EQ(enable(guest), -ENODEV);
}

TEST(ServiceOptionalTracking, IsPossibleAgainWhenTheDeviceHasDied)
{
    Daemon daemon;
    TrackedGuest guest(daemon, optional);
    const std::string path = daemon.socket();
    for (int round = 0; round < 20; ++round) {
        const pid_t pid = need(::fork(), "fork");
        if (pid == 0) {
            ::prctl(PR_SET_PDEATHSIG, SIGKILL);
            const RawDeviceOf device(daemon, unable(guest));
            ::pause();
        }
        if (round % 2 == 0) {
            EXPECT_TRUE(comes_true([&] { return status(guest).devices == 1; }));
            EXPECT_EQ(enable(guest), -ENODEV);
        } else {
            std::this_thread::sleep_for(std::chrono::microseconds(300 * round)); // anywhere in its attach
        }
        ::kill(pid, SIGKILL);
        ::waitpid(pid, nullptr, 0);
        EXPECT_TRUE(comes_true([&] { return enable(guest) == 0; })) << "the device is still in the way";
        EXPECT_EQ(status(guest).devices, 0u);
        EXPECT_EQ(disable(guest), 0);
    }
}

TEST(ServiceOptionalTracking, IsRefusedOnWhileTheProcessOfAClosedConnectionLives)
{
    Daemon daemon;
    TrackedGuest guest(daemon, optional);
    const dr_device_attach request = unable(guest);
    {
        const RawDeviceOf device(daemon, request);
        expect_done(device.reply);
    }
    EXPECT_EQ(enable(guest), -ENODEV);
    RawDeviceOf again(daemon, request);
    again.detach();
    EXPECT_EQ(enable(guest), 0);
}

// Whichever of the two comes first wins, and the other one is told.
TEST(ServiceOptionalTracking, OneOfEnableAndAttachWinsEachRace)
{
    Daemon daemon({"--walkers", "2"});
    TrackedGuest guest(daemon, [](auto &r) {
        optional(r);
        r.shards = 4;
    });
    RawDeviceOf device(daemon, unable(guest));
    device.detach();
    std::mt19937_64 random(1);
    std::array<int, 2> won{};
    for (int round = 0; round < 1000; ++round) {
        const auto delay = std::chrono::nanoseconds(random() % 100'000);
        Reply reply;
        std::thread attaching([&] { reply = device.call(DR_DEVICE_ATTACH, unable(guest)); });
        const auto until = std::chrono::steady_clock::now() + delay;
        while (std::chrono::steady_clock::now() < until) {
        }
        const int enabled = enable(guest);
        attaching.join();
        ASSERT_NE(enabled == 0, reply.error() == 0)
            << "round " << round << ": ENABLE " << enabled << ", attach " << reply.error();
        const dr_hwpt_status told = status(guest);
        ASSERT_EQ(told.flags, enabled == 0 ? DR_TRACKING_SUPPORTED | DR_TRACKING_ENABLED : 0);
        ASSERT_EQ(told.devices, enabled == 0 ? 0u : 1u);
        if (enabled == 0) {
            ASSERT_EQ(reply.error(), EINVAL);
            ASSERT_EQ(disable(guest), 0);
        } else {
            ASSERT_EQ(enabled, -ENODEV);
            device.detach();
        }
        ++won[enabled == 0 ? 0 : 1];
    }
    EXPECT_GT(won[0], 0);
    EXPECT_GT(won[1], 0);
}

// Two connections of one device ask at once, while an ENABLE does.
TEST(ServiceOptionalTracking, AKeyThatComesTwiceAtOnceIsOneDevice)
{
    Daemon daemon;
    TrackedGuest guest(daemon, optional);
    for (int round = 0; round < 200; ++round) {
        const dr_device_attach request = unable(guest);
        std::array<std::unique_ptr<Peer>, 2> peers;
        for (auto &peer : peers) {
            peer = std::make_unique<Peer>(daemon);
            peer->hello();
        }
        for (auto &peer : peers)
            ASSERT_TRUE(peer->send(Peer::message(DR_DEVICE_ATTACH, payload_of(request), 9)));
        if (round % 2 == 0)
            peers[0].reset(); // its reply is nobody's
        const Reply last = peers[1]->receive();
        if (!last.closed) { // else the other one came last and has the device
            ASSERT_EQ(last.error(), 0) << last.sentence();
        }
        ASSERT_TRUE(comes_true([&] { return status(guest).devices == 1; }));
        ASSERT_EQ(enable(guest), -ENODEV);
        peers = {};
        RawDeviceOf again(daemon, request);
        again.detach();
        ASSERT_EQ(enable(guest), 0) << "an admission was left behind";
        ASSERT_EQ(disable(guest), 0);
    }
}

TEST(ServiceOptionalTracking, ADeviceMayComeWhileItsHwptOrGuestGoes)
{
    Daemon daemon;
    for (int round = 0; round < 100; ++round) {
        auto guest = std::make_unique<TrackedGuest>(daemon, optional);
        Peer device(daemon);
        device.hello();
        ASSERT_TRUE(device.send(Peer::message(DR_DEVICE_ATTACH, payload_of(unable(*guest)), 9)));
        const Reply destroyed = guest->call(DR_DESTROY, dr_object{0, guest->hwpt});
        if (round % 2 == 0)
            guest.reset();
        const Reply attached = device.receive();
        if (guest) {
            ASSERT_NE(attached.error() == 0, destroyed.error() == 0)
                << attached.sentence() << " / " << destroyed.sentence();
        }
    }
    Vm(daemon).expect_tracks();
}

} // namespace
} // namespace dirtyring::test
