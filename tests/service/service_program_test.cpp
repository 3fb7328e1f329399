// dirtyringd as a program: descriptors it is started with, sockets, signals, logs; and a fuzzer beside a guest that
// keeps the rules.
#include "tests/service/service_peers.hpp"

#include <liburing.h>
#include <nlohmann/json.hpp>
#include <random>
#include <sys/epoll.h>

namespace dirtyring::test {
namespace {

using testing::HasSubstr;

// ---- the program ----------------------------------------------------------------------------------------------------

TEST(ServiceProgram, TellsItsSupervisorWhenItIsReadyAndWhenItStops)
{
    TemporaryDirectory directory;
    NotifySocket supervisor(directory.path() + "/notify");
    Daemon daemon({}, [&] { ::setenv("NOTIFY_SOCKET", (directory.path() + "/notify").c_str(), 1); });
    EXPECT_THAT(supervisor.next(), HasSubstr("FDNAME=listener"));
    EXPECT_EQ(supervisor.next(), "READY=1");
    daemon.process().signal(SIGTERM);
    EXPECT_EQ(supervisor.next(), "STOPPING=1");
}

TEST(ServiceProgram, EndsAtAnInterruptToo)
{
    Daemon daemon({"--log-level", "info"});
    Vm vm(daemon);
    vm.expect_tracks();
    daemon.process().signal(SIGINT);
    EXPECT_EQ(daemon.process().exit_code(), 0) << daemon.said();
    EXPECT_THAT(daemon.said(), HasSubstr("asked to end by SIGINT of process " + std::to_string(::getpid())));
}

TEST(ServiceProgram, EndsWithGuestsAndDevicesThere)
{
    Daemon daemon({"--walkers", "2"});
    Vm vm(daemon, sharded(2));
    vm.expect_tracks();
    DeviceProcess inside(daemon, vm.token(), vm.hwpt, {0});
    inside.wait_inside();
    vm.start_sync();
    daemon.stop();
    pollfd hangup{dirtyring_socket(vm.vm()), POLLRDHUP, 0};
    EXPECT_EQ(::poll(&hangup, 1, 10'000), 1);
}

// While the kernel makes a table of descriptors larger in a process with threads, the thread concerned waits for RCU.
TEST(ServiceProgram, HasRoomForManyDescriptorsBeforeItHasThreads)
{
    Daemon daemon;
    Peer(daemon).hello();
    EXPECT_GE(daemon.process().status("FDSize:"), 1024);
}

std::vector<std::string> with_fd(int fd)
{
    return {DIRTYRINGD_PATH, "--fd", std::to_string(fd)};
}

void keep_over_exec(const Fd &fd)
{
    ::fcntl(fd.get(), F_SETFD, 0);
}

class ServiceListeningFd : public testing::TestWithParam<int>
{
};
INSTANTIATE_TEST_SUITE_P(Blocking, ServiceListeningFd, testing::Values(0));
INSTANTIATE_TEST_SUITE_P(NonBlocking, ServiceListeningFd, testing::Values(SOCK_NONBLOCK));

TEST_P(ServiceListeningFd, IsServed)
{
    TemporaryDirectory directory;
    const std::string path = directory.path() + "/socket";
    const Fd listener = listening_on(path, SOCK_STREAM | GetParam());
    Process service(with_fd(listener.get()), [&] { keep_over_exec(listener); });
    for (int i = 0; i < 3; ++i) {
        Peer peer(connected(path));
        peer.hello();
    }
    service.signal(SIGTERM);
    EXPECT_EQ(service.exit_code(), 0) << service.said();
    EXPECT_THAT(service.said(), Not(HasSubstr("cannot accept")));
    EXPECT_EQ(::unlink(path.c_str()), 0) << "the socket is its owner's";
}

// As a dead predecessor's io_uring may, until the kernel has taken it apart: who waits exclusively takes a connection's
// only wake.
TEST(ServiceProgram, ServesAListenerThatOthersWaitFor)
{
    TemporaryDirectory directory;
    const std::string path = directory.path() + "/socket";
    const Fd listener = listening_on(path, SOCK_STREAM);
    io_uring dead{};
    ASSERT_EQ(io_uring_queue_init(4, &dead, 0), 0);
    io_uring_prep_poll_multishot(io_uring_get_sqe(&dead), listener.get(), POLLIN | EPOLLEXCLUSIVE);
    ASSERT_EQ(io_uring_submit(&dead), 1);
    Process service(with_fd(listener.get()), [&] { keep_over_exec(listener); });
    for (int i = 0; i < 3; ++i)
        Peer(connected(path)).hello();
    service.signal(SIGTERM);
    EXPECT_EQ(service.exit_code(), 0) << service.said();
    io_uring_queue_exit(&dead);
    EXPECT_EQ(::unlink(path.c_str()), 0);
}

class ServiceConnectedFd : public testing::TestWithParam<int>
{
};
INSTANTIATE_TEST_SUITE_P(Blocking, ServiceConnectedFd, testing::Values(0));
INSTANTIATE_TEST_SUITE_P(NonBlocking, ServiceConnectedFd, testing::Values(SOCK_NONBLOCK));

TEST_P(ServiceConnectedFd, IsServedUntilItsPeerCloses)
{
    int ends[2];
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    Fd theirs(ends[1]);
    ::fcntl(theirs.get(), F_SETFL, GetParam() != 0 ? O_NONBLOCK : 0);
    Peer peer{Fd(ends[0])};
    Process service(with_fd(theirs.get()), [&] { keep_over_exec(theirs); });
    theirs = Fd();
    peer.hello();
    peer.get<dr_guest>(DR_GUEST_CREATE, new_guest(4));
    peer.close();
    EXPECT_EQ(service.exit_code(), 0) << service.said();
}

void expect_exit(const std::vector<std::string> &options, int code, const std::string &sentence,
                 const std::function<void()> &in_child = {})
{
    std::vector<std::string> words{DIRTYRINGD_PATH};
    words.insert(words.end(), options.begin(), options.end());
    Process service(words, in_child);
    EXPECT_EQ(service.exit_code(), code) << testing::PrintToString(options);
    EXPECT_THAT(service.said(), HasSubstr(sentence)) << testing::PrintToString(options);
}

TEST(ServiceProgram, ADescriptorThatIsNoStreamSocketIsRefused)
{
    expect_exit({"--fd", "77"}, 1, "--fd 77 is not a stream socket");
    const Fd memory = memory_file(page);
    expect_exit({"--fd", std::to_string(memory.get())}, 1, "is not a stream socket", [&] { keep_over_exec(memory); });
    const Fd datagram(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    expect_exit({"--fd", std::to_string(datagram.get())}, 1, "is not a stream socket",
                [&] { keep_over_exec(datagram); });
}

TEST(ServiceProgram, ASecondServiceOnASocketIsRefused)
{
    Daemon daemon;
    Vm vm(daemon);
    expect_exit({"--socket-path", daemon.socket()}, 1, "another service is listening there");
    vm.expect_tracks();
}

TEST(ServiceProgram, ASecondServiceIsRefusedEvenWhenTheFirstIsFull)
{
    Daemon daemon;
    std::vector<Fd> crowd;
    for (int i = 0; i < 512; ++i)
        crowd.push_back(connected(daemon.socket()));
    Peer last(daemon);
    EXPECT_TRUE(last.hung_up());
    Process second({DIRTYRINGD_PATH, "--socket-path", daemon.socket()});
    EXPECT_EQ(second.exit_code(), 1) << second.said();
}

TEST(ServiceProgram, ASocketThatIsLeftOverIsReplaced)
{
    TemporaryDirectory directory;
    const std::string path = directory.path() + "/socket";
    const std::vector<std::string> words{DIRTYRINGD_PATH, "--socket-path", path};
    {
        Process killed(words);
        ASSERT_TRUE(comes_true([&] { return killed.said().find("ready") != std::string::npos; }));
    }
    ASSERT_TRUE(std::filesystem::is_socket(path));
    Process service(words);
    EXPECT_TRUE(comes_true([&] { return service.ended() || service.said().find("ready") != std::string::npos; }));
    if (service.ended())
        std::filesystem::remove(path);
    else
        Peer(connected(path)).hello();
    service.signal(SIGTERM);
    EXPECT_EQ(service.exit_code(), 0) << service.said();
    EXPECT_FALSE(std::filesystem::exists(path));
}

TEST(ServiceProgram, AFileThatIsNoSocketIsLeftAlone)
{
    TemporaryDirectory directory;
    const std::string path = directory.path() + "/file";
    std::ofstream(path) << "mine";
    expect_exit({"--socket-path", path}, 1, "something else than a socket is there");
    std::string word;
    std::ifstream(path) >> word;
    EXPECT_EQ(word, "mine");
    std::filesystem::remove(path);
}

TEST(ServiceProgram, ASocketThatSomebodyElseHasPutThereIsLeftAlone)
{
    Daemon daemon;
    const std::string path = daemon.socket();
    std::filesystem::remove(path);
    Fd other(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof address.sun_path - 1);
    ASSERT_EQ(::bind(other.get(), reinterpret_cast<sockaddr *>(&address), sizeof address), 0);
    daemon.process().signal(SIGTERM);
    EXPECT_EQ(daemon.process().exit_code(), 0) << daemon.said();
    EXPECT_TRUE(std::filesystem::is_socket(path));
    std::filesystem::remove(path);
}

TEST(ServiceProgram, APathThatCannotBeListenedOnIsRefused)
{
    expect_exit({"--socket-path", "/tmp/" + std::string(200, 'x')}, 1, "a socket path has 1 to 107 bytes");
    expect_exit({"--socket-path", ""}, 1, "a socket path has 1 to 107 bytes");
    expect_exit({"--socket-path", "/no-such-directory/socket"}, 1, "No such file or directory");
    expect_exit({"--socket-path", "/dev/null/socket"}, 1, "Not a directory");
}

TEST(ServiceProgram, ADirectoryThatCannotBeWrittenIsRefused)
{
    if (::geteuid() != 0)
        GTEST_SKIP() << "not root, so there is nobody else to be";
    TemporaryDirectory directory;
    ASSERT_EQ(::chmod(directory.path().c_str(), 0755), 0);
    // By descriptor: nobody may not be allowed to where the program lies.
    const Fd program(::open(DIRTYRINGD_PATH, O_PATH));
    Process service({"/proc/self/fd/" + std::to_string(program.get()), "--socket-path", directory.path() + "/socket"},
                    [] { (void)(::setresgid(65534, 65534, 65534) + ::setresuid(65534, 65534, 65534)); });
    EXPECT_EQ(service.exit_code(), 1);
    EXPECT_THAT(service.said(), HasSubstr("Permission denied"));
}

TEST(ServiceProgram, PrintsItsCapabilitiesAsJson)
{
    Process service({DIRTYRINGD_PATH, "--print-capabilities"});
    EXPECT_EQ(service.exit_code(), 0);
    EXPECT_EQ(service.said(), "");
    const auto json = nlohmann::json::parse(service.printed(), nullptr, false);
    ASSERT_TRUE(json.is_object()) << service.printed();
    EXPECT_EQ(json.value("type", ""), "dirtyring");
    EXPECT_EQ(json.value("protocol", 0u), DR_PROTOCOL_VERSION);
    EXPECT_EQ(json.value("ring", 0u), DR_RING_VERSION);
    EXPECT_EQ(json.value("features", nlohmann::json{}).size(), 2u);
}

TEST(ServiceProgram, WrongUsageExitsWith2)
{
    const std::vector<std::vector<std::string>> wrong = {
        {},
        {"--no-such-option"},
        {"--socket-path"},
        {"--socket-path", "/tmp/x", "--fd", "3"},
        {"--fd", "-1"},
        {"--fd", "three"},
        {"--socket-path", "/tmp/x", "--walkers", "0"},
        {"--socket-path", "/tmp/x", "--walkers", "65"},
        {"--socket-path", "/tmp/x", "--walkers", "many"},
        {"--socket-path", "/tmp/x", "--log-level", "loud"},
        {"--socket-path", "/tmp/x", "surplus"},
    };
    for (const auto &options : wrong)
        expect_exit(options, 2, "--");
    expect_exit({"--help"}, 0, "");
}

TEST(ServiceProgram, LivesOnWhenNobodyReadsItsLog)
{
    int ends[2];
    ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
    Fd reader(ends[0]);
    Fd writer(ends[1]);
    TemporaryDirectory directory;
    const std::string path = directory.path() + "/socket";
    Process service({DIRTYRINGD_PATH, "--socket-path", path}, [&] { ::dup2(writer.get(), STDERR_FILENO); });
    writer = Fd();
    char first = 0;
    ASSERT_EQ(::read(reader.get(), &first, 1), 1); // it is ready
    reader = Fd();
    Peer garbage(connected(path));
    garbage.send(Bytes(sizeof(dr_message_header)));
    EXPECT_TRUE(garbage.hung_up());
    EXPECT_NO_THROW(Peer(connected(path)).hello()) << "killed by " << strsignal(-service.exit_code().value_or(0));
    service.signal(SIGTERM);
    EXPECT_EQ(service.exit_code(), 0);
    std::filesystem::remove(path);
}

// ---- fuzz -----------------------------------------------------------------------------------------------------------

// Connections of a few thousand messages: random bytes, and valid ones with some bytes changed.
class Fuzzer
{
  public:
    explicit Fuzzer(const Daemon &daemon, const Vm &target) : daemon_(daemon), attach_(new_device(0, target.token())) {}

    void random_bytes()
    {
        Peer peer(daemon_);
        Bytes bytes(1 + random_() % 200);
        for (std::byte &b : bytes)
            b = static_cast<std::byte>(random_());
        peer.send(bytes, descriptors());
        hang_up(peer);
    }

    // In place up to an hwpt, or as a device; then some mutations.
    void mutations()
    {
        Peer peer(daemon_);
        std::vector<Bytes> valid = messages();
        const std::size_t in_place = random_() % 5;
        for (std::size_t i = 0; i < in_place; ++i)
            peer.send(valid[i]);
        for (int i = 0; i < 8; ++i) {
            Bytes message = valid[random_() % valid.size()];
            for (auto n = random_() % 4; n > 0; --n)
                message[random_() % message.size()] = interesting();
            dr_message_header header;
            std::memcpy(&header, message.data(), sizeof header);
            constexpr std::size_t linger = sizeof header + offsetof(dr_guest_create, linger_ms);
            if (header.request == DR_GUEST_CREATE && message.size() >= linger + 4)
                std::fill_n(message.begin() + linger, 4, std::byte{0}); // or it is not gone at the end
            else if (random_() % 8 == 0)
                message.resize(random_() % message.size() + 1);
            if (!peer.send(message, descriptors()))
                break;
        }
        hang_up(peer);
    }

  private:
    std::byte interesting()
    {
        constexpr unsigned bytes[] = {0, 1, 2, 4, 8, 16, 32, 0x7f, 0x80, 0xff};
        return static_cast<std::byte>(random_() % 2 == 0 ? bytes[random_() % std::size(bytes)] : random_() % 256);
    }
    std::vector<int> descriptors()
    {
        std::vector<int> fds;
        for (auto n = random_() % 8; n > 5; --n)
            fds.push_back(random_() % 2 == 0 ? memory_.get() : null_.get());
        return fds;
    }
    [[nodiscard]] std::vector<Bytes> messages() const
    {
        std::uint32_t sequence = 0;
        const auto message = [&sequence](dr_request request, auto payload) {
            return Peer::message(request, payload_of(payload), ++sequence);
        };
        dr_hwpt_alloc hwpt = RawGuest::hwpt_request(1);
        hwpt.aperture_lg2 = 30;
        return {message(DR_HELLO, dr_hello{0, 1, DR_FEATURES_ALL}),
                message(DR_GUEST_CREATE, new_guest(4)),
                message(DR_IOAS_ALLOC, dr_empty{}),
                message(DR_HWPT_ALLOC, hwpt),
                message(DR_MEMORY_ADD, dr_memory_region{0, 0, 0, page, 0}),
                message(DR_RING_GET, dr_ring_get{0, 2, 0}),
                message(DR_DESTROY, dr_object{0, 2}),
                message(DR_DEVICE_ATTACH, attach_),
                message(DR_DEVICE_INFO, dr_object{0, 0}),
                message(DR_HWPT_STATUS, dr_object{0, 2}),
                message(DR_DEVICE_DETACH, dr_empty{}),
                message(DR_GUEST_DESTROY, dr_empty{})};
    }
    static void hang_up(Peer &peer)
    {
        ::shutdown(peer.socket(), SHUT_WR);
        EXPECT_TRUE(peer.hung_up()) << "the service neither answers nor hangs up";
    }

    const Daemon &daemon_;
    dr_device_attach attach_;
    std::mt19937_64 random_{4};
    Fd memory_ = memory_file(page);
    Fd null_{::open("/dev/null", O_RDWR | O_CLOEXEC)};
};

TEST(ServiceFuzz, AGuestThatKeepsTheRulesLosesNoPageMeanwhile)
{
    Daemon daemon({"--log-level", "info"});
    Vm vm(daemon);
    vm.expect_tracks();
    const std::size_t before = daemon.settled_descriptors();
    std::atomic<bool> over{false};
    std::thread fuzz([&] {
        Fuzzer fuzzer(daemon, vm);
        for (int i = 0; i < 1500; ++i)
            fuzzer.random_bytes();
        for (int i = 0; i < 500; ++i)
            fuzzer.mutations();
        over = true;
    });
    const std::uint64_t spare = vm.iova(256);
    while (!over) {
        vm.expect_tracks();
        EXPECT_EQ(dirtyring_map(vm.vm(), vm.ioas, spare, 16 * page, 0, read_write), 0);
        std::uint64_t value = 1;
        EXPECT_EQ(dirtyring_dma_write(dirtyring_device_dma(vm.device().get(), 0), spare + page, &value, 8, nullptr), 0);
        EXPECT_EQ(dirtyring_unmap(vm.vm(), vm.ioas, spare, 16 * page, DIRTYRING_HARVEST_NOW, nullptr), 0);
    }
    fuzz.join();
    vm.expect_tracks();
    daemon.expect_descriptors(before);
}

} // namespace
} // namespace dirtyring::test
