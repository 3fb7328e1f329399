// dirtyringd and messages: framing, descriptors, peers that break off or send garbage.
#include "tests/service/service_peers.hpp"

#include <netinet/in.h>
#include <sys/resource.h>

namespace dirtyring::test {
namespace {

using testing::HasSubstr;

// ---- HELLO ----------------------------------------------------------------------------------------------------------

TEST(ServiceHello, BothSidesUseWhatBothOffered)
{
    Daemon daemon;
    Peer peer(daemon);
    const auto reply = peer.get<dr_hello>(DR_HELLO, dr_hello{0, 99, ~0ull});
    EXPECT_EQ(reply.version, DR_PROTOCOL_VERSION);
    EXPECT_EQ(reply.features, DR_FEATURES_ALL);
}

TEST(ServiceHello, AVersionTooOldIsRefusedAndMayBeTriedAgain)
{
    Daemon daemon;
    Peer peer(daemon);
    const Reply reply = peer.call(DR_HELLO, dr_hello{0, 0, DR_FEATURES_ALL});
    expect_refused(reply, EPROTONOSUPPORT);
    EXPECT_THAT(reply.sentence(), HasSubstr("version"));
    peer.hello();
}

TEST(ServiceHello, ComesFirst)
{
    Daemon daemon;
    for (std::uint32_t request = DR_GUEST_CREATE; request <= DR_HWPT_STATUS; ++request) {
        SCOPED_TRACE(request);
        Peer peer(daemon);
        expect_refused(peer.call_bytes(request, payload_of(dr_empty{})), EPROTO);
    }
}

TEST(ServiceHello, ComesOnce)
{
    Daemon daemon;
    Peer peer(daemon);
    peer.hello();
    expect_refused(peer.call(DR_HELLO, dr_hello{0, 1, 0}), EPROTO);
}

// ---- messages -------------------------------------------------------------------------------------------------------

TEST(ServiceMessage, ThatDoesNotBeginARequestClosesTheConnection)
{
    Daemon daemon;
    Vm bystander(daemon);
    const dr_message_header wrong[] = {
        {DR_HELLO, 0, 16, 1},
        {DR_HELLO, 2, 16, 1},
        {DR_HELLO, 3, 16, 1},
        {DR_HELLO, DR_PROTOCOL_VERSION | DR_MESSAGE_REPLY, 16, 1},
        {DR_HELLO, DR_PROTOCOL_VERSION, 0, 1},
        {DR_HELLO, DR_PROTOCOL_VERSION, 3, 1},
        {DR_HELLO, DR_PROTOCOL_VERSION, DR_MESSAGE_MAX + 1, 1},
        {DR_HELLO, DR_PROTOCOL_VERSION, UINT32_MAX, 1},
    };
    for (const dr_message_header &header : wrong) {
        SCOPED_TRACE(testing::Message() << "flags " << header.flags << " size " << header.size);
        Peer peer(daemon);
        peer.send(bytes_of(header));
        EXPECT_TRUE(peer.hung_up());
        EXPECT_THAT(daemon.said(), HasSubstr("size " + std::to_string(header.size) + " do not begin a request"));
        bystander.expect_tracks();
    }
}

TEST(ServiceMessage, AnUnknownRequestIsRefused)
{
    Daemon daemon;
    RawGuest guest(daemon);
    for (const std::uint32_t request : {0u, DR_HWPT_STATUS + 1u, 1000u, UINT32_MAX})
        expect_refused(guest.call_bytes(request, payload_of(dr_empty{})), EOPNOTSUPP);
    guest.get<dr_object>(DR_IOAS_ALLOC, dr_empty{});
}

TEST(ServiceMessage, MayBeAsLargeAsItGets)
{
    Daemon daemon;
    Peer peer(daemon);
    Bytes payload = payload_of(dr_hello{0, 1, 0});
    payload.resize(DR_MESSAGE_MAX);
    const std::uint32_t size = DR_MESSAGE_MAX;
    std::memcpy(payload.data(), &size, sizeof size);
    expect_done(peer.call_bytes(DR_HELLO, payload));
}

TEST(ServiceMessage, ThatBreaksOffIsForgotten)
{
    Daemon daemon;
    Vm bystander(daemon);
    bystander.expect_tracks();
    const std::size_t before = daemon.settled_descriptors();
    const Bytes whole = Peer::message(DR_HELLO, payload_of(dr_hello{0, 1, 0}));
    const Fd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
    for (std::size_t n = 0; n < whole.size(); ++n) {
        Peer peer(daemon);
        if (n > 0)
            peer.send({whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(n)}, {null.get(), null.get()});
    }
    daemon.expect_descriptors(before);
    bystander.expect_tracks();
}

TEST(ServiceMessage, MayComeByteByByte)
{
    Daemon daemon;
    RawGuest guest(daemon);
    const Fd memory = memory_file(page);
    const Bytes whole = Peer::message(DR_MEMORY_ADD, payload_of(dr_memory_region{0, 0, 0, page, 0}), 77);
    for (std::size_t i = 0; i < whole.size(); ++i)
        guest.send({whole[i]}, i == 0 ? std::vector<int>{memory.get()} : std::vector<int>{});
    const Reply reply = guest.receive();
    expect_done(reply);
    EXPECT_EQ(reply.header.sequence, 77u);
}

TEST(ServiceMessage, SeveralInOneWriteAreAnsweredInOrder)
{
    Daemon daemon;
    Peer peer(daemon);
    Bytes all = Peer::message(DR_HELLO, payload_of(dr_hello{0, 1, 0}), 1);
    for (const Bytes &next : {Peer::message(DR_GUEST_CREATE, payload_of(new_guest(4)), 2),
                              Peer::message(DR_IOAS_ALLOC, payload_of(dr_empty{}), 3)})
        all.insert(all.end(), next.begin(), next.end());
    peer.send(all);
    for (const std::uint32_t request : {DR_HELLO, DR_GUEST_CREATE, DR_IOAS_ALLOC}) {
        const Reply reply = peer.receive();
        expect_done(reply);
        EXPECT_EQ(reply.header.request, request);
        EXPECT_EQ(reply.header.sequence, request == DR_IOAS_ALLOC ? 3 : request);
    }
}

TEST(ServiceMessage, WhoseSenderReadsNoRepliesHoldsUpNobody)
{
    Daemon daemon;
    Vm bystander(daemon);
    RawGuest deaf(daemon);
    const int flags = ::fcntl(deaf.socket(), F_GETFL);
    ::fcntl(deaf.socket(), F_SETFL, flags | O_NONBLOCK);
    const Bytes request = Peer::message(1000, payload_of(dr_empty{}));
    while (deaf.send(request)) {
    }
    bystander.expect_tracks();
    Vm newcomer(daemon);
    newcomer.expect_tracks();
}

// ---- descriptors ----------------------------------------------------------------------------------------------------

TEST(ServiceDescriptors, WhereNoneAreExpectedAreRefusedAndClosed)
{
    Daemon daemon;
    Vm bystander(daemon);
    bystander.expect_tracks();
    const std::size_t before = daemon.settled_descriptors();
    const Fd memory = memory_file(page);
    for (const std::size_t count : {1, 2, 100, 160}) {
        SCOPED_TRACE(count);
        Peer peer(daemon);
        const std::vector<int> fds(count, memory.get());
        expect_refused(peer.call(DR_HELLO, dr_hello{0, 1, 0}, fds), EINVAL);
        peer.hello();
    }
    daemon.expect_descriptors(before);
    bystander.expect_tracks();
}

TEST(ServiceDescriptors, MoreThanAMessageMayCarryAreRefusedAndClosed)
{
    Daemon daemon;
    Vm bystander(daemon);
    bystander.expect_tracks();
    const std::size_t before = daemon.settled_descriptors();
    const Fd memory = memory_file(page);
    {
        RawGuest guest(daemon);
        const std::vector<int> fds(DR_MESSAGE_FDS_MAX + 1, memory.get());
        expect_refused(guest.call(DR_MEMORY_ADD, dr_memory_region{0, 0, 0, page, 0}, fds), EINVAL);
        // 253 is the most that the kernel takes at once.
        const Bytes whole = Peer::message(DR_MEMORY_ADD, payload_of(dr_memory_region{0, 0, 0, page, 0}));
        const std::vector<int> most(253, memory.get());
        for (const std::byte b : whole)
            guest.send({b}, most);
        expect_refused(guest.receive(), EINVAL);
        guest.add_memory(0, page, memory);
    }
    daemon.expect_descriptors(before);
    bystander.expect_tracks();
}

TEST(ServiceDescriptors, TooFewAreRefused)
{
    Daemon daemon;
    RawGuest guest(daemon);
    const dr_memory_region region{0, 0, 0, page, 0};
    expect_refused(guest.call(DR_MEMORY_ADD, region), EINVAL);
    const Fd memory = memory_file(page);
    expect_refused(guest.call(DR_MEMORY_ADD, region, {memory.get(), memory.get()}), EINVAL);
    guest.add_memory(0, page, memory);
}

TEST(ServiceDescriptors, OfAWrongKindAreRefusedAndClosed)
{
    Daemon daemon;
    Vm bystander(daemon);
    bystander.expect_tracks();
    const std::size_t before = daemon.settled_descriptors();
    {
        int pipe[2];
        ASSERT_EQ(::pipe2(pipe, O_CLOEXEC), 0);
        const Fd ends[] = {Fd(pipe[0]), Fd(pipe[1])};
        const std::map<std::string, Fd> wrong = [] {
            std::map<std::string, Fd> all;
            all["/dev/null"] = Fd(::open("/dev/null", O_RDWR | O_CLOEXEC));
            all["a directory"] = Fd(::open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
            all["a file of /proc"] = Fd(::open("/proc/self/maps", O_RDONLY | O_CLOEXEC));
            all["a socket"] = Fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
            all["an eventfd"] = Fd(::eventfd(0, EFD_CLOEXEC));
            all["an epoll"] = Fd(::epoll_create1(EPOLL_CLOEXEC));
            all["a path"] = Fd(::open("/", O_PATH | O_CLOEXEC));
            return all;
        }();
        RawGuest guest(daemon);
        const dr_memory_region region{0, 0, 0, page, 0};
        for (const auto &[what, fd] : wrong) {
            SCOPED_TRACE(what);
            expect_refused(guest.call(DR_MEMORY_ADD, region, {fd.get()}), EBADF);
        }
        for (const Fd &end : ends)
            expect_refused(guest.call(DR_MEMORY_ADD, region, {end.get()}), EBADF);
        expect_refused(guest.call(DR_MEMORY_ADD, region, {guest.socket()}), EBADF);
        guest.add_memory(0, page, memory_file(page));
    }
    daemon.expect_descriptors(before);
    bystander.expect_tracks();
}

TEST(ServiceDescriptors, ThatRunOutAreRefusedAndHarmNobody)
{
    Daemon daemon({}, [] {
        const rlimit few{60, 60};
        ::setrlimit(RLIMIT_NOFILE, &few);
    });
    Vm bystander(daemon);
    bystander.expect_tracks();
    const std::size_t before = daemon.settled_descriptors();
    {
        RawGuest greedy(daemon);
        Reply reply;
        for (int i = 0; i < 100 && reply.error() == 0; ++i) {
            dr_hwpt_alloc request = RawGuest::hwpt_request(greedy.get<dr_object>(DR_IOAS_ALLOC, dr_empty{}).id);
            reply = greedy.call(DR_HWPT_ALLOC, request);
        }
        expect_refused(reply, EMFILE);
        bystander.expect_tracks();
        std::vector<Fd> crowd;
        for (int i = 0; i < 60; ++i)
            crowd.push_back(connected(daemon.socket()));
        bystander.expect_tracks();
    }
    Peer(daemon).hello(); // in turn: the crowd has been let in, and found gone
    daemon.expect_descriptors(before);
    Vm newcomer(daemon);
    newcomer.expect_tracks();
}

// A TCP socket whose close waits: for an hour, or until the other end is closed.
class SlowToClose
{
  public:
    SlowToClose()
    {
        Fd listener(need(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket"));
        sockaddr_in address{};
        address.sin_family = AF_INET;
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        socklen_t size = sizeof address;
        need(::bind(listener.get(), reinterpret_cast<sockaddr *>(&address), size), "bind");
        need(::listen(listener.get(), 1), "listen");
        need(::getsockname(listener.get(), reinterpret_cast<sockaddr *>(&address), &size), "getsockname");
        slow = Fd(need(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket"));
        need(::connect(slow.get(), reinterpret_cast<sockaddr *>(&address), size), "connect");
        other = Fd(need(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC), "accept"));
        const linger hour{1, 3600};
        need(::setsockopt(slow.get(), SOL_SOCKET, SO_LINGER, &hour, sizeof hour), "SO_LINGER");
        const std::vector<char> bytes(65536);
        while (::send(slow.get(), bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_NOSIGNAL) > 0) {
        }
    }
    ~SlowToClose()
    {
        const linger now{1, 0};
        ::setsockopt(other.get(), SOL_SOCKET, SO_LINGER, &now, sizeof now);
    }

    Fd slow;
    Fd other;
};

// Peers make the service close a descriptor whose close waits.
class ServiceSlowDescriptor : public testing::Test
{
  protected:
    // The service gets them when ours is closed, so that its own is the last; and when a newcomer waits, whose coming
    // would interrupt the wait.
    void expect_newcomer_is_answered_after(const std::vector<Bytes> &messages, std::vector<int> fds)
    {
        fds.push_back(tcp.slow.get());
        daemon.process().signal(SIGSTOP);
        const Peer newcomer(connected(daemon.socket()), 3s);
        newcomer.send(Peer::message(DR_HELLO, payload_of(dr_hello{0, 1, 0})));
        for (const Bytes &message : messages)
            peer.send(message, &message == &messages.back() ? fds : std::vector<int>{});
        tcp.slow = Fd();
        daemon.process().signal(SIGCONT);
        expect_done(newcomer.receive());
        bystander.expect_tracks();
    }

    Daemon daemon;
    Vm bystander{daemon};
    RawGuest peer{daemon};
    SlowToClose tcp;
    const Bytes memory_add = Peer::message(DR_MEMORY_ADD, payload_of(dr_memory_region{0, 0, 0, page, 0}));
};

TEST_F(ServiceSlowDescriptor, ThatIsNotExpectedHoldsUpNobody)
{
    expect_newcomer_is_answered_after({Peer::message(DR_IOAS_ALLOC, payload_of(dr_empty{}))}, {});
}

TEST_F(ServiceSlowDescriptor, ThatIsNoMemoryHoldsUpNobody)
{
    expect_newcomer_is_answered_after({memory_add}, {});
}

TEST_F(ServiceSlowDescriptor, BeyondTheMostThatAMessageCarriesHoldsUpNobody)
{
    const Fd memory = memory_file(page);
    expect_newcomer_is_answered_after({memory_add}, std::vector<int>(DR_MESSAGE_FDS_MAX, memory.get()));
}

TEST_F(ServiceSlowDescriptor, BehindGarbageHoldsUpNobody)
{
    expect_newcomer_is_answered_after({Bytes(sizeof(dr_message_header), std::byte{0xff}), Bytes(16)}, {});
}

TEST_F(ServiceSlowDescriptor, InHalfAMessageDoesNotKeepTheServiceFromEnding)
{
    Peer stranger(daemon);
    stranger.send(Bytes(1), {tcp.slow.get()});
    Peer(daemon).hello();
    tcp.slow = Fd();
    daemon.process().signal(SIGTERM);
    EXPECT_EQ(daemon.process().exit_code(), 0) << "it waits for a peer's socket to close";
}

} // namespace
} // namespace dirtyring::test
