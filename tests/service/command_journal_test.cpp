// No command of a guest is lost, done twice or completed twice, wherever its home walker's process is killed.
//
// In one thread: the VMM, the walkers and the shards are what is stepped; a death is an exception at a point, or simply
// the end, of everything that a process takes along. What outlives it is in Memory. The shards are played: they keep
// the records that real ones keep, and complain when they are asked for what they need not stand.
#include "iommu/geometry.hpp"
#include "service/commands/commands.hpp"
#include "tests/engine/hook.hpp"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <array>
#include <deque>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <sys/mman.h>
#include <vector>

// What rapidcheck prints of a case.
inline void showValue(const dr_command &c, std::ostream &out)
{
    out << "{op " << c.opcode << " flags " << c.flags << " iova " << c.iova / DR_PAGE << " length "
        << c.length / DR_PAGE << " oa " << c.oa << "}";
}

namespace dirtyring::service {
namespace {

using iommu::Extent;
using iommu::ExtentMap;
using iommu::SliceRecord;
using test::Breaking;
using Random = std::mt19937_64;

constexpr std::uint64_t page = DR_PAGE;
constexpr unsigned slice_lg2 = 16;
constexpr unsigned aperture_lg2 = 18;
constexpr std::uint64_t aperture = 1ull << aperture_lg2;
constexpr unsigned shards = 4;
constexpr std::uint32_t ioas = 1;
constexpr std::uint32_t hwpt = 2;

bool chance(Random &random, unsigned one_in)
{
    return random() % one_in == 0;
}

dr_translation_header geometry()
{
    dr_translation_header h{};
    h.aperture_lg2 = aperture_lg2;
    h.slice_lg2 = slice_lg2;
    h.shards = shards;
    return h;
}

// ---- what outlives a worker -----------------------------------------------------------------------------------------

struct Marker {
    enum dr_marker kind;
    std::uint64_t payload;
    bool operator==(const Marker &) const = default;
};

// Of a slice: its record, its switch, and its ring, of which only markers matter here.
class SliceMemory
{
  public:
    SliceMemory()
        : base_(::mmap(nullptr, SliceRecord::size(geometry()), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))
    {
    }
    SliceMemory(const SliceMemory &) = delete;
    ~SliceMemory() { ::munmap(base_, SliceRecord::size(geometry())); }

    [[nodiscard]] SliceRecord record() const
    {
        return {static_cast<std::byte *>(base_), geometry(), [](std::uint64_t, std::uint64_t) { return 0; }};
    }
    [[nodiscard]] bool has(Marker m) const { return std::find(ring.begin(), ring.end(), m) != ring.end(); }

    bool armed = false;
    std::vector<Marker> ring;

  private:
    void *base_;
};

template <class Entry> struct RingMemory {
    RingMemory(dr_ring_kind kind, std::uint64_t capacity)
        : words(ring::producer_region_size(capacity, sizeof(Entry)) / sizeof(dr_ring_producer)), producer(words.data())
    {
        dr_ring_header header{};
        header.kind = kind;
        header.capacity = capacity;
        header.entry_size = sizeof(Entry);
        ring::make_producer_region(producer, header);
        consumer.armed = DR_DISARMED;
    }
    std::vector<dr_ring_producer> words;
    dr_ring_producer *producer;
    dr_ring_consumer consumer{};
};

struct Memory {
    explicit Memory(std::uint32_t n)
        : capacity(n), submissions(DR_RING_SUBMISSION, n), completions(DR_RING_COMPLETION, n), journal(n)
    {
    }
    std::uint32_t capacity;
    RingMemory<dr_command> submissions;
    RingMemory<dr_completion> completions;
    std::vector<CommandRecord> journal;
    HwptRecord hwpt_record{};
    std::array<SliceMemory, shards> slices;
};

using Complaints = std::vector<std::string>;

// ---- a worker -------------------------------------------------------------------------------------------------------

// Does what it is asked in small steps, now and then without success.
class PlayedShard final : public Shard
{
  public:
    PlayedShard(SliceMemory &memory, Random &random, Complaints &complaints)
        : memory_(memory), record_(memory.record()), random_(random), complaints_(complaints)
    {
        record_.restore();
    }

    void submit(ShardOp &op) override
    {
        for (const Job &job : jobs_) {
            if (on_range(op) && on_range(*job.op) && op.start < job.op->end && job.op->start < op.end)
                complain("two operations on one range");
            if (!on_range(op) && !on_range(*job.op) && (alone(op) || alone(*job.op)))
                complain("a change of tracking is not alone");
        }
        jobs_.push_back({&op});
        stirred_.set();
    }

    bool step(std::uint64_t) override
    {
        if (jobs_.empty())
            return false;
        const auto job = jobs_.begin() + static_cast<std::ptrdiff_t>(random_() % jobs_.size());
        if (advance(*job)) {
            ShardOp *op = job->op;
            jobs_.erase(job);
            op->done();
        }
        return true;
    }

    void cancel() override {}
    Rest prepare_sleep(std::uint64_t) override { return {}; }
    void wake() override {}
    void add(const iommu::DmaThreads &) override {}
    void remove(const iommu::DmaThreads &) override {}
    void bury(const iommu::DmaThreads &, std::function<void()>) override {}
    void made_large(std::uint64_t) override {}
    [[nodiscard]] ShardCounters counters() const override { return {}; }

  private:
    struct Job {
        ShardOp *op;
        bool begun = false;
        bool took_out = false;
        bool marked = false;
    };

    static bool on_range(const ShardOp &op) { return op.kind == ShardOp::Kind::map || op.kind == ShardOp::Kind::unmap; }

    static bool alone(const ShardOp &op)
    {
        return op.kind == ShardOp::Kind::enable || op.kind == ShardOp::Kind::disable;
    }

    static bool marks(const ShardOp &op) { return op.epoch != 0 && (*op.note & UnmapNote::marked) != 0; }

    void complain(const char *what) { complaints_.emplace_back(what); }

    std::optional<SliceRecord::Found> first_in(std::uint64_t start, std::uint64_t end) const
    {
        std::optional<SliceRecord::Found> first;
        record_.for_each([&](const SliceRecord::Found &f) {
            if (f.extent.start < end && start < f.extent.end && (!first || f.extent.start < first->extent.start))
                first = f;
        });
        return first;
    }

    // True: it is over.
    bool advance(Job &job)
    {
        ShardOp &op = *job.op;
        op.result = 0;
        switch (op.kind) {
        case ShardOp::Kind::map:
            return map(job, op);
        case ShardOp::Kind::unmap:
            return unmap(job, op);
        case ShardOp::Kind::sync:
            return mark(job, {DR_MARKER_SYNC, op.cookie});
        case ShardOp::Kind::split:
        case ShardOp::Kind::collapse:
            return std::exchange(job.begun, true);
        default:
            break;
        }
        const bool enable = op.kind == ShardOp::Kind::enable;
        if (!job.begun && memory_.armed == enable && !op.again)
            complain("tracking is so already");
        memory_.armed = enable;
        return !std::exchange(job.begun, true) ? false : true;
    }

    bool mark(Job &job, Marker marker)
    {
        if (job.marked)
            return true;
        memory_.ring.push_back(marker);
        job.marked = true;
        return false;
    }

    bool map(Job &job, ShardOp &op)
    {
        const auto there = first_in(op.start, op.end);
        if (!there) {
            if (chance(random_, 8)) {
                op.result = -ENOMEM;
                return true;
            }
            static_cast<void>(record_.reserve(1));
            record_.add({op.start, op.end, op.oa, op.rights}, op.continues ? SliceRecord::continues : 0);
            job.begun = true;
            return false;
        }
        const Extent &e = there->extent;
        if (e.start != op.start || e.end != op.end || e.oa != op.oa || e.rights != op.rights ||
            there->continues != op.continues || (!job.begun && !op.again))
            complain("something is mapped there");
        job.begun = true;
        if (there->whole)
            return true;
        if (chance(random_, 8)) {
            if (!op.again) // what a worker before has made may stay
                record_.remove(there->extent.tag);
            op.result = -ENOMEM;
            return true;
        }
        record_.set_whole(there->extent.tag);
        return false;
    }

    bool unmap(Job &job, ShardOp &op)
    {
        const auto there = first_in(op.start, op.end);
        if (!job.begun) {
            if (!there && !op.again)
                complain("nothing is mapped there");
            if (there && there->extent.start < op.start)
                complain("a map is cut in two");
            if (there && there->continues)
                record_.part(there->extent.tag);
            if (op.epoch != 0 && (*op.note & UnmapNote::decided) == 0)
                *op.note = UnmapNote::decided | (memory_.armed ? UnmapNote::marked : 0);
            job.begun = true;
            if (op.epoch == 0 || marks(op) || !memory_.armed)
                return false;
            op.reached = there ? there->extent.start : op.end; // a part before was not reported, this one would be
            op.result = there ? -EAGAIN : 0;
            return true;
        }
        const Marker marker{DR_MARKER_EPOCH, op.epoch};
        if (!there) {
            op.reached = op.end;
            return !marks(op) || (!job.took_out && !op.again) ? true : mark(job, marker);
        }
        if (there->extent.end > op.end)
            complain("a map is cut in two");
        if (!there->whole && !op.again)
            complain("half a map is unmapped");
        if (chance(random_, 8)) {
            op.result = -EAGAIN;
            op.reached = there->extent.start;
            if (marks(op) && (job.took_out || op.again))
                memory_.ring.push_back(marker);
            return true;
        }
        const std::uint64_t half = (there->extent.start + there->extent.end) / 2 / page * page;
        if (half > there->extent.start && chance(random_, 2))
            record_.cut(there->extent.tag, half);
        else
            record_.remove(there->extent.tag);
        job.took_out = true;
        return false;
    }

    SliceMemory &memory_;
    SliceRecord record_;
    Random &random_;
    Complaints &complaints_;
    std::deque<Job> jobs_;
};

// A worker's life. Half of the shards are another walker's.
class Life
{
  public:
    enum class Objects { all, none };

    Life(Memory &memory, Random &random, Complaints &complaints, std::function<void()> call, bool restarted,
         Objects objects = Objects::all)
    {
        Commands::Config config;
        config.home = &home_;
        config.capacity = memory.capacity;
        config.submissions = &memory.submissions.consumer;
        config.submissions_peer = memory.submissions.producer;
        config.completions = memory.completions.producer;
        config.completions_peer = &memory.completions.consumer;
        config.call = std::move(call);
        config.journal = memory.journal;
        config.restarted = restarted;
        commands_.emplace(std::move(config));
        commands_->add_memory(0, 1ull << 40);
        if (objects == Objects::all) {
            HwptRoute route{ioas, aperture_lg2, slice_lg2, 52, 1u << 12, true, true, {}, &memory.hwpt_record};
            for (unsigned i = 0; i < shards; ++i) {
                shards_.push_back(std::make_unique<PlayedShard>(memory.slices[i], random, complaints));
                route.shards.push_back({shards_.back().get(), i % 2 == 0 ? &home_ : &other_});
            }
            commands_->add_ioas(ioas);
            commands_->add_hwpt(hwpt, std::move(route));
        }
        if (!restarted)
            return;
        if (objects == Objects::all) {
            std::vector<SliceRecord> records;
            for (const SliceMemory &slice : memory.slices)
                records.push_back(slice.record());
            commands_->restore_extents(ioas, records);
        }
        EXPECT_FALSE(commands_->step(0)) << "before restored()";
        commands_->restored();
    }

    void kick() { asleep_ = false; }

    // A round of the home walker, or its sleep.
    void step_home()
    {
        if (home_.drain())
            asleep_ = false;
        if (asleep_)
            return;
        commands_->wake();
        if (!commands_->step(0))
            asleep_ = !commands_->prepare_sleep(0).busy;
    }
    void step_other() { other_.drain(); }
    void step_shard(std::size_t i)
    {
        if (shards_[i]->step(0) && i % 2 == 0)
            asleep_ = false;
    }

  private:
    Inbox home_;
    Inbox other_;
    std::vector<std::unique_ptr<Shard>> shards_;
    std::optional<Commands> commands_;
    bool asleep_ = false;
};

// ---- the VMM, which knows what must come of its commands ------------------------------------------------------------

class Vmm
{
  public:
    Vmm(Memory &memory, std::vector<dr_command> commands, Complaints &complaints)
        : memory_(memory), submissions_(memory.submissions.producer, &memory.submissions.consumer),
          completions_(&memory.completions.consumer, memory.completions.producer, memory.capacity),
          commands_(std::move(commands)), times_(commands_.size()), complaints_(complaints)
    {
        for (std::size_t i = 0; i < commands_.size(); ++i)
            commands_[i].user_data = i;
    }

    void call() { called_ = true; }

    // Submits and reaps until it has to wait. True: the service is to be kicked.
    bool run(Random &random)
    {
        if (asleep_ && !std::exchange(called_, false))
            return false;
        asleep_ = false;
        submissions_.want_kick(false);
        completions_.disarm();
        bool kick = false;
        const auto completed = completions_.peek();
        for (const dr_completion &c : completed)
            judge(c);
        if (!completed.empty())
            kick |= completions_.release(completed.size());
        for (std::uint64_t n = random() % 4; n > 0 && next_ < commands_.size() && submissions_.room() > 0; --n) {
            submissions_.put(0, commands_[next_++]);
            submissions_.stage(1);
            kick |= submissions_.publish();
        }
        if (next_ == commands_.size() || submissions_.room() == 0) {
            submissions_.want_kick(next_ < commands_.size());
            asleep_ = completions_.arm() && (next_ == commands_.size() || submissions_.room() == 0);
        }
        return kick;
    }

    [[nodiscard]] std::size_t missing() const
    {
        return static_cast<std::size_t>(std::count(times_.begin(), times_.end(), 0u));
    }
    [[nodiscard]] std::size_t twice() const
    {
        return static_cast<std::size_t>(std::count_if(times_.begin(), times_.end(), [](unsigned n) { return n > 1; }));
    }

    // When everything is completed.
    void judge_memory() const
    {
        for (std::uint64_t at = 0; at < aperture; at += page) {
            std::optional<Extent> found;
            memory_.slices[at >> slice_lg2].record().for_each([&](const SliceRecord::Found &f) {
                if (f.extent.start <= at && at < f.extent.end) {
                    found = f.extent;
                    found->oa += at - found->start;
                    check(f.whole, "half a map has stayed");
                }
            });
            check(found ? maps_.maps_to(at, at + page, found->oa, found->rights) : !maps_.first_in(at, at + page),
                  "what is mapped is not what was asked for");
        }
        for (const SliceMemory &slice : memory_.slices)
            check(slice.armed == enabled_, "a shard's tracking is not what was asked for");
    }

  private:
    void check(bool good, const char *what) const
    {
        if (!good)
            complaints_.emplace_back(what);
    }

    void judge(const dr_completion &c)
    {
        if (c.user_data >= next_)
            return check(false, "what was not submitted is completed");
        if (++times_[c.user_data] > 1)
            return;
        const dr_command &r = commands_[c.user_data];
        for (std::size_t before = 0; before < c.user_data; ++before)
            check(times_[before] > 0 || !meet(commands_[before], r), "one has overtaken another that it meets");
        if (r.object != (is_range(r) ? ioas : hwpt))
            return check(c.result == -ENOENT, "there is no such object");
        switch (r.opcode) {
        case DR_OP_MAP:
            return judge_map(r, c);
        case DR_OP_UNMAP:
            return judge_unmap(r, c);
        case DR_OP_SYNC:
            check(c.result == 0, "a sync cannot fail");
            for (const SliceMemory &slice : memory_.slices)
                check(slice.has({DR_MARKER_SYNC, r.cookie}), "a sync's marker is missing");
            return;
        case DR_OP_SPLIT:
        case DR_OP_COLLAPSE:
            return check(c.result == 0, "a resize cannot fail here");
        default:
            check(c.result == (enabled_ == (r.opcode == DR_OP_ENABLE) ? -EALREADY : 0), "result of enable or disable");
            enabled_ = r.opcode == DR_OP_ENABLE;
        }
    }

    void judge_map(const dr_command &r, const dr_completion &c)
    {
        const std::uint64_t end = r.iova + r.length;
        const iommu::Rights rights{true, (r.flags & DR_MAP_WRITE) != 0};
        const bool there = maps_.first_in(r.iova, end).has_value();
        const bool so = (r.flags & DR_MAP_IDEMPOTENT) != 0 && maps_.maps_to(r.iova, end, r.oa, rights);
        if (there)
            return check(c.result == (so ? 0 : -EEXIST), "a map where something is");
        check(c.result == 0 || c.result == -ENOMEM, "a map where nothing is");
        if (c.result == 0)
            maps_.insert({r.iova, end, r.oa, rights});
    }

    void judge_unmap(const dr_command &r, const dr_completion &c)
    {
        const std::uint64_t end = r.length == UINT64_MAX ? aperture : r.iova + r.length;
        const bool empty = !maps_.first_in(r.iova, end);
        if (maps_.spans(r.iova) || maps_.spans(end) || (empty && (r.flags & DR_UNMAP_EMPTY_OK) == 0))
            return check(c.result == -ENOENT, "an unmap of nothing, or of half a map");
        check(c.result == 0 ? c.done == end - r.iova : !empty && c.result == -EAGAIN && c.done < end - r.iova,
              "result of an unmap");
        if (c.epoch != 0) {
            check(epochs_.insert(c.epoch).second, "an epoch is used twice");
            for (std::uint64_t at = r.iova; at < r.iova + c.done; at += page)
                check(!maps_.first_in(at, at + page) || memory_.slices[at >> slice_lg2].has({DR_MARKER_EPOCH, c.epoch}),
                      "an unmap's marker is missing");
        }
        maps_.erase(r.iova, r.iova + c.done);
    }

    static bool is_range(const dr_command &r) { return r.opcode == DR_OP_MAP || r.opcode == DR_OP_UNMAP; }
    static bool meet(const dr_command &a, const dr_command &b)
    {
        const auto end = [](const dr_command &r) { return r.length == UINT64_MAX ? aperture : r.iova + r.length; };
        if (a.object != b.object || is_range(a) != is_range(b))
            return false;
        const auto alone = [](const dr_command &r) { return r.opcode == DR_OP_ENABLE || r.opcode == DR_OP_DISABLE; };
        return is_range(a) ? a.iova < end(b) && b.iova < end(a) : alone(a) || alone(b);
    }

    Memory &memory_;
    ring::Producer<dr_command> submissions_;
    ring::Consumer<dr_completion> completions_;
    std::vector<dr_command> commands_;
    std::size_t next_ = 0;
    bool asleep_ = false;
    bool called_ = false;
    std::vector<unsigned> times_;
    Complaints &complaints_;
    ExtentMap maps_;
    bool enabled_ = false;
    std::set<std::uint64_t> epochs_;
};

// ---- scenarios ------------------------------------------------------------------------------------------------------

struct Killed {
};

struct Deaths {
    std::optional<Point> at; // else anywhere
    unsigned one_in;         // of the times it gets there
    unsigned most = 8;
};

struct Outcome {
    std::size_t missing = 0;
    std::size_t twice = 0;
    unsigned deaths = 0;
    Complaints complaints;
    [[nodiscard]] bool bad() const { return missing + twice + complaints.size() > 0; }
};

std::ostream &operator<<(std::ostream &out, const Outcome &o)
{
    out << o.missing << " missing, " << o.twice << " completed twice, " << o.deaths << " deaths";
    for (const std::string &c : o.complaints)
        out << "; " << c;
    return out;
}

Outcome run(std::vector<dr_command> commands, std::uint32_t capacity, std::uint64_t seed, Deaths deaths)
{
    Random random(seed);
    Memory memory(capacity);
    Outcome outcome;
    Vmm vmm(memory, std::move(commands), outcome.complaints);
    const auto die_here = [&] {
        if (outcome.deaths < deaths.most && chance(random, deaths.one_in)) {
            ++outcome.deaths;
            throw Killed{};
        }
    };
    at_point = [&](Point p) {
        if (!deaths.at || *deaths.at == p)
            die_here();
    };
    std::optional<Life> life;
    bool restarted = false;
    constexpr unsigned patience = 20'000;
    for (unsigned i = 0; vmm.missing() > 0 && i < patience; ++i) {
        try {
            if (!life) {
                life.emplace(
                    memory, random, outcome.complaints, [&] { vmm.call(); }, restarted);
                restarted = true;
            }
            switch (const std::uint64_t what = random() % (3 + shards)) {
            case 0:
                if (vmm.run(random))
                    life->kick();
                break;
            case 1:
                life->step_home();
                break;
            case 2:
                life->step_other();
                break;
            default:
                life->step_shard(what - 3);
            }
            if (!deaths.at)
                die_here();
        } catch (const Killed &) {
            life.reset();
            restarted = true;
        }
    }
    at_point = nullptr;
    outcome.missing = vmm.missing();
    outcome.twice = vmm.twice();
    if (outcome.missing == 0)
        vmm.judge_memory();
    return outcome;
}

dr_command map(std::uint64_t at, std::uint64_t pages, std::uint64_t oa, std::uint32_t flags = 0)
{
    return {0, DR_OP_MAP, flags | DR_MAP_READ, ioas, 0, at * page, pages * page, oa + at * page, 0, 0};
}

dr_command unmap(std::uint64_t at, std::uint64_t pages, std::uint32_t flags = 0)
{
    return {0, DR_OP_UNMAP, flags, ioas, 0, at * page, pages * page, 0, 0, 0};
}

dr_command on_hwpt(dr_opcode opcode, std::uint64_t cookie = 0)
{
    return {0, opcode, 0, hwpt, 0, 0, 0, 0, cookie, 0};
}

dr_command resize(std::uint64_t at, std::uint64_t pages)
{
    return {0,
            static_cast<std::uint32_t>(at % 2 == 0 ? DR_OP_SPLIT : DR_OP_COLLAPSE),
            0,
            hwpt,
            12,
            at * page,
            pages * page,
            0,
            0,
            0};
}

// OA - IOVA is one of two, so that maps side by side look like one.
rc::Gen<dr_command> any_command()
{
    return rc::gen::exec([] {
        const std::uint64_t pages = aperture / page;
        const auto at = *rc::gen::inRange<std::uint64_t>(0, pages);
        const auto length = *rc::gen::inRange<std::uint64_t>(1, std::min(pages - at, pages / 2) + 1);
        const auto offset = *rc::gen::inRange<std::uint64_t>(0, 2) << 30;
        dr_command c{};
        switch (*rc::gen::weightedElement<int>({{6, 0}, {5, 1}, {1, 2}, {2, 3}, {2, 4}, {2, 5}, {2, 6}})) {
        case 0:
            c = map(at, length, offset,
                    *rc::gen::element<std::uint32_t>(DR_MAP_WRITE, DR_MAP_WRITE | DR_MAP_IDEMPOTENT));
            break;
        case 1:
            c = unmap(at, length,
                      *rc::gen::element<std::uint32_t>(0, DR_UNMAP_EMPTY_OK, DR_UNMAP_DEFERRED, DR_UNMAP_DISCARD));
            break;
        case 2:
            c = unmap(at, 1, DR_UNMAP_EMPTY_OK);
            c.length = UINT64_MAX;
            break;
        case 3:
            c = on_hwpt(DR_OP_SYNC, *rc::gen::inRange<std::uint64_t>(1, 1u << 30));
            break;
        case 4:
            c = on_hwpt(DR_OP_ENABLE);
            break;
        case 5:
            c = resize(at, length);
            break;
        default:
            c = on_hwpt(DR_OP_DISABLE);
        }
        if (*rc::gen::inRange(0, 20) == 0)
            c.object = 9;
        return c;
    });
}

void check_all(Deaths deaths)
{
    unsigned died = 0;
    EXPECT_TRUE(rc::check([&] {
        const auto n = *rc::gen::inRange<std::size_t>(1, 60);
        const auto commands = *rc::gen::container<std::vector<dr_command>>(n, any_command());
        const auto capacity = *rc::gen::element<std::uint32_t>(2, 4, 16);
        const auto seed = *rc::gen::arbitrary<std::uint64_t>();
        const Outcome outcome = run(commands, capacity, seed, deaths);
        died += outcome.deaths;
        if (outcome.bad())
            RC_FAIL(testing::PrintToString(outcome));
    }));
    EXPECT_TRUE(died > 100 || deaths.most == 0) << died;
}

TEST(CommandJournal, NobodyDies)
{
    check_all({std::nullopt, 1, 0});
}

TEST(CommandJournal, DiesAnywhere)
{
    check_all({std::nullopt, 20});
}

class Dies : public testing::TestWithParam<Point>
{
};

TEST_P(Dies, AndNothingIsLostOrDoneTwice)
{
    check_all({GetParam(), 4});
}

std::string name_of(const testing::TestParamInfo<Point> &info)
{
    constexpr std::array names{
#define X(name) #name,
        DIRTYRING_POINTS(X)
#undef X
    };
    return names[static_cast<std::size_t>(info.param)];
}

INSTANTIATE_TEST_SUITE_P(At, Dies,
                         testing::Values(Point::command_recorded, Point::command_taken, Point::command_begun,
                                         Point::command_done, Point::command_completed),
                         name_of);

// ---- one thing at a time --------------------------------------------------------------------------------------------

// A worker that is looked at by hand, and what its VMM gets.
struct Bench {
    explicit Bench(std::uint32_t capacity = 4)
        : memory(capacity), submissions(memory.submissions.producer, &memory.submissions.consumer),
          completions(&memory.completions.consumer, memory.completions.producer, capacity)
    {
    }

    void submit(dr_command c, std::uint64_t user_data)
    {
        c.user_data = user_data;
        submissions.put(0, c);
        submissions.stage(1);
        if (submissions.publish())
            life->kick();
    }

    void start(bool restarted, Life::Objects objects = Life::Objects::all)
    {
        life.reset();
        life.emplace(
            memory, random, complaints, [this] { ++calls; }, restarted, objects);
    }

    // Dies there, in its next round.
    void die_at(Point point)
    {
        const test::Hook hook(point, [] { throw Killed{}; });
        EXPECT_THROW(life->step_home(), Killed);
        life.reset();
    }

    // The results that come, as {user_data, result}.
    std::vector<std::pair<std::uint64_t, int>> results(Life::Objects objects = Life::Objects::all)
    {
        std::vector<std::pair<std::uint64_t, int>> found;
        for (unsigned i = 0; i < 200; ++i) {
            life->step_home();
            life->step_other();
            for (unsigned s = 0; s < shards && objects == Life::Objects::all; ++s)
                life->step_shard(s);
            const auto completed = completions.peek();
            for (const dr_completion &c : completed)
                found.emplace_back(c.user_data, c.result);
            if (!completed.empty() && completions.release(completed.size()))
                life->kick();
        }
        EXPECT_TRUE(complaints.empty()) << testing::PrintToString(complaints);
        return found;
    }

    Random random{1};
    Memory memory;
    ring::Producer<dr_command> submissions;
    ring::Consumer<dr_completion> completions;
    Complaints complaints;
    unsigned calls = 0;
    std::optional<Life> life;
};

using Results = std::vector<std::pair<std::uint64_t, int>>;

TEST(CommandRestart, ObjectIsGone)
{
    Bench b;
    b.start(false);
    b.submit(on_hwpt(DR_OP_ENABLE), 1);
    b.life->step_home(); // begun
    b.submit(on_hwpt(DR_OP_SYNC), 2);
    b.die_at(Point::command_taken);
    b.start(true, Life::Objects::none);
    EXPECT_EQ(b.results(Life::Objects::none), (Results{{1, -ECANCELED}, {2, -ENOENT}}));
}

TEST(CommandRestart, DeathBetweenStageAndPublish)
{
    Bench b;
    b.start(false);
    b.submit(on_hwpt(DR_OP_DISABLE), 1);
    b.die_at(Point::command_done);
    b.memory.completions.producer->staged = 1;
    b.start(true);
    EXPECT_EQ(b.results(), (Results{{1, -EALREADY}}));
    EXPECT_EQ(b.memory.completions.producer->staged, 1u);
}

// Two deaths: that of the worker which put the tail behind what its predecessor had recorded must not undo it.
TEST(CommandRestart, DeathInRestored)
{
    Bench b;
    b.start(false);
    b.submit(on_hwpt(DR_OP_DISABLE), 1);
    b.die_at(Point::command_recorded);
    EXPECT_EQ(b.memory.submissions.consumer.tail, 0u);
    b.start(true);
    EXPECT_EQ(b.memory.submissions.consumer.tail, 1u);
    b.die_at(Point::command_completed);
    b.start(true);
    EXPECT_EQ(b.results(), (Results{{1, -EALREADY}}));
}

TEST(CommandRestart, RollsBackToTheEnd)
{
    Bench b;
    b.start(false);
    b.submit(map(0, 32, 0), 0);
    b.die_at(Point::command_begun);
    for (CommandRecord &r : b.memory.journal) {
        if (r.state == CommandRecord::begun)
            CommandJournal::roll_back(r, -ENOMEM);
    }
    SliceRecord slice = b.memory.slices[1].record();
    ASSERT_EQ(slice.reserve(1), 0);
    slice.add({16 * page, 32 * page, 16 * page, {true, false}}, SliceRecord::whole | SliceRecord::continues);
    b.start(true);
    EXPECT_EQ(b.results(), (Results{{0, -ENOMEM}}));
    b.submit(unmap(0, 64), 1);
    EXPECT_EQ(b.results(), (Results{{1, -ENOENT}}));
}

// What three maps have left: one over two slices, in three pieces; one that has begun again before where half of
// another was unmapped; the rest.
TEST(CommandRestart, KnowsWhatIsOneMap)
{
    Bench b;
    std::vector<SliceRecord> slices;
    for (const SliceMemory &memory : b.memory.slices) {
        slices.push_back(memory.record());
        ASSERT_EQ(slices.back().reserve(2), 0);
    }
    const auto add = [](SliceRecord &slice, std::uint64_t start, std::uint64_t end, bool continues) {
        return slice.add({start * page, end * page, start * page, {true, false}},
                         SliceRecord::whole | (continues ? SliceRecord::continues : 0));
    };
    add(slices[0], 8, 12, false); // in two pieces, whose leaves differ
    add(slices[0], 12, 16, true);
    add(slices[1], 16, 20, true);
    add(slices[1], 24, 32, false);
    slices[2].part(add(slices[2], 32, 48, true));
    b.start(true);
    b.submit(unmap(8, 8), 1);
    b.submit(unmap(16, 4), 2);
    b.submit(unmap(12, 8), 4);
    EXPECT_EQ(b.results(), (Results{{1, -ENOENT}, {2, -ENOENT}, {4, -ENOENT}}));
    b.random.seed(3); // none of the shards' refusals
    b.submit(unmap(24, 8), 3);
    EXPECT_EQ(b.results(), (Results{{3, 0}}));
}

TEST(CommandRestart, NonsenseCompletesWithAnError)
{
    Bench b(8);
    const auto put = [&](std::size_t at, dr_command c, std::uint64_t index, std::uint64_t state) {
        c.user_data = at;
        b.memory.journal[at] = {c, index, 0, 0, {}, 0, state};
    };
    put(0, on_hwpt(DR_OP_SYNC), 0, 77);
    put(1, on_hwpt(DR_OP_SYNC), 8, CommandRecord::taken); // beyond what the ring could hold
    put(2, map(60, 8, 0), 1, CommandRecord::begun);       // outside
    put(3, on_hwpt(DR_OP_SYNC), 2, CommandRecord::rolling_back);
    put(4, map(0, 8, 0), 3, CommandRecord::rolling_back); // without an error
    put(5, {0, 99, 0, hwpt, 0, 0, 0, 0, 0, 0}, 4, CommandRecord::begun);
    put(6, unmap(0, 1, DR_UNMAP_EMPTY_OK), 5, CommandRecord::taken);
    put(7, unmap(0, 1, DR_UNMAP_EMPTY_OK), 5, CommandRecord::taken); // the same again
    b.start(true);
    Results results = b.results();
    std::sort(results.begin(), results.end());
    const auto failed = static_cast<std::size_t>(
        std::count_if(results.begin(), results.end(), [](const auto &r) { return r.second == -EIO; }));
    EXPECT_EQ(results.size(), 8u);
    EXPECT_EQ(failed, 7u);
    EXPECT_EQ(b.memory.submissions.consumer.tail, 6u);
}

TEST(CommandRestart, AnyJournalIsSurvived)
{
    EXPECT_TRUE(rc::check([] {
        Bench b;
        const auto seed = *rc::gen::arbitrary<std::uint64_t>();
        Random random(seed);
        for (CommandRecord &r : b.memory.journal) {
            r.request = *any_command();
            r.index = random() % 8;
            r.completed_at = random() % 4;
            r.state = random() % 7;
            r.completion.result = static_cast<int>(random() % 3) - 1;
            if (chance(random, 8))
                r.request.iova = random();
            if (chance(random, 8))
                r.index = random();
        }
        b.memory.completions.producer->head = b.memory.completions.consumer.tail = random() % 4;
        b.memory.completions.producer->staged = b.memory.completions.producer->head + random() % 2;
        b.start(true);
        b.complaints.clear();
        for (unsigned i = 0; i < 400; ++i) {
            b.life->step_home();
            b.life->step_other();
            b.life->step_shard(i % shards);
        }
        for (const CommandRecord &r : b.memory.journal)
            RC_ASSERT(r.state == CommandRecord::free);
    }));
}

// What devices wrote before the first life's unmap must lie before that very epoch.
TEST(CommandRestart, UnmapKeepsItsEpoch)
{
    Bench b;
    b.memory.hwpt_record.enabled = 1;
    for (SliceMemory &slice : b.memory.slices)
        slice.armed = true;
    SliceRecord slice = b.memory.slices[1].record();
    ASSERT_EQ(slice.reserve(1), 0);
    slice.add({16 * page, 17 * page, 0, {true, false}}, SliceRecord::whole);
    b.start(true);
    b.submit(unmap(16, 1), 7);
    b.die_at(Point::command_begun);
    b.start(true);
    EXPECT_EQ(b.results().size(), 1u);
    EXPECT_TRUE(b.memory.slices[1].has({DR_MARKER_EPOCH, 1}));
    EXPECT_EQ(b.memory.hwpt_record.epoch, 1u);
}

// The VMM takes its tail back while the service is dead: nothing is taken until it has gone on.
TEST(CommandRestart, TailThatWentBack)
{
    Bench b;
    b.start(false);
    for (std::uint64_t i = 0; i < 4; ++i) {
        b.submit(on_hwpt(DR_OP_DISABLE), i);
        EXPECT_EQ(b.results().size(), 1u);
    }
    b.submit(on_hwpt(DR_OP_DISABLE), 4);
    b.die_at(Point::command_taken);
    b.memory.completions.consumer.tail = 0;
    b.start(true);
    b.life->step_home();
    for (std::uint64_t i = 5; i < 9; ++i)
        b.submit(on_hwpt(DR_OP_SYNC), i);
    b.life->step_home();
    EXPECT_EQ(b.submissions.room(), 0u);
    EXPECT_EQ(b.results().size(), 5u);
}

// ---- negative controls ----------------------------------------------------------------------------------------------

// Dies after it has taken a command, and before it does anything of it.
Outcome died_after_taking()
{
    return run({map(0, 4, 0)}, 4, 1, {Point::command_taken, 1, 1});
}

// The worker dies between its completion and its call; the VMM sleeps.
Outcome died_before_call()
{
    return run({on_hwpt(DR_OP_DISABLE)}, 4, 1, {Point::command_completed, 1, 1});
}

void expect_control(Rule rule, Outcome (*scenario)())
{
    const Outcome sound = scenario();
    EXPECT_EQ(sound.deaths, 1u);
    EXPECT_FALSE(sound.bad()) << sound;
    const Breaking breaking(rule);
    const Outcome broken = scenario();
    EXPECT_GT(broken.missing, 0u) << broken;
}

TEST(CommandControls, CommandsNotRecorded)
{
    expect_control(Rule::commands_not_recorded, died_after_taking);
}

TEST(CommandControls, RestartWithoutCall)
{
    expect_control(Rule::restart_without_call, died_before_call);
}

} // namespace
} // namespace dirtyring::service
