// What outlives a worker: descriptors in the keeper's hands, and the supervisor that starts the next one.
#include "service/keeper/fd_keeper.hpp"
#include "service/keeper/fd_store.hpp"
#include "service/keeper/supervisor.hpp"
#include "tests/service/daemon.hpp"

#include <spdlog/sinks/base_sink.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <systemd/sd-daemon.h>

#include <array>
#include <sys/resource.h>

namespace dirtyring::test {
namespace {

using service::FdStore;
using std::chrono::milliseconds;
using testing::HasSubstr;
using testing::Not;
using Clock = std::chrono::steady_clock;

ino_t inode(int fd)
{
    struct stat status {
    };
    need(::fstat(fd, &status), "fstat");
    return status.st_ino;
}

ino_t inode(const std::string &path)
{
    struct stat status {
    };
    need(::stat(path.c_str(), &status), "stat");
    return status.st_ino;
}

// ---- the worker's side ----------------------------------------------------------------------------------------------

class FdStoreTest : public testing::Test
{
  protected:
    FdStoreTest() { ::setenv("NOTIFY_SOCKET", path.c_str(), 1); }
    ~FdStoreTest() override { ::unsetenv("NOTIFY_SOCKET"); }

    TemporaryDirectory directory;
    const std::string path = directory.path() + "/notify";
    NotifySocket keeper{path};
    Fd file = memory_file(1);
    FdStore store;
};

TEST_F(FdStoreTest, PutSendsTheDescriptorWithItsNameAndAsksForNoPolling)
{
    EXPECT_TRUE(store.kept());
    EXPECT_EQ(store.put("g1.ring", file.get()), 0);
    EXPECT_EQ(keeper.next(), "FDSTORE=1\nFDNAME=g1.ring\nFDPOLL=0");
    ASSERT_EQ(keeper.fds().size(), 1u);
    EXPECT_EQ(inode(keeper.fds()[0].get()), inode(file.get()));
}

TEST_F(FdStoreTest, RemoveNamesWhatWasPutAndNothingElse)
{
    EXPECT_EQ(store.put("a", file.get()), 0);
    (void)keeper.next();
    store.remove("b");
    store.remove("a");
    store.remove("a");
    EXPECT_EQ(keeper.next(), "FDSTOREREMOVE=1\nFDNAME=a");
    EXPECT_EQ(store.put("c", file.get()), 0);
    EXPECT_THAT(keeper.next(), HasSubstr("FDNAME=c"));
}

TEST_F(FdStoreTest, RefusesMoreDescriptorsThanCanBeHandedOver)
{
    for (std::size_t i = 0; i < FdStore::fds_max; ++i) {
        ASSERT_EQ(store.put("x", file.get()), 0) << i;
        (void)keeper.next();
    }
    EXPECT_EQ(store.put("x", file.get()), -ENOSPC);
    store.remove("x");
    EXPECT_EQ(keeper.next(), "FDSTOREREMOVE=1\nFDNAME=x");
    EXPECT_EQ(store.put("x", file.get()), 0);
}

TEST_F(FdStoreTest, RefusesMoreNamesThanFitIntoAnEnvironment)
{
    const std::string name(FdStore::name_max, 'n');
    for (std::size_t i = 0; i < FdStore::names_max / (FdStore::name_max + 1); ++i) {
        ASSERT_EQ(store.put(name, file.get()), 0) << i;
        (void)keeper.next();
    }
    EXPECT_EQ(store.put(name, file.get()), -ENOSPC);
    store.remove(name);
    (void)keeper.next();
    EXPECT_EQ(store.put(name, file.get()), 0);
}

TEST_F(FdStoreTest, SaysWhenTheKeeperIsGone)
{
    ::setenv("NOTIFY_SOCKET", "/no-such-directory/notify", 1);
    EXPECT_LT(store.put("a", file.get()), 0);
}

TEST_F(FdStoreTest, WithoutAKeeperNothingIsKeptAndNothingFails)
{
    ::unsetenv("NOTIFY_SOCKET");
    EXPECT_FALSE(store.kept());
    EXPECT_EQ(store.put("a", file.get()), 0);
    store.remove("a");
    EXPECT_TRUE(store.names().empty());
    EXPECT_EQ(store.get("a"), -1);
    EXPECT_FALSE(store.take("a"));
}

// ---- the keeper's side ----------------------------------------------------------------------------------------------

// Does something at each line.
class Listening : public spdlog::sinks::base_sink<spdlog::details::null_mutex>
{
  public:
    explicit Listening(std::function<void()> then) : then_(std::move(then)) {}

  private:
    void sink_it_(const spdlog::details::log_msg &) override { then_(); }
    void flush_() override {}

    std::function<void()> then_;
};

// One who sends the next message whenever the keeper has read one.
TEST(FdKeeper, IsNotKeptBusyByAStranger)
{
    service::FdKeeper keeper;
    std::array<int, 2> ends{};
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends.data()), 0);
    const Fd ours(ends[0]);
    Fd theirs(ends[1]);
    const Process stranger({"a stranger"}, [&] {
        ::setenv("NOTIFY_SOCKET", keeper.address().c_str(), 1);
        for (char c = 0; ::recv(theirs.get(), &c, 1, 0) == 1; ::send(theirs.get(), &c, 1, 0))
            ::sd_notify(0, "READY=1");
        ::_exit(0);
    });
    theirs = Fd();
    const auto send_one = [&] {
        char c = 0;
        need(static_cast<int>(::send(ours.get(), &c, 1, MSG_NOSIGNAL)), "send");
        need(static_cast<int>(::recv(ours.get(), &c, 1, 0)), "recv");
    };
    int read = 0;
    const auto logger = spdlog::default_logger();
    spdlog::set_default_logger(std::make_shared<spdlog::logger>("listening", std::make_shared<Listening>([&] {
                                                                    if (++read < 100)
                                                                        send_one();
                                                                })));
    spdlog::set_level(spdlog::level::debug);
    send_one();
    EXPECT_FALSE(keeper.receive(1));
    EXPECT_EQ(read, 1);
    EXPECT_FALSE(keeper.receive(1));
    EXPECT_EQ(read, 2) << "it reads on, a message at a time";
    spdlog::set_default_logger(logger);
}

// ---- the supervisor, with workers that do as they are told ----------------------------------------------------------

// One worker, from its birth to its death.
class Life
{
  public:
    explicit Life(Fd socket) : socket_(std::move(socket))
    {
        socklen_t size = sizeof credentials_;
        need(::getsockopt(socket_.get(), SOL_SOCKET, SO_PEERCRED, &credentials_, &size), "SO_PEERCRED");
        const timeval limit{hang.count(), 0};
        ::setsockopt(socket_.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    }

    [[nodiscard]] pid_t pid() const { return credentials_.pid; }
    void tell(const std::string &order) const
    {
        need(static_cast<int>(::send(socket_.get(), order.data(), order.size(), 0)), "send");
    }
    std::string ask(const std::string &order) const
    {
        tell(order);
        std::string answer(65536, '\0');
        answer.resize(static_cast<std::size_t>(
            need(static_cast<int>(::recv(socket_.get(), answer.data(), answer.size(), 0)), order)));
        return answer.substr(0, answer.size() - std::min<std::size_t>(answer.size(), 1));
    }
    void done(const std::string &order) const { EXPECT_EQ(ask(order), "0") << order; }
    void die() const { ::kill(pid(), SIGKILL); }

    // Neither the worker nor anybody else has its end any more.
    [[nodiscard]] bool hung_up(milliseconds limit = hang) const
    {
        pollfd socket{socket_.get(), POLLRDHUP, 0};
        return ::poll(&socket, 1, static_cast<int>(limit.count())) == 1;
    }

  private:
    Fd socket_;
    ucred credentials_{};
};

class Supervised
{
  public:
    explicit Supervised(const std::function<void()> &in_child = {})
        : listener_(listening_on(path(), SOCK_SEQPACKET)), process_({"the supervisor"}, [&] {
              if (in_child)
                  in_child();
              spdlog::set_default_logger(spdlog::stderr_color_st("supervisor"));
              spdlog::set_level(spdlog::level::debug);
              ::_exit(service::supervise(SUPERVISED_WORKER_PATH, {"worker", path()}));
          })
    {
    }
    ~Supervised() { std::filesystem::remove(path()); }

    Life next_worker() const
    {
        pollfd socket{listener_.get(), POLLIN, 0};
        if (::poll(&socket, 1, static_cast<int>(milliseconds(hang).count())) != 1)
            throw std::runtime_error("no worker is started: " + process_.said());
        return Life(Fd(need(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC), "accept")));
    }
    // It has been ready for so long that its death is no early one.
    Life next_worker_settled()
    {
        Life life = next_worker();
        settle(life);
        return life;
    }
    void settle(const Life &life)
    {
        life.done("notify READY=1");
        const std::string line = "worker " + std::to_string(life.pid()) + " was ready";
        EXPECT_TRUE(comes_true([&] { return process_.said().find(line) != std::string::npos; })) << process_.said();
        const auto since = Clock::now();
        EXPECT_TRUE(comes_true([&] { return Clock::now() - since > milliseconds(25); }));
    }
    Process &process() { return process_; }

  private:
    [[nodiscard]] std::string path() const { return directory_.path() + "/workers"; }

    TemporaryDirectory directory_;
    Fd listener_;
    Process process_;
};

TEST(Supervisor, DescriptorsComeBackUnderTheirNames)
{
    Supervised supervised;
    const Life first = supervised.next_worker_settled();
    EXPECT_EQ(first.ask("names"), "");
    EXPECT_EQ(first.ask("environment LISTEN_FDS"), "");
    first.done("put b.1 a.2 c.3");
    first.die();
    const Life second = supervised.next_worker_settled();
    EXPECT_EQ(second.ask("environment LISTEN_FDS"), "") << "the variables are for the worker alone";
    second.done("put d.4");
    second.die();
    const Life third = supervised.next_worker();
    EXPECT_EQ(third.ask("names"), "a.2=of.a.2 b.1=of.b.1 c.3=of.c.3 d.4=of.d.4 ");
    EXPECT_NE(first.pid(), second.pid());
}

// The numbers that the supervisor has them under come and go, so every kind of move is needed.
TEST(Supervisor, ManyDescriptorsKeepTheirNames)
{
    Supervised supervised;
    std::string names;
    std::string expected;
    for (int i = 0; i < 400; ++i)
        names += " n" + std::to_string(1000 + i);
    for (int round = 0; round < 3; ++round) {
        const Life life = supervised.next_worker_settled();
        if (round == 0)
            life.done("put" + names);
        std::string some;
        expected.clear();
        for (int i = 0; i < 400; ++i) {
            const std::string name = "n" + std::to_string(1000 + i);
            if (i % (round + 2) == 0)
                some += " " + name;
            expected += name + "=of." + name + " ";
        }
        life.done("remove" + some);
        life.done("put" + some);
        life.die();
    }
    EXPECT_EQ(supervised.next_worker().ask("names"), expected);
}

// As many, and with as many bytes of names, as a starter can hand over.
TEST(Supervisor, AFullStoreComesBack)
{
    rlimit limit{};
    ::getrlimit(RLIMIT_NOFILE, &limit);
    if (limit.rlim_max < 2 * FdStore::fds_max)
        GTEST_SKIP() << "the limit of descriptors is " << limit.rlim_max;
    limit.rlim_cur = limit.rlim_max;
    Supervised supervised([&] { ::setrlimit(RLIMIT_NOFILE, &limit); });
    const Life first = supervised.next_worker_settled();
    const std::size_t size = FdStore::names_max / FdStore::fds_max - 1; // of a name, without its colon
    for (std::size_t i = 0; i < FdStore::fds_max;) {
        std::string names;
        for (const std::size_t end = i + 512; i < end; ++i) {
            const std::string number = std::to_string(i);
            names += " n" + std::string(size - 1 - number.size(), '.') + number;
        }
        first.done("put" + names);
    }
    EXPECT_EQ(first.ask("put n"), std::to_string(-ENOSPC));
    first.done("notify FDSTORE=1"); // who does not count hears the same from the supervisor
    first.die();
    EXPECT_EQ(supervised.next_worker().ask("intact"), std::to_string(FdStore::fds_max));
    EXPECT_THAT(supervised.process().said(), HasSubstr("descriptor stored is not kept"));
}

TEST(Supervisor, WhatNobodyTakesIsDroppedAndWhatIsTakenIsKept)
{
    Supervised supervised;
    const Life first = supervised.next_worker_settled();
    first.done("put a b c c");
    first.die();
    const Life second = supervised.next_worker_settled();
    EXPECT_EQ(second.ask("take a"), "of.a");
    EXPECT_EQ(second.ask("take a"), "?");
    EXPECT_EQ(second.ask("take c"), "of.c");
    second.done("drop_rest");
    EXPECT_EQ(second.ask("names"), "");
    second.die();
    EXPECT_EQ(supervised.next_worker().ask("names"), "a=of.a c=of.c c=of.c ");
}

TEST(Supervisor, WhatIsRemovedIsClosed)
{
    Supervised supervised;
    const Life first = supervised.next_worker_settled();
    first.done("put_connection");
    first.die();
    const Life second = supervised.next_worker_settled();
    EXPECT_FALSE(first.hung_up(milliseconds(0))) << "the supervisor has the first worker's end";
    second.done("remove connection");
    second.die();
    EXPECT_TRUE(first.hung_up());
}

TEST(Supervisor, MessagesOfOthersAreIgnored)
{
    Supervised supervised;
    const Life first = supervised.next_worker_settled();
    first.done("put mine");
    first.done("stranger FDSTORE=1\nFDNAME=theirs");
    first.done("stranger FDSTOREREMOVE=1\nFDNAME=mine");
    first.die();
    const Life second = supervised.next_worker();
    second.done("stranger READY=1");
    EXPECT_EQ(second.ask("names"), "mine=of.mine ");
    second.die();
    (void)supervised.next_worker();
    EXPECT_THAT(supervised.process().said(), Not(HasSubstr("worker " + std::to_string(second.pid()) + " was ready")));
}

TEST(Supervisor, WhatAWorkerSaidBeforeItsDeathIsDone)
{
    Supervised supervised;
    const Life first = supervised.next_worker_settled();
    first.done("put old");
    supervised.process().signal(SIGSTOP);
    first.done("put a b c");
    first.done("remove old");
    first.die();
    supervised.process().signal(SIGCONT);
    EXPECT_EQ(supervised.next_worker().ask("names"), "a=of.a b=of.b c=of.c ");
}

TEST(Supervisor, OddMessagesDoNoHarm)
{
    Supervised supervised;
    const Life first = supervised.next_worker_settled();
    const std::size_t before = supervised.process().descriptors();
    first.done("notify FDSTORE=1");
    first.done("notify FDSTORE=1\nFDNAME=a:b");
    first.done("notify FDSTORE=1\nFDNAME=" + std::string(300, 'n'));
    first.done("notify FDNAME=same\nFDPOLL=0\n\nFDSTORE=1\n");
    first.done("notify FDSTORE=1\nFDNAME=same");
    for (const std::string &nothing :
         {std::string("FDSTORE"), std::string("FDNAME=x"), std::string("FDSTOREREMOVE=1"), std::string("BARRIER=1"),
          std::string("FDSTOREREMOVE=1\nFDNAME="), std::string("\n\n="), std::string("STATUS=FDSTORE=1"),
          std::string("STOPPING=1"), "FDSTORE=1\n" + std::string(5000, 'x')})
        first.done("notify " + nothing);
    EXPECT_TRUE(comes_true([&] { return supervised.process().descriptors() == before + 5; }))
        << supervised.process().descriptors() - before;
    first.die();
    EXPECT_EQ(supervised.next_worker().ask("names"), "same=raw same=raw stored=raw stored=raw stored=raw ");
}

// ---- deaths ---------------------------------------------------------------------------------------------------------

TEST(Supervisor, GivesUpAfterTenEarlyDeathsInARow)
{
    Supervised supervised;
    supervised.next_worker_settled().tell("raise 9"); // not an early one
    const auto since = Clock::now();
    for (int i = 0; i < 10; ++i)
        supervised.next_worker().tell(i % 2 == 0 ? "exit 3" : "raise 6");
    EXPECT_EQ(supervised.process().exit_code(), 1);
    EXPECT_GE(Clock::now() - since, milliseconds(10 + 20 + 40 + 80 + 160 + 320 + 640 + 1000 + 1000));
    const std::string said = supervised.process().said();
    EXPECT_THAT(said, HasSubstr("died of SIGKILL"));
    EXPECT_THAT(said, HasSubstr("died of exit code 3"));
    EXPECT_THAT(said, HasSubstr("died of SIGABRT"));
    EXPECT_THAT(said, HasSubstr("giving up"));
}

TEST(Supervisor, AWorkerThatLivedEndsTheRow)
{
    Supervised supervised;
    for (int i = 0; i < 12; ++i) {
        const Life life = supervised.next_worker();
        if (i % 4 == 3)
            supervised.settle(life);
        life.die();
    }
    EXPECT_NO_THROW((void)supervised.next_worker());
    EXPECT_THAT(supervised.process().said(), HasSubstr("death 12;"));
    EXPECT_THAT(supervised.process().said(), Not(HasSubstr("starts in 80 ms")));
}

TEST(Supervisor, NoDeadWorkerIsLeftOver)
{
    Supervised supervised;
    const Life settled = supervised.next_worker_settled();
    settled.die();
    const Life early = supervised.next_worker();
    early.die();
    (void)supervised.next_worker();
    for (const Life *life : {&settled, &early})
        EXPECT_TRUE(comes_true([&] { return ::kill(life->pid(), 0) != 0 && errno == ESRCH; })) << life->pid();
}

TEST(Supervisor, ADeathAsSoonAsItWasReadyIsEarly)
{
    Supervised supervised;
    const Life life = supervised.next_worker();
    supervised.process().signal(SIGSTOP); // so both come at once, however slow this test is
    life.done("notify READY=1");
    life.die();
    supervised.process().signal(SIGCONT);
    (void)supervised.next_worker();
    EXPECT_THAT(supervised.process().said(), HasSubstr("starts in 10 ms"));
}

TEST(Supervisor, EndsWithItsWorkersExitCodeWhenAnotherWorkerWouldNotHelp)
{
    for (const int code : {0, 1, 2}) {
        Supervised supervised;
        supervised.next_worker().tell("exit " + std::to_string(code));
        EXPECT_EQ(supervised.process().exit_code(), code);
    }
    for (const int code : {0, 2}) {
        Supervised supervised;
        supervised.next_worker_settled().tell("exit " + std::to_string(code));
        EXPECT_EQ(supervised.process().exit_code(), code);
    }
    Supervised supervised;
    supervised.next_worker_settled().tell("exit 1");
    EXPECT_NO_THROW((void)supervised.next_worker()) << "it was ready once, so its command line is a good one";
}

TEST(Supervisor, AsksItsWorkerToEndAndEndsWithItsExitCode)
{
    for (const int number : {SIGTERM, SIGINT, SIGHUP}) {
        Supervised supervised;
        const Life life = supervised.next_worker();
        life.tell("exit_when_asked 5");
        supervised.process().signal(number);
        EXPECT_EQ(supervised.process().exit_code(), 5) << ::strsignal(number);
    }
}

TEST(Supervisor, EndsBetweenTwoWorkers)
{
    Supervised supervised;
    for (int i = 0; i < 6; ++i)
        supervised.next_worker().die();
    EXPECT_TRUE(comes_true([&] { return supervised.process().said().find("starts in 320 ms") != std::string::npos; }));
    supervised.process().signal(SIGTERM);
    EXPECT_EQ(supervised.process().exit_code(), 0);
}

TEST(Supervisor, ASecondRequestKillsAWorkerThatDoesNotEnd)
{
    Supervised supervised;
    const Life life = supervised.next_worker();
    supervised.process().signal(SIGTERM);
    EXPECT_TRUE(comes_true([&] { return life.ask("asked_to_end") == "1"; }));
    EXPECT_FALSE(supervised.process().ended());
    supervised.process().signal(SIGTERM);
    EXPECT_EQ(supervised.process().exit_code(), 1);
    EXPECT_TRUE(life.hung_up());
}

// Its last thread too: the first one may be a zombie before the others have ended.
bool is_gone(pid_t pid)
{
    const std::string path = "/proc/" + std::to_string(pid);
    std::ifstream file(path + "/stat");
    std::string all;
    std::getline(file, all); // which does not throw when the process ends meanwhile
    std::error_code gone;
    return all.empty() || (all.find(") Z ") != std::string::npos &&
                           std::distance(std::filesystem::directory_iterator(path + "/task", gone), {}) <= 1);
}

TEST(Supervisor, LeavesNothingWhenItIsKilled)
{
    Supervised supervised;
    const Life first = supervised.next_worker_settled();
    first.done("put_connection");
    first.die();
    const Life second = supervised.next_worker();
    EXPECT_FALSE(first.hung_up(milliseconds(0)));
    supervised.process().signal(SIGKILL);
    EXPECT_EQ(supervised.process().exit_code(), -SIGKILL);
    EXPECT_TRUE(second.hung_up());
    EXPECT_TRUE(first.hung_up()) << "somebody has its descriptor still";
    EXPECT_TRUE(comes_true([&] { return is_gone(second.pid()); }));
}

TEST(Supervisor, IsReadyForItsOwnSupervisorOnce)
{
    TemporaryDirectory directory;
    NotifySocket above(directory.path() + "/notify");
    Supervised supervised([&] { ::setenv("NOTIFY_SOCKET", (directory.path() + "/notify").c_str(), 1); });
    for (int i = 0; i < 2; ++i) {
        const Life life = supervised.next_worker_settled();
        EXPECT_EQ(life.ask("environment NOTIFY_SOCKET").front(), '@');
        life.die();
    }
    EXPECT_EQ(above.next(), "READY=1");
    supervised.next_worker().tell("exit_when_asked 0");
    supervised.process().signal(SIGTERM);
    EXPECT_EQ(supervised.process().exit_code(), 0);
    EXPECT_EQ(above.next(), "STOPPING=1");
}

// ---- dirtyringd --supervise -----------------------------------------------------------------------------------------

std::optional<pid_t> worker_of(const Process &supervisor)
{
    for (const auto &entry : std::filesystem::directory_iterator("/proc")) {
        const int pid = std::atoi(entry.path().filename().c_str());
        std::ifstream file(pid > 0 ? entry.path() / "stat" : "");
        std::string all;
        std::getline(file, all); // which does not throw when the process ends meanwhile
        std::istringstream rest(all.empty() ? all : all.substr(all.rfind(')') + 2));
        char state = 0;
        pid_t parent = 0;
        if (rest >> state >> parent && parent == supervisor.pid() && state != 'Z')
            return pid;
    }
    return std::nullopt;
}

pid_t settled_worker_of(const Process &supervisor)
{
    std::optional<pid_t> worker;
    const auto ready = [&] {
        worker = worker_of(supervisor);
        return worker &&
               supervisor.said().find("worker " + std::to_string(*worker) + " was ready") != std::string::npos;
    };
    if (!comes_true(ready))
        throw std::runtime_error("no worker gets ready: " + supervisor.said());
    const auto since = Clock::now();
    EXPECT_TRUE(comes_true([&] { return Clock::now() - since > milliseconds(25); }));
    return *worker;
}

void kill_worker(pid_t worker)
{
    ::kill(worker, SIGKILL);
    EXPECT_TRUE(comes_true([&] { return is_gone(worker); }));
}

TEST(SupervisedService, OneSocketOutlivesTwentyWorkers)
{
    Daemon daemon({"--supervise"});
    const ino_t socket = inode(daemon.socket());
    for (int i = 0; i < 20; ++i) {
        Peer(daemon).hello();
        kill_worker(settled_worker_of(daemon.process()));
        EXPECT_EQ(inode(daemon.socket()), socket);
    }
    Peer(daemon).hello();
    EXPECT_THAT(daemon.said(), HasSubstr("death 20; 1 descriptors are kept"));
    daemon.stop();
}

TEST(SupervisedService, WhoConnectsWhileNoWorkerLivesIsAnsweredLater)
{
    Daemon daemon({"--supervise"});
    const pid_t worker = settled_worker_of(daemon.process());
    daemon.process().signal(SIGSTOP);
    kill_worker(worker);
    Peer early(daemon);
    early.send(Peer::message(DR_HELLO, payload_of(dr_hello{0, DR_PROTOCOL_VERSION, DR_FEATURES_ALL})));
    daemon.process().signal(SIGCONT);
    const Reply reply = early.receive();
    EXPECT_FALSE(reply.closed);
    EXPECT_EQ(reply.error(), 0);
}

TEST(SupervisedService, IsNamedAsWhatItIs)
{
    Daemon daemon({"--supervise"});
    std::string name;
    std::getline(std::ifstream("/proc/" + std::to_string(settled_worker_of(daemon.process())) + "/comm"), name);
    EXPECT_EQ(name, "dirtyringd");
}

TEST(SupervisedService, ServesAListeningDescriptorAndLeavesItsFile)
{
    TemporaryDirectory directory;
    const std::string path = directory.path() + "/socket";
    Fd listener = listening_on(path);
    // By a number that the worker needs for other things.
    Process supervisor({DIRTYRINGD_PATH, "--fd", "3", "--supervise"}, [&] { ::dup2(::dup(listener.get()), 3); });
    listener = Fd();
    for (int i = 0; i < 3; ++i) {
        Peer(connected(path)).hello();
        kill_worker(settled_worker_of(supervisor));
    }
    Peer(connected(path)).hello();
    supervisor.signal(SIGTERM);
    EXPECT_EQ(supervisor.exit_code(), 0) << supervisor.said();
    EXPECT_TRUE(std::filesystem::remove(path)) << "the socket is its owner's";
}

TEST(SupervisedService, DoesNotTryAgainWhatCannotWork)
{
    Daemon daemon;
    Process busy({DIRTYRINGD_PATH, "--supervise", "--socket-path", daemon.socket()});
    EXPECT_EQ(busy.exit_code(), 1);
    EXPECT_THAT(busy.said(), HasSubstr("another service is listening there"));
    EXPECT_THAT(busy.said(), Not(HasSubstr("died")));
}

TEST(SupervisedService, WrongUsageExitsWith2)
{
    std::array<int, 2> ends{};
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM, 0, ends.data()), 0);
    const Fd ours(ends[0]);
    const Fd theirs(ends[1]);
    const std::vector<std::vector<std::string>> wrong = {
        {"--supervise"},
        {"--supervise=false", "--socket-path", "/tmp/x"},
        {"--supervise", "--fd", std::to_string(theirs.get())}, // one connected peer dies with its worker
        {"--supervise", "--fd", "999"},
        {"--supervise", "--socket-path", "/tmp/x", "--no-such-option"},
    };
    for (const auto &options : wrong) {
        std::vector<std::string> words{DIRTYRINGD_PATH};
        words.insert(words.end(), options.begin(), options.end());
        Process process(words);
        EXPECT_EQ(process.exit_code(), 2) << testing::PrintToString(options) << process.said();
    }
}

// ---- dirtyringd under systemd, which is this test -------------------------------------------------------------------

// What systemd does between fork and exec.
std::function<void()> hands_over(const Fd &fd, const std::string &name, const std::string &notify_socket)
{
    return [&fd, name, notify_socket] {
        if (fd) {
            ::dup2(::dup(fd.get()), 3); // not itself, which is closed on exec
            ::setenv("LISTEN_FDS", "1", 1);
            ::setenv("LISTEN_FDNAMES", name.c_str(), 1);
            ::setenv("LISTEN_PID", std::to_string(::getpid()).c_str(), 1);
        }
        if (!notify_socket.empty())
            ::setenv("NOTIFY_SOCKET", notify_socket.c_str(), 1);
    };
}

TEST(ServiceUnderSystemd, HasItsSocketKeptAndItsSuccessorGetsIt)
{
    TemporaryDirectory directory;
    const std::string path = directory.path() + "/socket";
    const std::string notify = directory.path() + "/notify";
    NotifySocket systemd(notify);
    Fd kept;
    {
        Process first({DIRTYRINGD_PATH, "--socket-path", path}, hands_over(kept, "", notify));
        EXPECT_EQ(systemd.next(), "FDSTORE=1\nFDNAME=listener\nFDPOLL=0");
        ASSERT_EQ(systemd.fds().size(), 1u);
        kept = std::move(systemd.fds()[0]);
        EXPECT_EQ(systemd.next(), "READY=1");
    }
    Peer between(connected(path));
    const ino_t socket = inode(path);
    Process second({DIRTYRINGD_PATH, "--socket-path", path}, hands_over(kept, "listener", notify));
    EXPECT_EQ(systemd.next(), "READY=1") << "it is kept already";
    between.hello();
    EXPECT_EQ(inode(path), socket);
    second.signal(SIGTERM);
    EXPECT_EQ(second.exit_code(), 0) << second.said();
    EXPECT_EQ(systemd.next(), "STOPPING=1");
    EXPECT_EQ(systemd.next(), "FDSTOREREMOVE=1\nFDNAME=listener") << "its file is gone";
    EXPECT_FALSE(std::filesystem::exists(path));
}

TEST(ServiceUnderSystemd, ListensOnAnActivatedSocketOfAnyName)
{
    TemporaryDirectory directory;
    const std::string path = directory.path() + "/socket";
    const Fd listener = listening_on(path);
    Process service({DIRTYRINGD_PATH}, hands_over(listener, "dirtyringd.socket", ""));
    Peer(connected(path)).hello();
    service.signal(SIGTERM);
    EXPECT_EQ(service.exit_code(), 0) << service.said();
    EXPECT_TRUE(std::filesystem::remove(path)) << "the socket is systemd's";
}

TEST(ServiceUnderSystemd, DropsWhatItDoesNotKnow)
{
    TemporaryDirectory directory;
    const std::string notify = directory.path() + "/notify";
    NotifySocket systemd(notify);
    const Fd unknown = memory_file(1);
    Daemon daemon({}, hands_over(unknown, "unknown", notify));
    EXPECT_THAT(systemd.next(), HasSubstr("FDNAME=listener"));
    EXPECT_EQ(systemd.next(), "FDSTOREREMOVE=1\nFDNAME=unknown");
    daemon.stop();
}

} // namespace
} // namespace dirtyring::test
