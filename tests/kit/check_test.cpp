// The conformance kit against services that are wrong in one way each: it names that rule, and no other.
#include "client/check/service_checks.hpp"
#include "iommu/formats.hpp"
#include "iommu/geometry.hpp"
#include "iommu/layout.h"
#include "tests/kit/meddler.hpp"

#include <atomic>
#include <memory>
#include <mutex>

namespace dirtyring::test {
namespace {

using check::Check;
using check::Outcome;
using check::Verdicts;
using testing::ElementsAre;
using testing::IsEmpty;

// Of `dirtyring check`: no rule but the one that is broken may fail of haste.
constexpr std::chrono::seconds patience{10};

std::vector<std::string_view> failed(std::span<const Check> checks, const std::string &socket)
{
    Verdicts verdicts(check::Role::service);
    for (const Check &c : checks)
        check::run(c, verdicts, socket, patience);
    verdicts.print(stderr); // for who finds another number than expected
    return verdicts.numbers(Outcome::fail);
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

TEST(CheckService, NamesOneThatTakesAPieceForAMessage)
{
    const Meddler meddler(Meddler::leave, [](Message &request) {
        if (request.header.request == DR_HELLO && request.pieces > 2)
            request.change<dr_hello>([](dr_hello &h) { h.size = 1; });
        return true;
    });
    EXPECT_THAT(failed(check::message_checks(), meddler.socket()), ElementsAre("F-10"));
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
            reply.change<dr_guest>([](dr_guest &g) { std::memset(g.token, 1, sizeof g.token); });
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

// ---- what is wrong with a service, and the rules that it breaks -----------------------------------------------------

struct Service {
    Meddler::Meddle replies = Meddler::leave;
    Meddler::Meddle requests = Meddler::leave;
    bool keeps_connections = false;

    // Every dirty ring is forged like this.
    void rings(const Forgery &forgery)
    {
        replies = [this, forgery](Message &reply) {
            if (reply.is(DR_RING_GET)) {
                auto ring = std::make_shared<ForgedRing>(reply, forgery);
                const std::lock_guard lock(mutex);
                forged.push_back(ring.get());
                kept.push_back(ring);
            }
            return true;
        };
    }
    // And every command ring.
    void commands(const ForgedCommands::Meddling &meddling)
    {
        replies = [this, meddling, before = replies](Message &reply) {
            if (reply.is(DR_GUEST_CREATE)) {
                auto commands = std::make_shared<ForgedCommands>(reply, meddling);
                const std::lock_guard lock(mutex);
                kept.push_back(commands);
            }
            return before(reply);
        };
    }
    void completions(const std::function<int(dr_completion &, const dr_command &)> &completion)
    {
        commands({.completion = completion});
    }
    void passed_on(const std::function<bool(dr_command &)> &command) { commands({.command = command}); }
    void again_and_again(std::function<void()> what)
    {
        auto repeated = std::make_shared<Repeated>(std::move(what));
        const std::lock_guard lock(mutex);
        kept.push_back(repeated);
    }
    void copy_rings()
    {
        const std::lock_guard lock(mutex);
        for (ForgedRing *ring : forged)
            ring->copy();
    }

    std::mutex mutex;
    int enabled = 0; // ENABLEs so far
    std::vector<ForgedRing *> forged;
    std::vector<std::shared_ptr<void>> kept;
};

struct Wrong {
    const char *name;
    void (*make)(Service &);
    std::vector<std::string_view> checks;
    std::vector<std::string_view> broken; // these, and no others
};

void PrintTo(const Wrong &wrong, std::ostream *os)
{
    *os << wrong.name;
}

class Breaks : public testing::TestWithParam<Wrong>
{
};

// Deaths are not for these: the service takes the proxy for every device's process. check_rules_test has them.
TEST_P(Breaks, IsNamed)
{
    std::vector<Check> checks;
    for (const auto &area : {check::message_checks(), check::object_checks(), check::memory_checks(),
                             check::ring_checks(), check::command_checks(), check::map_checks(),
                             check::tracking_checks(), check::size_checks(), check::device_checks()}) {
        for (const Check &c : area) {
            const auto &wanted = GetParam().checks;
            if (std::find(wanted.begin(), wanted.end(), c.name) != wanted.end())
                checks.push_back(c);
        }
    }
    ASSERT_EQ(checks.size(), GetParam().checks.size());
    const auto &broken = GetParam().broken;
    std::vector<std::string_view> named;
    for (int tries = 0; tries < 3 && named.size() < broken.size();
         ++tries) { // a busy machine can hide a fault for once
        Service service;
        GetParam().make(service);
        Meddler meddler([&](Message &reply) { return service.replies(reply); },
                        [&](Message &request) { return service.requests(request); });
        if (service.keeps_connections)
            meddler.keep_connections();
        named = failed(checks, meddler.socket());
        ASSERT_THAT(named, testing::Each(testing::AnyOfArray(broken))) << "what it keeps";
    }
    EXPECT_THAT(named, testing::ElementsAreArray(broken));
}

// ---- messages -------------------------------------------------------------------------------------------------------

void another_errno(Service &s)
{
    s.replies = [](Message &reply) {
        if (reply.refused())
            reply.change<dr_refusal>([](dr_refusal &r) { r.error = EXDEV; });
        return true;
    };
}

void refusal_as_success(Service &s)
{
    s.replies = [](Message &reply) {
        reply.pretend_done();
        return true;
    };
}

void payload_misstates_its_size(Service &s)
{
    s.replies = [](Message &reply) {
        reply.change<dr_empty>([](dr_empty &e) { e.size += 4; });
        return true;
    };
}

void late_descriptors(Service &s)
{
    s.replies = [](Message &reply) { return reply.fds_late = true; };
}

void second_reply(Service &s)
{
    s.replies = [](Message &reply) {
        if (reply.is(DR_IOAS_ALLOC)) {
            const Bytes header = bytes_of(reply.header);
            const Bytes payload = reply.payload;
            reply.payload.insert(reply.payload.end(), header.begin(), header.end());
            reply.payload.insert(reply.payload.end(), payload.begin(), payload.end());
        }
        return true;
    };
}

void descriptor_with_refusal(Service &s)
{
    s.replies = [](Message &reply) {
        if (reply.refused())
            reply.fds.push_back(memory_file(1));
        return true;
    };
}

void another_descriptor(Service &s)
{
    s.replies = [](Message &reply) {
        if (reply.is(DR_GUEST_CREATE))
            reply.fds[3] = memory_file(1);
        return true;
    };
}

void resents_a_refusal(Service &s)
{
    s.replies = [refused = false](Message &reply) mutable {
        if (refused)
            reply.refuse(EIO);
        refused = reply.refused();
        return true;
    };
}

void refuses_without_reason(Service &s)
{
    s.replies = [](Message &reply) {
        if (reply.is(DR_IOAS_ALLOC))
            reply.refuse(EIO);
        return true;
    };
}

// ---- objects --------------------------------------------------------------------------------------------------------

void another_slice(Service &s)
{
    s.replies = [](Message &reply) {
        if (reply.is(DR_HWPT_ALLOC))
            reply.change<dr_hwpt>([](dr_hwpt &h) { --h.slice_lg2; });
        return true;
    };
}

void id_given_again(Service &s)
{
    s.replies = [first = 0u](Message &reply) mutable {
        if (reply.is(DR_HWPT_ALLOC))
            reply.change<dr_hwpt>([&](dr_hwpt &h) { h.id = first = first == 0 ? h.id : first; });
        return true;
    };
}

void objects_of_all_guests(Service &s)
{
    s.replies = [guests = 0](Message &reply) mutable {
        guests += reply.is(DR_GUEST_CREATE);
        if (guests == 2)
            reply.pretend_done();
        return true;
    };
}

void another_device(Service &s)
{
    s.replies = [](Message &reply) {
        if (reply.is(DR_DEVICE_INFO))
            reply.change<dr_device_info>([](dr_device_info &i) { ++i.formats; });
        return true;
    };
}

void another_status(Service &s)
{
    s.replies = [](Message &reply) {
        if (reply.is(DR_HWPT_STATUS))
            reply.change<dr_hwpt_status>([](dr_hwpt_status &h) { h.flags |= DR_TRACKING_SUPPORTED; });
        return true;
    };
}

void optional_is_required(Service &s)
{
    s.requests = [](Message &request) {
        if (request.header.request == DR_HWPT_ALLOC)
            request.change<dr_hwpt_alloc>([](dr_hwpt_alloc &h) { h.flags = DR_HWPT_DIRTY_TRACKING; });
        return true;
    };
}

// Whoever attaches is said to track, once it has been enabled.
void attaches_to_what_is_enabled(Service &s)
{
    s.passed_on([&s](dr_command &c) {
        const std::lock_guard lock(s.mutex);
        s.enabled += c.opcode == DR_OP_ENABLE;
        return true;
    });
    s.requests = [&s](Message &request) {
        const std::lock_guard lock(s.mutex);
        if (request.header.request == DR_DEVICE_ATTACH &&
            s.enabled == 3) // the guest's own, one that fails, one that does not
            request.change<dr_device_attach>([](dr_device_attach &a) { a.flags |= DR_DEVICE_CAN_TRACK; });
        return true;
    };
}

void enables_with_any_device(Service &s)
{
    s.completions([](dr_completion &completion, const dr_command &c) {
        if (c.opcode == DR_OP_ENABLE && completion.result == -ENODEV)
            completion.result = 0;
        return 1;
    });
}

void maps_that_stay(Service &s)
{
    s.completions([](dr_completion &completion, const dr_command &command) {
        if (command.opcode == DR_OP_MAP && command.length == DR_PAGE)
            completion.result = -EEXIST;
        return 1;
    });
}

void connections_kept(Service &s)
{
    s.keeps_connections = true;
}

void another_token(Service &s)
{
    s.replies = [guests = 0](Message &reply) mutable {
        if (reply.is(DR_GUEST_CREATE) && ++guests == 2)
            reply.change<dr_guest>([](dr_guest &g) { g.token[0] ^= 1; });
        return true;
    };
}

void deaf_to_flags_of_guests(Service &s)
{
    s.requests = [](Message &request) {
        if (request.header.request == DR_GUEST_CREATE)
            request.change<dr_guest_create>([](dr_guest_create &g) { g.flags = 0; });
        return true;
    };
}

void done_again(Service &s)
{
    auto theirs = std::make_shared<std::uint32_t>();
    s.requests = [theirs, ours = 1000u](Message &request) mutable {
        *theirs = std::exchange(request.header.sequence, ours++);
        return true;
    };
    s.replies = [theirs](Message &reply) {
        reply.header.sequence = *theirs;
        return true;
    };
}

void deaf_to_keys(Service &s)
{
    s.requests = [key = 1ull](Message &request) mutable {
        if (request.header.request == DR_DEVICE_ATTACH)
            request.change<dr_device_attach>([&](dr_device_attach &a) { a.key = key++; });
        return true;
    };
}

// ---- regions --------------------------------------------------------------------------------------------------------

void bare_cells(Service &s)
{
    s.replies = [](Message &reply) {
        if (reply.is(DR_DEVICE_ATTACH)) {
            reply.fds[2] = memory_file(std::uint64_t{16} * DR_PAGE);
            need(::fchmod(reply.fds[2].get(), 0666), "fchmod");
        }
        return true;
    };
}

void header_without_version(Service &s)
{
    s.rings({.header = [](dr_ring_header &h) { h.version = 0; }});
}

void header_of_another_slice(Service &s)
{
    s.rings({.header = [](dr_ring_header &h) { h.last -= DR_PAGE; }});
}

void larger_command_ring(Service &s)
{
    s.requests = [](Message &request) {
        if (request.header.request == DR_GUEST_CREATE)
            request.change<dr_guest_create>([](dr_guest_create &g) { g.command_entries *= 2; });
        return true;
    };
}

// Generations and all else stand still for devices.
void frozen_translation(Service &s)
{
    s.replies = [](Message &reply) {
        if (!reply.is(DR_DEVICE_ATTACH))
            return true;
        const Mapping real = map_all(reply.fds[1], PROT_READ);
        ring::Region frozen;
        need(frozen.make("frozen", real.size(), ring::Pages::present), "memfd");
        std::memcpy(frozen.map.data(), real.data(), real.size());
        const auto &header = *frozen.map.as<dr_translation_header>();
        for (std::uint32_t shard = 0; shard < header.shards; ++shard) {
            auto &control = frozen.map.as<dr_shard_control>(header.shard_controls)[shard];
            control.asleep = DR_ASLEEP;
            control.context = iommu::with_format(header.format, [](auto f) { return f.context(true); });
        }
        need(frozen.read_only(reply.fds[1]), "reopen");
        return true;
    };
}

// Those of a page that is published, and of page 3 when tracking begins.
void dirty_bits_that_stay(Service &s)
{
    struct Tables {
        Mapping map;
        dr_translation_header header;
    };
    auto all = std::make_shared<std::vector<Tables>>();
    const auto soil = [&s, all](std::uint64_t page) {
        const std::lock_guard lock(s.mutex);
        for (const Tables &tables : *all) {
            const std::uint64_t first =
                iommu::first_table(tables.header, 0) + iommu::first_number(tables.header.slice_lg2, 0);
            for (std::uint64_t table = first; table < first + 4; ++table) {
                std::uint64_t &entry =
                    tables.map.as<std::uint64_t>(tables.header.table_pages + table * DR_PAGE)[page % 512];
                std::uint64_t e = std::atomic_ref(entry).load();
                const iommu::Entry leaf = iommu::AmdV1::decode(e, 0);
                if (leaf.kind == iommu::EntryKind::leaf && leaf.address == page * DR_PAGE)
                    std::atomic_ref(entry).compare_exchange_strong(e, iommu::AmdV1::accessed(e, true));
            }
        }
    };
    s.rings({.entry = [soil](std::uint64_t entry) {
        soil(entry >> DR_PAGE_LG2);
        return entry;
    }});
    s.completions([soil](dr_completion &, const dr_command &command) {
        if (command.opcode == DR_OP_ENABLE)
            soil(3);
        return 1;
    });
    s.replies = [&s, all, before = s.replies](Message &reply) {
        if (reply.is(DR_DEVICE_ATTACH)) {
            const std::lock_guard lock(s.mutex);
            const Mapping translation = map_all(reply.fds[1], PROT_READ);
            all->push_back({map_all(reply.fds[0], PROT_READ | PROT_WRITE), *translation.as<dr_translation_header>()});
        }
        return before(reply);
    };
}

void deaf_to_doorbells(Service &s)
{
    s.replies = [](Message &reply) {
        if (reply.is(DR_DEVICE_ATTACH))
            reply.fds[3] = Fd(need(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd"));
        return true;
    };
}

// ---- rings ----------------------------------------------------------------------------------------------------------

constexpr std::uint64_t nothing = 100 << 12; // a marker that nobody knows

void marker_before_its_runs(Service &s)
{
    s.rings({.held = [](std::uint64_t entry) { return !dr_is_marker(entry); }});
}

void lost_runs(Service &s)
{
    s.rings({.entry = [](std::uint64_t entry) { return dr_is_marker(entry) ? entry : nothing; }});
}

// Another guest's rings, which are larger, are left alone.
void lost_runs_of_small_rings(Service &s)
{
    lost_runs(s);
    s.replies = [forge = s.replies](Message &reply) {
        const bool small =
            reply.is(DR_RING_GET) && map_all(reply.fds[0], PROT_READ).as<dr_ring_producer>()->header.capacity == 16;
        return !small || forge(reply);
    };
}

void lost_markers(Service &s)
{
    s.rings({.entry = [](std::uint64_t entry) { return dr_is_marker(entry) ? nothing : entry; }});
}

void head_beyond_staged(Service &s)
{
    s.rings({.always = [](dr_ring_producer &to, std::uint64_t head) { std::atomic_ref(to.staged).store(head - 1); }});
}

void published_slots_that_change(Service &s)
{
    s.rings({.always = [n = 0u](dr_ring_producer &to, std::uint64_t head) mutable {
        if (head > 0 && head < 16)
            std::atomic_ref(*reinterpret_cast<std::uint64_t *>(&to + 1)).store(dr_run(0, false, 1 + n++ % 1000));
    }});
}

// A ring twice as large as its header says, of which all but one slot is used.
void no_slots_for_markers(Service &s)
{
    s.rings({.header = [](dr_ring_header &h) { h.capacity /= 2; }});
    s.requests = [](Message &request) {
        if (request.header.request == DR_HWPT_ALLOC)
            request.change<dr_hwpt_alloc>([](dr_hwpt_alloc &h) { h.ring_entries *= 2; });
        return true;
    };
}

void runs_beyond_memory(Service &s)
{
    s.rings({.entry = [](std::uint64_t entry) {
        return dr_is_marker(entry) ? entry : dr_run(entry >> DR_PAGE_LG2, false, DR_RUN_MAX);
    }});
}

void large_runs_anywhere(Service &s)
{
    s.rings({.entry = [](std::uint64_t entry) {
        return dr_is_marker(entry) ? entry : dr_run((entry >> DR_PAGE_LG2) - 1, true, 1);
    }});
}

void calls_for_nothing(Service &s)
{
    s.replies = [&s](Message &reply) {
        if (reply.is(DR_RING_GET)) {
            auto call = std::make_shared<Fd>(need(::fcntl(reply.fds[2].get(), F_DUPFD_CLOEXEC, 0), "dup"));
            s.again_and_again([call] { ::eventfd_write(call->get(), 1); });
        }
        return true;
    };
}

void never_rests(Service &s)
{
    s.requests = [](Message &request) {
        if (request.header.request == DR_HWPT_ALLOC)
            request.change<dr_hwpt_alloc>([](dr_hwpt_alloc &h) { h.min_interval_us = 1; });
        return true;
    };
}

// ---- commands -------------------------------------------------------------------------------------------------------

void another_result(Service &s)
{
    s.completions([](dr_completion &completion, const dr_command &) {
        completion.result = completion.result == 0 ? 0 : -EXDEV;
        return 1;
    });
}

void another_user_data(Service &s)
{
    s.completions([](dr_completion &completion, const dr_command &) {
        ++completion.user_data;
        return 1;
    });
}

void completions_without_slots(Service &s)
{
    s.commands({.command = [](dr_command &) { return false; }, .counts_completions = false});
}

void heads_believed(Service &s)
{
    s.commands({.counts_completions = false});
}

void no_call_for_completions(Service &s)
{
    s.commands({.calls = false});
}

void unmap_and_enable_not_done(Service &s)
{
    s.passed_on([](dr_command &c) { return c.opcode != DR_OP_UNMAP && c.opcode != DR_OP_ENABLE; });
}

void unmap_completes_at_once(Service &s)
{
    s.passed_on([](dr_command &c) { return c.opcode != DR_OP_UNMAP; });
}

void sync_completes_at_once(Service &s)
{
    s.passed_on([](dr_command &c) { return c.opcode != DR_OP_SYNC; });
}

void disable_not_done(Service &s)
{
    s.passed_on([before = 0](dr_command &c) mutable { return c.opcode != DR_OP_DISABLE || before++ == 0; });
}

void more_rights(Service &s)
{
    s.passed_on([](dr_command &c) {
        if (c.opcode == DR_OP_MAP)
            c.flags |= DR_MAP_WRITE;
        return true;
    });
}

void leniency_ignored(Service &s)
{
    s.passed_on([](dr_command &c) {
        c.flags &= ~std::uint32_t{DR_MAP_IDEMPOTENT | DR_UNMAP_EMPTY_OK};
        return true;
    });
}

void harvest_swapped(Service &s)
{
    s.passed_on([](dr_command &c) {
        constexpr std::uint32_t both = DR_UNMAP_DEFERRED | DR_UNMAP_DISCARD;
        if (c.opcode == DR_OP_UNMAP && (c.flags & both) != 0)
            c.flags ^= both;
        return true;
    });
}

void harvest_thrown_away(Service &s)
{
    s.passed_on([](dr_command &c) {
        if (c.opcode == DR_OP_UNMAP)
            c.flags |= DR_UNMAP_DISCARD;
        return true;
    });
}

void the_same_epoch(Service &s)
{
    s.completions([](dr_completion &completion, const dr_command &) {
        completion.epoch = 7;
        return 1;
    });
}

void runs_behind_their_epoch(Service &s)
{
    s.rings({.held = [](std::uint64_t e) { return !dr_is_marker(e) && dr_run_address(e) >= 100 * DR_PAGE; }});
    s.completions([&s](dr_completion &, const dr_command &) {
        s.copy_rings();
        return 1;
    });
}

void split_that_unmaps(Service &s)
{
    s.passed_on([](dr_command &c) {
        if (c.opcode == DR_OP_SPLIT && c.leaf_lg2 == 12) {
            c.opcode = DR_OP_UNMAP;
            --c.object; // its ioas was made before it
            c.leaf_lg2 = 0;
        }
        return true;
    });
}

void maps_held_up_by_sync(Service &s)
{
    s.completions(
        [](dr_completion &, const dr_command &c) { return c.opcode == DR_OP_MAP && c.length == DR_PAGE ? 0 : 1; });
}

INSTANTIATE_TEST_SUITE_P(
    Service, Breaks,
    testing::Values(
        Wrong{"another_errno",
              another_errno,
              {"unknown requests", "wrong sizes", "wrong descriptors", "HELLO", "kinds of connections", "guests",
               "MEMORY_ADD", "HWPT_ALLOC and RING_GET", "DESTROY", "DEVICE_ATTACH and DEVICE_DETACH",
               "the end of a guest"},
              {"F-11", "F-12", "F-13", "F-14", "H-3", "H-4", "H-6", "H-7", "O-1", "O-3", "O-4", "O-6", "O-7", "O-9",
               "O-12", "O-13", "O-15"}},
        Wrong{"refusal_as_success", refusal_as_success, {"unknown requests", "HELLO"}, {"F-11", "H-3", "H-4", "H-6"}},
        Wrong{"payload_misstates_its_size", payload_misstates_its_size, {"several requests at once"}, {"F-2"}},
        Wrong{"late_descriptors", late_descriptors, {"several requests at once"}, {"F-3"}},
        Wrong{"second_reply", second_reply, {"several requests at once"}, {"F-4"}},
        Wrong{"descriptor_with_refusal", descriptor_with_refusal, {"unknown requests"}, {"F-7"}},
        Wrong{"another_descriptor", another_descriptor, {"rights"}, {"F-8"}},
        Wrong{"resents_a_refusal", resents_a_refusal, {"unknown requests"}, {"F-11", "F-16"}},
        Wrong{"refuses_without_reason", refuses_without_reason, {"HWPT_ALLOC and RING_GET"}, {"F-17"}},
        Wrong{"another_slice", another_slice, {"HWPT_ALLOC and RING_GET"}, {"O-5"}},
        Wrong{"id_given_again", id_given_again, {"DESTROY"}, {"O-8"}},
        Wrong{"objects_of_all_guests", objects_of_all_guests, {"DESTROY"}, {"O-9"}},
        Wrong{"another_device", another_device, {"capabilities"}, {"O-22"}},
        Wrong{"another_status", another_status, {"capabilities"}, {"O-23"}},
        Wrong{"optional_is_required", optional_is_required, {"capabilities"}, {"O-24"}},
        Wrong{"attaches_to_what_is_enabled", attaches_to_what_is_enabled, {"capabilities"}, {"O-25"}},
        Wrong{"enables_with_any_device", enables_with_any_device, {"capabilities"}, {"O-26"}},
        Wrong{"maps_that_stay", maps_that_stay, {"DESTROY"}, {"O-10"}},
        Wrong{"connections_kept", connections_kept, {"the end of a guest"}, {"O-16"}},
        Wrong{"another_token", another_token, {"a guest taken over"}, {"O-17"}},
        Wrong{"deaf_to_flags_of_guests",
              deaf_to_flags_of_guests,
              {"a guest taken over", "GUEST_DESTROY"},
              {"O-18", "O-21"}},
        Wrong{"done_again", done_again, {"a guest taken over"}, {"O-19"}},
        Wrong{"deaf_to_keys", deaf_to_keys, {"a device that comes back"}, {"O-20"}},
        Wrong{"bare_cells", bare_cells, {"rights"}, {"S-1", "S-2", "S-3"}},
        Wrong{"header_without_version", header_without_version, {"a page that is written"}, {"S-4"}},
        Wrong{"header_of_another_slice", header_of_another_slice, {"a page that is written"}, {"Q-1"}},
        Wrong{"larger_command_ring", larger_command_ring, {"fields of commands"}, {"M-1"}},
        Wrong{"frozen_translation",
              frozen_translation,
              {"a page that is written", "ENABLE and DISABLE"},
              {"Q-8", "M-22"}},
        Wrong{"dirty_bits_that_stay",
              dirty_bits_that_stay,
              {"a page that is written", "ENABLE and DISABLE"},
              {"Q-7", "M-21"}},
        Wrong{"deaf_to_doorbells", deaf_to_doorbells, {"a page that is written"}, {"Q-11"}}),
    [](const auto &tested) { return std::string(tested.param.name); });

INSTANTIATE_TEST_SUITE_P(
    Ring, Breaks,
    testing::Values(Wrong{"marker_before_its_runs", marker_before_its_runs, {"SYNC"}, {"M-24"}},
                    Wrong{"lost_runs",
                          lost_runs,
                          {"eventfds that block", "a section that stays open", "UNMAP and a section",
                           "ENABLE and DISABLE", "SYNC", "a device that has just attached",
                           "a device whose connection has closed", "a pin and SYNC", "SPLIT and COLLAPSE"},
                          {"O-14", "S-7", "S-8", "S-10", "Q-9", "M-14", "M-22", "M-24", "M-29", "S-13"}},
                    Wrong{"lost_runs_of_a_full_ring", lost_runs, {"a full ring"}, {"Q-10", "Q-12"}},
                    Wrong{"lost_runs_beside_a_pin", lost_runs, {"a pin and UNMAP"}, {"S-14"}},
                    Wrong{"lost_runs_of_small_rings", lost_runs_of_small_rings, {"tails that lie"}, {"S-5"}},
                    Wrong{"lost_markers",
                          lost_markers,
                          {"commands in flight at a DESTROY", "epochs", "markers and completions"},
                          {"Q-17", "M-18", "M-25"}},
                    Wrong{"head_beyond_staged", head_beyond_staged, {"a page that is written"}, {"Q-2"}},
                    Wrong{"published_slots_that_change", published_slots_that_change, {"a full ring"}, {"Q-3"}},
                    Wrong{"no_slots_for_markers", no_slots_for_markers, {"a full ring"}, {"Q-4"}},
                    Wrong{"runs_beyond_memory", runs_beyond_memory, {"rings in OA space"}, {"S-9", "Q-5"}},
                    Wrong{"large_runs_anywhere", large_runs_anywhere, {"a page that is written"}, {"Q-6"}},
                    Wrong{"calls_for_nothing", calls_for_nothing, {"calls"}, {"Q-14"}},
                    Wrong{"never_rests", never_rests, {"pacing by release", "pacing by time"}, {"Q-15", "Q-16"}}),
    [](const auto &tested) { return std::string(tested.param.name); });

INSTANTIATE_TEST_SUITE_P(
    Command, Breaks,
    testing::Values(
        Wrong{"another_result",
              another_result,
              {"commands in flight at a DESTROY", "fields of commands", "what MAP refuses", "what UNMAP refuses",
               "what ENABLE, DISABLE and SYNC refuse", "UNMAP through a small ring", "what SPLIT and COLLAPSE refuse"},
              {"O-11", "M-5", "M-6", "M-7", "M-8", "M-17", "M-27"}},
        Wrong{"split_that_unmaps", split_that_unmaps, {"SPLIT and COLLAPSE"}, {"M-28"}},
        Wrong{"another_user_data", another_user_data, {"fields of commands"}, {"M-2"}},
        Wrong{"completions_without_slots", completions_without_slots, {"completions"}, {"M-2", "M-3"}},
        Wrong{"heads_believed", heads_believed, {"heads that lie"}, {"S-6"}},
        Wrong{"no_call_for_completions", no_call_for_completions, {"completions"}, {"M-4"}},
        Wrong{"unmap_and_enable_not_done", unmap_and_enable_not_done, {"commands in flight together"}, {"M-9", "M-10"}},
        Wrong{"more_rights", more_rights, {"translations"}, {"M-11"}},
        Wrong{"leniency_ignored", leniency_ignored, {"what MAP refuses", "what UNMAP refuses"}, {"M-12"}},
        Wrong{"unmap_completes_at_once",
              unmap_completes_at_once,
              {"UNMAP and a section", "a pin and UNMAP"},
              {"M-13", "S-12"}},
        Wrong{"harvest_thrown_away", harvest_thrown_away, {"UNMAP and a section"}, {"M-14"}},
        Wrong{"harvest_swapped", harvest_swapped, {"UNMAP DEFERRED and DISCARD"}, {"M-15", "M-16"}},
        Wrong{"the_same_epoch", the_same_epoch, {"UNMAP", "epochs"}, {"M-18", "M-20"}},
        Wrong{"runs_behind_their_epoch", runs_behind_their_epoch, {"UNMAP"}, {"M-19"}},
        Wrong{"disable_not_done", disable_not_done, {"ENABLE and DISABLE"}, {"M-23"}},
        Wrong{"sync_completes_at_once",
              sync_completes_at_once,
              {"a device that has just attached", "a device whose connection has closed", "a pin and SYNC",
               "markers and completions"},
              {"O-14", "S-10", "M-25", "S-13"}},
        Wrong{"maps_held_up_by_sync", maps_held_up_by_sync, {"SYNC without room"}, {"M-26"}}),
    [](const auto &tested) { return std::string(tested.param.name); });

// Whoever ends in the middle is named, and nothing waits for it.
TEST(CheckService, NamesOneThatEnds)
{
    Daemon daemon;
    Verdicts verdicts(check::Role::service);
    const Check dies{"a service that ends", [](check::Context &) {}, {"F-10"}};
    daemon.process().signal(SIGTERM);
    ASSERT_TRUE(comes_true([&] { return daemon.process().ended(); }));
    EXPECT_FALSE(check::run(dies, verdicts, daemon.socket(), patience, [] { return "was ended by signal 15"; }));
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
