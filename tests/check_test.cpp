// The conformance kit against services that are wrong in one way each: it names that rule, and no other.
#include "client/check/service_checks.hpp"
#include "tests/meddler.hpp"

#include <atomic>
#include <mutex>
#include <thread>

namespace dirtyring::test {
namespace {

using check::Check;
using check::Outcome;
using check::Verdicts;
using testing::ElementsAre;
using testing::IsEmpty;

std::vector<std::string_view> failed(std::span<const Check> checks, const std::string &socket)
{
    Verdicts verdicts(check::Role::service);
    for (const Check &c : checks)
        check::run(c, verdicts, socket, std::chrono::seconds(3));
    auto numbers = verdicts.numbers(Outcome::fail);
    if (testing::Test::HasFailure())
        verdicts.print(stderr);
    return numbers;
}

const Check &find(std::span<const Check> checks, std::string_view name)
{
    const auto found = std::find_if(checks.begin(), checks.end(), [&](const Check &c) { return c.name == name; });
    if (found == checks.end())
        throw std::runtime_error("no such check");
    return *found;
}

TEST(CheckService, PassesOneThatIsRight)
{
    const Meddler meddler(Meddler::leave);
    EXPECT_THAT(failed(check::message_checks(), meddler.socket()), IsEmpty());
    EXPECT_THAT(failed(check::object_checks(), meddler.socket()), IsEmpty());
}

TEST(CheckService, NamesAWrongSequence)
{
    const Meddler meddler([](Message &reply) {
        reply.header.sequence += reply.header.request == DR_HELLO;
        return true;
    });
    EXPECT_THAT(failed(check::message_checks(), meddler.socket()), ElementsAre("F-5"));
}

TEST(CheckService, NamesADescriptorThatIsMissing)
{
    const Meddler meddler([](Message &reply) {
        if (reply.header.request == DR_GUEST_CREATE && !reply.refused())
            reply.fds.pop_back();
        return true;
    });
    EXPECT_THAT(failed(check::message_checks(), meddler.socket()), ElementsAre("F-8"));
}

TEST(CheckService, NamesAnUnknownFlag)
{
    const Meddler meddler([](Message &reply) {
        reply.header.flags |= 1u << 4;
        return true;
    });
    EXPECT_THAT(failed(check::message_checks(), meddler.socket()), ElementsAre("F-1"));
}

TEST(CheckService, NamesAWrongErrno)
{
    const Meddler meddler([](Message &reply) {
        if (reply.refused() && reply.header.request == 999)
            reply.change<dr_refusal>([](dr_refusal &r) { r.error = EIO; });
        return true;
    });
    EXPECT_THAT(failed(check::message_checks(), meddler.socket()), ElementsAre("F-11"));
}

TEST(CheckService, NamesARefusalWithoutASentence)
{
    const Meddler meddler([](Message &reply) {
        if (reply.refused() && reply.header.request == DR_MEMORY_ADD)
            reply.change<dr_refusal>([](dr_refusal &r) { r.sentence[0] = '\0'; });
        return true;
    });
    EXPECT_THAT(failed(check::message_checks(), meddler.socket()), ElementsAre("F-6"));
}

TEST(CheckService, NamesAHeaderThatShouldHaveClosedTheConnection)
{
    const Meddler meddler(Meddler::leave, [](Message &request) { return request.sane(); });
    EXPECT_THAT(failed(check::message_checks(), meddler.socket()), ElementsAre("F-9"));
}

TEST(CheckService, NamesDescriptorsThatAreKept)
{
    std::mutex mutex;
    std::vector<Fd> kept;
    const Meddler meddler(Meddler::leave, [&](Message &request) {
        const std::lock_guard lock(mutex);
        for (const Fd &fd : request.fds)
            kept.emplace_back(::fcntl(fd.get(), F_DUPFD_CLOEXEC, 0));
        return true;
    });
    EXPECT_THAT(failed(check::message_checks(), meddler.socket()), ElementsAre("F-15"));
}

TEST(CheckService, NamesFeaturesThatNobodyOffered)
{
    const Meddler meddler([](Message &reply) {
        if (reply.header.request == DR_HELLO && !reply.refused())
            reply.change<dr_hello>([](dr_hello &h) { h.features = DR_FEATURES_ALL; });
        return true;
    });
    EXPECT_THAT(failed(check::message_checks(), meddler.socket()), ElementsAre("H-5"));
}

TEST(CheckService, NamesTokensThatAreAllTheSame)
{
    const Meddler meddler([](Message &reply) {
        if (reply.header.request == DR_GUEST_CREATE && !reply.refused())
            reply.change<dr_guest>([](dr_guest &g) { std::memset(g.secret, 1, sizeof g.secret); });
        return true;
    });
    const Check &guests = find(check::object_checks(), "guests");
    EXPECT_THAT(failed({&guests, 1}, meddler.socket()), ElementsAre("O-2"));
}

TEST(CheckService, NamesARegionThatItCanWriteAndShouldNot)
{
    const Meddler meddler([](Message &reply) {
        if (reply.header.request == DR_RING_GET && !reply.refused()) {
            const std::string path = "/proc/self/fd/" + std::to_string(reply.fds[0].get());
            reply.fds[0] = Fd(need(::open(path.c_str(), O_RDWR | O_CLOEXEC), "reopen"));
        }
        return true;
    });
    const Check &rights = find(check::memory_checks(), "rights");
    EXPECT_THAT(failed({&rights, 1}, meddler.socket()), ElementsAre("S-2"));
}

// Copies a ring into one of its own, and puts each sync marker before the runs that it should follow.
class Forger
{
  public:
    explicit Forger(Message &reply)
    {
        struct stat status {
        };
        need(::fstat(reply.fds[0].get(), &status), "fstat");
        const auto size = static_cast<std::size_t>(status.st_size);
        need(real_.map(reply.fds[0].get(), size, PROT_READ), "mmap");
        need(forged_.make("forged", size, ring::Pages::present), "memfd");
        forged_.map.as<dr_ring_producer>()->header = real_.as<dr_ring_producer>()->header;
        need(forged_.read_only(reply.fds[0]), "reopen");
        thread_ = std::thread([this] { copy(); });
    }
    Forger(const Forger &) = delete;
    Forger &operator=(const Forger &) = delete;
    ~Forger()
    {
        stop_ = true;
        thread_.join();
    }

  private:
    void copy()
    {
        auto &from = *real_.as<dr_ring_producer>();
        auto &to = *forged_.map.as<dr_ring_producer>();
        const auto *entries = reinterpret_cast<const std::uint64_t *>(&from + 1);
        auto *copies = reinterpret_cast<std::uint64_t *>(&to + 1);
        const std::uint64_t mask = from.header.capacity - 1;
        std::vector<std::uint64_t> held; // since the last marker
        std::uint64_t head = 0;
        for (std::uint64_t at = 0; !stop_; std::this_thread::sleep_for(std::chrono::microseconds(100))) {
            for (const std::uint64_t upto = std::atomic_ref(from.head).load(); at != upto; ++at) {
                const std::uint64_t entry = entries[at & mask];
                held.push_back(entry);
                if (!dr_is_marker(entry))
                    continue;
                std::rotate(held.begin(), held.end() - 1, held.end());
                for (const std::uint64_t e : held)
                    copies[head++ & mask] = e;
                held.clear();
                std::atomic_ref(to.staged).store(head);
                std::atomic_ref(to.head).store(head);
            }
            std::atomic_ref(to.want_kick).store(std::atomic_ref(from.want_kick).load());
        }
    }

    Mapping real_;
    ring::Region forged_;
    std::atomic<bool> stop_ = false;
    std::thread thread_;
};

TEST(CheckService, NamesAMarkerBeforeItsRuns)
{
    std::mutex mutex;
    std::vector<std::unique_ptr<Forger>> forgers;
    const Meddler meddler([&](Message &reply) {
        const std::lock_guard lock(mutex);
        if (reply.header.request == DR_RING_GET && !reply.refused())
            forgers.push_back(std::make_unique<Forger>(reply));
        return true;
    });
    const Check &sync = find(check::tracking_checks(), "SYNC");
    EXPECT_THAT(failed({&sync, 1}, meddler.socket()), ElementsAre("M-24"));
}

// Whoever ends in the middle is named, and nothing waits for it.
TEST(CheckService, NamesOneThatEnds)
{
    Daemon daemon;
    Verdicts verdicts(check::Role::service);
    const Check dies{"a service that ends", [](check::Context &) {}, {"F-10"}};
    daemon.process().signal(SIGTERM);
    ASSERT_TRUE(comes_true([&] { return daemon.process().ended(); }));
    EXPECT_FALSE(
        check::run(dies, verdicts, daemon.socket(), std::chrono::seconds(3), [] { return "was ended by signal 15"; }));
    EXPECT_THAT(verdicts.numbers(Outcome::fail), ElementsAre("S-8"));
    EXPECT_THAT(verdicts.numbers(Outcome::pass), IsEmpty());
}

TEST(CheckVerdicts, AFailureOutweighsAPass)
{
    Verdicts verdicts(check::Role::service);
    verdicts.pass("F-10");
    verdicts.fail("F-4", {"here", "this", "that"});
    verdicts.pass("F-4"); // one that failed once has failed
    verdicts.skip("H-3", "because");
    EXPECT_EQ(verdicts.outcome("F-4"), Outcome::fail);
    const std::string json = verdicts.json();
    for (const char *part : {R"("pass": 1)", R"("fail": 1)", R"("seen": "this")", R"("why": "because")"})
        EXPECT_THAT(json, testing::HasSubstr(part));
    EXPECT_EQ(verdicts.count(Outcome::pass), 1u);
    EXPECT_EQ(verdicts.count(Outcome::fail), 1u);
    EXPECT_THAT(verdicts.numbers(Outcome::skip), testing::Not(testing::Contains("C-1"))) << "which binds no service";
}

} // namespace
} // namespace dirtyring::test
