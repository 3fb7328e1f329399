// A shard: one slice of an hwpt, its ring, and the steps between them. The walker that owns it calls step() in turn
// with its other shards; nothing here waits, and one call does a bounded piece of work.
//
//   sweep    reserve → collect → stage → clear → advance → grace → publish → call
//   unmap    close its range → pins gone → for each leaf: read → stage if dirty → swap out; then advance → grace →
//            publish → reply
//   sync     leading grace → pins gone → one pass of everything → publish → marker → publish
//
// At most one batch waits for its grace period. What waits for pins waits aside; everything else goes on. A shard is a
// template over the format and the interface below hides which.
#pragma once

#include "iommu/backing.hpp"
#include "iommu/geometry.hpp"
#include "iommu/pins.hpp"
#include "iommu/resize.hpp"
#include "iommu/slice_record.hpp"
#include "ring/control.h"
#include "ring/layout.h"
#include "service/engine/agent.hpp"

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>

namespace dirtyring::service {

// What an unmap in IOVA space leaves in ShardOp::note, for its parts in other slices and for a restart. Its first part
// decides, before it takes anything out: if dirt is reported then, each part puts a marker, else none does, and the
// unmap ends where it meets reporting.
struct UnmapNote {
    static constexpr std::uint64_t decided = 1u << 0;
    static constexpr std::uint64_t marked = 1u << 1;
    static constexpr std::uint64_t cut_mask =
        ~std::uint64_t{DR_PAGE - 1}; // IOVA where it ended for want of room; 0: it did not
};

// What is asked of a shard. Stays with the caller, who gets it back through done().
struct ShardOp {
    enum class Kind { map, unmap, sync, enable, disable, split, collapse };
    enum class Harvest { now, deferred, discard };

    virtual void done() = 0; // on the shard's thread; result and reached are set

    Kind kind = Kind::map;
    Harvest harvest = Harvest::now;
    iommu::Rights rights;
    std::uint64_t start = 0; // map, unmap, split, collapse: IOVA, within the slice
    std::uint64_t end = 0;
    std::uint64_t oa = 0;     // map
    unsigned leaf_lg2 = 0;    // split, collapse
    std::uint64_t cookie = 0; // sync
    std::uint64_t epoch = 0;  // unmap: for the marker, which is put if it is marked and anything was taken out; 0: none
    bool continues = false;   // map: it goes on from the slice before
    bool again = false;       // a restart does it again: some of it may have been done
    // Outlives the service. unmap with an epoch: see UnmapNote. sync: a bit for each shard whose marker is staged.
    std::uint64_t *note = nullptr;

    int result = 0;            // 0 or -errno
    std::uint64_t reached = 0; // unmap: everything below is unmapped

  protected:
    ~ShardOp() = default;
};

// See dr_hwpt_alloc.
struct LeafPolicy {
    unsigned leaf_lg2_max = iommu::granule_lg2;
    bool all_sizes = false;
    bool collapse = false; // when tracking ends
    enum dr_split split = DR_SPLIT_NONE;
    iommu::Break how = iommu::Break::none;
};

// How much work one call of step() does at most: some 50 µs.
struct Visit {
    unsigned lines = 2048;  // and tables
    unsigned leaves = 4096; // of a map, an unmap, or what a dead device had pinned
    unsigned slots = 4096;  // of pins
};

struct ShardCounters {
    std::uint64_t runs = 0;
    std::uint64_t pages = 0; // of 4 KiB
    std::uint64_t calls = 0;
};

struct ShardConfig {
    iommu::Tables tables;
    dr_translation_header geometry;
    unsigned index = 0;
    dr_shard_control *control = nullptr;
    std::uint64_t *generations = nullptr;
    LeafPolicy leaves;
    Visit visit;
    dr_ring_producer *producer = nullptr; // with a header; nullptr: no dirty tracking
    dr_ring_consumer *consumer = nullptr;
    bool always_on = false; // with a ring: devices set D from the start, reported or not
    std::uint64_t min_interval_ns = 0;
    iommu::Backing backing;
    iommu::SliceRecord record; // empty, or what the owner before has left
    bool restored = false;     // an owner before has died; all that it shared is there
    std::uint64_t stall_ns = UINT64_MAX;
    // A grace period has waited for this cell for stall_ns; nullptr: it has passed after all.
    std::function<void(const dr_cell *)> stalled;
    std::function<void()> call; // the consumer; must not block
};

class Shard : public Agent
{
  public:
    Shard() : Agent(Turn::second) {}

    // Queues an operation. Maps, unmaps, enable and disable run in order; a sync covers those before it. The caller has
    // checked: a map meets no other, an unmap cuts none in two, enable and disable alternate and come while no sync is
    // out, and all three are for shards with a ring.
    virtual void submit(ShardOp &op) = 0;

    // No device is attached any more, or the VMM is gone. Completes everything queued with -ECANCELED; step() does
    // nothing more.
    virtual void cancel() = 0;

    // From here on the threads of a device, and their pins, are waited for. A restored shard knows its devices before
    // its first step.
    virtual void add(const iommu::DmaThreads &threads) = 0;
    // The device has left orderly: its threads are outside, hold no pin, and stay so.
    virtual void remove(const iommu::DmaThreads &threads) = 0;
    // The device is dead, perhaps between D and the summary, perhaps with pins. reported(): the tables know what its
    // pins covered, so its cells and slots may go.
    virtual void bury(const iommu::DmaThreads &threads, std::function<void()> reported) = 0;

    // What its backing's make_large was asked for is done.
    virtual void made_large(std::uint64_t offset) = 0;

    [[nodiscard]] virtual ShardCounters counters() const = 0;
};

// format: enum dr_format, known here.
std::unique_ptr<Shard> make_shard(unsigned format, ShardConfig config);

} // namespace dirtyring::service
