// An hwpt within the test's process: its regions as the service makes them, its shards, rings and their consumer, the
// guest's memory and device threads. Everything has one mapping for all parties, so that TSan sees what they share. One
// thread, unless a member says otherwise.
#pragma once

#include "client/retained_map.hpp"
#include "iommu/any_dma.hpp"
#include "ring/consumer.hpp"
#include "ring/control.h"
#include "ring/region.hpp"
#include "service/engine/shard.hpp"

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace dirtyring::test {

inline constexpr std::uint64_t page_size = DR_PAGE;
inline constexpr std::uint64_t KiB = 1024;
inline constexpr std::uint64_t MiB = 1024 * KiB;
inline constexpr std::uint64_t GiB = 1024 * MiB;
inline constexpr iommu::Rights read_write{true, true};

#if defined(__SANITIZE_THREAD__)
inline constexpr bool under_tsan = true;
#else
inline constexpr bool under_tsan = false;
#endif
#if defined(__SANITIZE_ADDRESS__) // gcc's
inline constexpr bool sanitized = true;
#elif defined(__has_feature)
inline constexpr bool sanitized = under_tsan || __has_feature(address_sanitizer); // clang's
#else
inline constexpr bool sanitized = under_tsan;
#endif

using Harvest = service::ShardOp::Harvest;
using OpKind = service::ShardOp::Kind;
using Device = iommu::AnyDmaThread;

struct Op final : service::ShardOp {
    Op() { note = &note_word; }
    Op(const Op &) = delete;
    void done() override { finished.store(true, std::memory_order_release); }
    [[nodiscard]] bool over() const { return finished.load(std::memory_order_acquire); }
    // Of the completion of an unmap.
    [[nodiscard]] std::uint64_t told_epoch() const { return (*note & service::UnmapNote::marked) != 0 ? epoch : 0; }
    std::atomic<bool> finished{false};
    unsigned shard = 0;
    std::uint64_t note_word = 0;
};

// Private memory that is there once it is touched.
class Memory
{
  public:
    explicit Memory(std::uint64_t size);
    Memory(const Memory &) = delete;
    ~Memory();
    [[nodiscard]] std::byte *data() const { return data_; }
    [[nodiscard]] std::uint64_t size() const { return size_; }

  private:
    std::byte *data_;
    std::uint64_t size_;
};

// True: the page differed. Devices may be writing to it, as in every migration: what they write later is reported
// later.
bool copy_page(std::byte *to, const std::byte *from);

// A word that another thread may be writing.
std::uint64_t peek_word(const std::byte *at);

inline unsigned default_format = iommu::AmdV1::id;

struct RigOptions {
    unsigned format = default_format;
    unsigned levels = 0; // 0: as few as will do
    bool tracked = true;
    bool always_on = false;
    unsigned aperture_lg2 = 39;
    unsigned shards = 1;
    unsigned leaf_lg2_max = iommu::largest_leaf_lg2;
    bool all_sizes = false;
    bool collapse = false;
    dr_split split = DR_SPLIT_NONE;
    iommu::Break how = iommu::Break::none;
    service::Visit visit{};
    dr_space space = DR_SPACE_OA;
    std::uint64_t capacity = 1024;
    std::uint64_t min_interval_ns = 0;
    std::uint64_t memory = 64 * MiB; // of the guest, from OA 0
    unsigned devices = 2;            // one thread each
    unsigned pins = 16;              // slots of each
    std::uint64_t stall_ns = UINT64_MAX;
};

// DMA that is in flight without a section.
struct Pin {
    bool write = true;
    unsigned slot = 0;
    int error = 0; // of the attempt; else it is held
    iommu::DmaFault fault;
    std::vector<std::span<std::byte>> pieces;
    std::uint64_t bells = 0; // shards whose walkers must be rung
};

// In a section of its own.
Pin make_pin(Device &device, std::uint64_t iova, std::uint64_t length, bool write);

class Rig
{
  public:
    explicit Rig(const RigOptions &options = {});
    Rig(const Rig &) = delete;

    // ---- walker

    service::Shard &shard(unsigned i = 0) { return *shards_[i].shard; }
    [[nodiscard]] unsigned shards() const { return options_.shards; }
    [[nodiscard]] unsigned shard_of(std::uint64_t iova) const
    {
        return static_cast<unsigned>(iova >> geometry.slice_lg2);
    }
    bool step(unsigned i = 0) { return shards_[i].shard->step(now += 1000); }
    bool step_all();
    // The shard's owner has died, wherever it was; another takes up its memory, and the operations that got no answer
    // come again.
    void restart(unsigned i = 0);
    // Steps all shards until there is nothing to do at once. False: there always is something.
    bool settle();

    // ---- operations; the memory of each stays until the end of the rig

    // Gives an operation to its walker, and what the VMM does while it waits; for walkers in threads of their own.
    // `proceed` answers false when patience is at an end.
    std::function<void(Op &)> deliver;
    std::function<bool()> proceed;

    Op &submit(unsigned shard, OpKind kind);
    Op &submit_map(std::uint64_t iova, std::uint64_t length, std::uint64_t oa, iommu::Rights rights = read_write);
    Op &submit_unmap(std::uint64_t iova, std::uint64_t length, Harvest harvest = Harvest::now);
    // Leaves of [iova, iova + length) are to be 2^lg2 bytes at most, or at least where they can.
    Op &submit_resize(OpKind kind, std::uint64_t iova, std::uint64_t length, unsigned lg2);
    // What the VMM notes once the reply is there.
    void note_mapped(const Op &op);
    void note_unmapped(const Op &op);
    // Proceeds, and drains if asked, until it is done. False: it hangs.
    bool run(const Op &op, bool draining = true);

    // These split at slices, drain, and repeat what is answered with AGAIN. 0 or -errno; -ETIMEDOUT: a hang.
    int map(std::uint64_t iova, std::uint64_t length, std::uint64_t oa, iommu::Rights rights = read_write);
    int unmap(std::uint64_t iova, std::uint64_t length, Harvest harvest = Harvest::now);
    int split(std::uint64_t iova, std::uint64_t length, unsigned lg2)
    {
        return resize(OpKind::split, iova, length, lg2);
    }
    int collapse(std::uint64_t iova, std::uint64_t length, unsigned lg2)
    {
        return resize(OpKind::collapse, iova, length, lg2);
    }
    int enable();
    int disable();
    // All shards; ends when the markers are read.
    int sync();

    // ---- consumer

    // Reads at most `max` entries of a ring, and no more than it can hold, and copies the pages. How many.
    std::uint64_t drain(unsigned shard, std::uint64_t max = UINT64_MAX);
    std::uint64_t drain();
    ring::Consumer<std::uint64_t> &consumer(unsigned i = 0) { return *shards_[i].consumer; }
    // Copies all pages ever written: what a VMM does when tracking begins.
    void copy_all();

    // ---- devices

    Device &device(unsigned i = 0) { return *devices_[i]; }
    [[nodiscard]] iommu::DmaThreads threads(unsigned device);
    [[nodiscard]] dr_cell *cell(unsigned device) { return threads(device).cells.data(); }
    // In a section of its own, each word a new value.
    iommu::DmaFault write(unsigned device, std::uint64_t iova, std::uint64_t length);
    iommu::DmaFault read(unsigned device, std::uint64_t iova, std::uint64_t length);
    // The same within the caller's section.
    iommu::DmaFault write_inside(unsigned device, std::uint64_t iova, std::uint64_t length);
    // Asynchronous DMA in three steps, the first and the last in sections of their own.
    Pin pin(unsigned device, std::uint64_t iova, std::uint64_t length, bool write = true);
    void land(const Pin &pin); // the data arrives, each word a new value
    iommu::DmaFault unpin(unsigned device, const Pin &pin);
    void attach(unsigned device);
    void detach(unsigned device);
    // Shards are told, but the worker dies before it records that: the next one finds the device attached.
    void detach_in_vain(unsigned device);
    void bury(unsigned device);

    // ---- oracle

    // Pages written whose copy differs; right when no device is inside and after a sync.
    [[nodiscard]] std::uint64_t lost() const;
    [[nodiscard]] bool is_dirty(std::uint64_t iova) const;
    [[nodiscard]] bool is_accessed(std::uint64_t iova) const;
    // Of the leaf that a device finds; 0: there is none.
    [[nodiscard]] unsigned leaf_lg2(std::uint64_t iova) const { return leaf(iova).leaf.lg2; }
    [[nodiscard]] std::uint64_t translates_to(std::uint64_t iova) const;

    // Where each ring and sync stands, for a message.
    [[nodiscard]] std::string describe();

    // The shared memory, for hostile writers.
    [[nodiscard]] std::byte *tables_memory() const { return tables_region_.map.data(); }
    [[nodiscard]] std::uint64_t tables_bytes() const; // that are there
    // Where its owner has wished for large pages.
    [[nodiscard]] const std::vector<std::uint64_t> &large_tables() const { return large_tables_; }
    int make_tables_present(std::uint64_t offset, std::uint64_t length)
    {
        return tables_region_.make_present(offset, length);
    }
    [[nodiscard]] const std::byte *translation_memory() const { return translation_region_.map.data(); }
    [[nodiscard]] std::uint64_t *entry(std::uint64_t iova, unsigned level) const;
    [[nodiscard]] iommu::Entry decode(std::uint64_t entry, unsigned level) const;
    [[nodiscard]] dr_ring_producer *producer_memory(unsigned i = 0) const
    {
        return shards_[i].producer_region.map.as<dr_ring_producer>();
    }
    [[nodiscard]] dr_ring_consumer *consumer_memory(unsigned i = 0) const
    {
        return shards_[i].consumer_region.map.as<dr_ring_consumer>();
    }
    [[nodiscard]] std::uint64_t generation(std::uint64_t iova) const { return view.generation(iova); }

    dr_translation_header geometry;
    iommu::TranslationView view;
    iommu::GuestMemory guest;
    Memory source;
    Memory destination;
    std::uint64_t now = 1'000'000'000;        // ns, virtual
    std::uint64_t present_steps = UINT64_MAX; // make_present fails once these are used up
    iommu::ExtentMap ioas;                    // what is mapped
    std::uint64_t kicked = 0;                 // bit i: the consumer kicked shard i
    std::uint64_t rung = 0;                   // bit i: a device rang shard i

    std::uint64_t runs = 0;
    std::uint64_t pages_reported = 0;
    std::uint64_t over_reported = 0; // the page was equal
    std::uint64_t stray = 0;         // runs that name what is not mapped, or no memory
    std::uint64_t epoch = 0;
    std::uint64_t cookie = 0;
    std::vector<std::uint64_t> log; // entries, if wanted
    bool logging = false;
    struct PerShard {
        ring::Region producer_region;
        ring::Region consumer_region;
        ring::Region record;
        std::unique_ptr<service::Shard> shard;
        std::optional<ring::Consumer<std::uint64_t>> consumer;
        std::uint64_t calls = 0;
        std::uint64_t synced = UINT64_MAX; // the last cookie read
        std::uint64_t passed = 0;          // the last epoch read
        bool ended = false;
        std::set<unsigned> dying;             // devices that are dead, and perhaps not reported yet
        std::vector<const dr_cell *> stalled; // what the shard told
    };
    PerShard &state(unsigned i = 0) { return shards_[i]; }

  private:
    struct Walked {
        std::uint64_t entry = 0;
        iommu::Entry leaf;
    };
    [[nodiscard]] Walked leaf(std::uint64_t iova) const;
    int resize(OpKind kind, std::uint64_t iova, std::uint64_t length, unsigned lg2);
    void make_shard(unsigned i, bool restored);
    void bury_at(unsigned i, unsigned device);
    template <class Over> bool wait_for(Over over);
    void take(unsigned shard, std::uint64_t entry);
    void copy(std::uint64_t oa, std::uint64_t length);
    template <class Visit> void for_slices(std::uint64_t iova, std::uint64_t length, Visit visit) const;

    RigOptions options_;
    ring::Region tables_region_;
    std::vector<std::uint64_t> large_tables_;
    ring::Region translation_region_;
    ring::Region cells_region_;
    std::vector<PerShard> shards_;
    std::deque<Op> ops_;
    std::set<unsigned> attached_;
    std::vector<std::unique_ptr<Device>> devices_;
    RetainedMap retained_;
    std::uint64_t stamp_ = 0;
    std::set<std::uint64_t> written_; // OA pages
    std::vector<std::uint64_t> buffer_;
};

// The walker as it sleeps and wakes: it runs when it is kicked, rung, or when its time has come.
class SleepyWalker
{
  public:
    explicit SleepyWalker(Rig &rig) : rig_(rig) {}

    // Works until it sleeps. False: it never does.
    bool run();
    // As run, but `between` happens after the last look at the shards and before the walker raises its flags.
    template <class Between> bool run_with(Between between)
    {
        wake();
        rig_.settle();
        between();
        return prepare() || run();
    }
    // Delivers kicks, doorbells and timers until nothing more comes: it is asleep, and only a peer can end that.
    bool run_until_idle();

    [[nodiscard]] std::uint64_t wake_at() const { return until_; }

  private:
    void wake();
    bool prepare(); // true: sleep

    Rig &rig_;
    std::uint64_t until_ = 0;
};

} // namespace dirtyring::test
