/* The memory that dirtyring shares with a VMM: the dirty ring and the command ring.
 *
 * This file is the ABI. It is C11 and C++20, so that bindgen and a C VMM read the same words as the service.
 * All integers are little-endian and naturally aligned. `ring/producer.hpp` and `ring/consumer.hpp` are its two halves.
 *
 * A ring is two regions, each written by one side only:
 *
 *    producer region (consumer: read-only)               consumer region (consumer: read-write)
 *    ┌──────────┬───────────────────────────┐            ┌──────────┬──────────────────────────┐
 *    │    0     │ header; version last      │            │    0     │ tail   first unreleased  │
 *    │   128    │ head    first unpublished │            │   128    │ armed  head that calls   │
 *    │   256    │ staged  first unstaged    │            │   256    │ reserved, zero           │
 *    │   384    │ want_kick                 │            └──────────┴──────────────────────────┘ 4096
 *    │   512    │ pending, full_since       │
 *    │   640    │ session                   │       tail          head         staged      tail + capacity
 *    │  4096    │ entries[capacity]         │        ├─ published ─┼── staged ───┼──── room ────┤
 *    └──────────┴───────────────────────────┘        consumer's     crash-safe,    producer's
 *                                                                   not readable
 *
 * Indices are free-running 64-bit counts; an entry's slot is `index & (capacity - 1)`. 64 bits never wrap.
 *
 * Ordering edges of a ring. P: producer, C: consumer. An acquire without a partner, or a partner without its acquire,
 * is a bug. "sc" is seq_cst.
 *
 *   edge  store                                   load                                 carries
 *   R1    C store-release tail                    P load-acquire tail                  C has read the slots below tail
 *   R2    P store-release staged                  restart load-acquire staged          slots below staged are whole
 *   R3    P store-sc head (release)               C load-acquire head                  slots below head; the guest's
 *                                                                                      data, by S1 and S2 of
 *                                                                                      iommu/layout.h
 *   R4    P store-sc head  ‖ P load-sc armed      C store-sc armed ‖ C load-sc head    P calls, or C sees the head
 *   R5    C store-sc tail  ‖ C load-sc want_kick  P store-sc want_kick ‖ P load-sc tail
 *                                                                                      C kicks, or P sees the tail
 *   R6    P store-release version                 C load-acquire version               the header is whole
 *
 * R4 and R5 are the store-buffering shape: all four accesses are seq_cst, and each side looks again after its store.
 * `pending` and `full_since` are statistics: relaxed, they order nothing.
 *
 * A walker that waits for its consumer, be it for room or because the slice rests until its runs are taken (pacing),
 * sets want_kick before it sleeps: any advance of tail ends the wait.
 *
 * Every byte not named here is zero and ignored. All words are accessed by lock-free 64-bit atomics, little-endian.
 * What a hostile peer may write, and what comes of it:
 *
 *   tail outside [last seen, head]         ignored: the last good one stands; the peer's own ring fills
 *   armed, any value                       at most one call a publish
 *   head of submissions beyond capacity    the command ring is dead: no command is taken any more
 *   a header in memory that VMMs write     never read: the service keeps capacity and kind to itself
 */
#ifndef DIRTYRING_RING_LAYOUT_H
#define DIRTYRING_RING_LAYOUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "dirtyring's shared memory is little-endian"
#endif

#ifdef __cplusplus
#define DR_STATIC_ASSERT(cond, why) static_assert(cond, why)
#define DR_ALIGNAS(n) alignas(n)
extern "C" {
#else
#include <assert.h>
#define DR_STATIC_ASSERT(cond, why) _Static_assert(cond, why)
#define DR_ALIGNAS(n) _Alignas(n)
#endif

/* Two cache lines: the adjacent-line prefetcher of x86 pulls them together, so each index has a pair to itself. */
#define DR_LINE_PAIR 128
#define DR_PAGE 4096

/* ---- regions ---------------------------------------------------------------------------------------------------- */

#define DR_RING_MAGIC 0x676e697279747264ull /* "drtyring", little-endian */
#define DR_RING_VERSION 1u

enum dr_ring_kind {
    DR_RING_DIRTY = 1,      /* entries: uint64_t, see below; producer: service */
    DR_RING_SUBMISSION = 2, /* entries: struct dr_command; producer: VMM */
    DR_RING_COMPLETION = 3, /* entries: struct dr_completion; producer: service */
};

/* What the runs of a dirty ring name. */
enum dr_space {
    DR_SPACE_IOVA = 0, /* IOVAs of the hwpt: a run means the map of its epoch */
    DR_SPACE_OA = 1,   /* guest-physical addresses: a run needs no map */
};

struct dr_ring_header {
    uint64_t magic;      /* DR_RING_MAGIC */
    uint32_t version;    /* DR_RING_VERSION; stored last, release (R6); 0 while the region is being made */
    uint32_t kind;       /* enum dr_ring_kind */
    uint64_t capacity;   /* entries, a power of two */
    uint32_t entry_size; /* bytes */
    uint32_t space;      /* enum dr_space; dirty rings only, else 0 */
    uint64_t start;      /* dirty rings: the slice of IOVA space that feeds this ring, */
    uint64_t last;       /*   closed interval; else 0 */
};

struct dr_ring_producer {
    DR_ALIGNAS(DR_LINE_PAIR) struct dr_ring_header header;
    DR_ALIGNAS(DR_LINE_PAIR) uint64_t head;
    DR_ALIGNAS(DR_LINE_PAIR) uint64_t staged;
    DR_ALIGNAS(DR_LINE_PAIR) uint64_t want_kick; /* 1: the producer waits for tail to move and asks to be kicked */
    DR_ALIGNAS(DR_LINE_PAIR) uint64_t pending;   /* cache lines of PTEs found dirty and left for want of room */
    uint64_t full_since;                       /* CLOCK_MONOTONIC ns since when the ring has been full; 0: it is not */
    DR_ALIGNAS(DR_LINE_PAIR) uint64_t session; /* dirty rings: another after each restart of the service */
    DR_ALIGNAS(DR_LINE_PAIR) uint8_t reserved[DR_PAGE - 6 * DR_LINE_PAIR];
    /* entries follow at offset DR_PAGE */
};

struct dr_ring_consumer {
    DR_ALIGNAS(DR_LINE_PAIR) uint64_t tail;
    DR_ALIGNAS(DR_LINE_PAIR) uint64_t armed; /* the producer calls when head passes from below this to it or beyond */
    DR_ALIGNAS(DR_LINE_PAIR) uint8_t reserved[DR_PAGE - 2 * DR_LINE_PAIR];
};

/* `armed` of a consumer that does not sleep: no head ever gets there. */
#define DR_DISARMED UINT64_MAX

DR_STATIC_ASSERT(sizeof(struct dr_ring_header) == 48, "ABI");
DR_STATIC_ASSERT(sizeof(struct dr_ring_producer) == DR_PAGE, "entries begin on a page of their own");
DR_STATIC_ASSERT(offsetof(struct dr_ring_producer, head) == 128, "ABI");
DR_STATIC_ASSERT(offsetof(struct dr_ring_producer, staged) == 256, "ABI");
DR_STATIC_ASSERT(offsetof(struct dr_ring_producer, want_kick) == 384, "ABI");
DR_STATIC_ASSERT(offsetof(struct dr_ring_producer, pending) == 512, "ABI");
DR_STATIC_ASSERT(sizeof(struct dr_ring_consumer) == DR_PAGE, "a consumer region is one page");
DR_STATIC_ASSERT(offsetof(struct dr_ring_consumer, armed) == 128, "ABI");

/* ---- entries of a dirty ring --------------------------------------------------------------------------------------
 *
 *    63                                        12 11 10          0
 *   ┌────────────────────────────────────────────┬──┬─────────────┐
 *   │ page number (iova >> 12 or oa >> 12)       │u │ n           │  a run: n >= 1 units from there are dirty;
 *   └────────────────────────────────────────────┴──┴─────────────┘  unit: u = 0: 1 page, u = 1: 512 pages of 4 KiB
 *    63                            20 19       12 11 10          0
 *   ┌────────────────────────────────┬───────────┬──┬─────────────┐
 *   │ payload                        │ kind      │0 │ 0           │  a marker
 *   └────────────────────────────────┴───────────┴──┴─────────────┘
 */
#define DR_PAGE_LG2 12
#define DR_LARGE_UNIT_LG2 9 /* u = 1: 512 pages */
#define DR_RUN_MAX 2047u    /* units in one run */
#define DR_PAYLOAD_BITS 44  /* sync cookies and epochs are taken modulo 2^44 */
#define DR_MARKER_SLOTS 4u  /* slots that runs never take */
#define DR_CAPACITY_MIN 8u  /* the entry of the largest leaf and DR_MARKER_SLOTS, as a power of two */
#define DR_CAPACITY_MAX (1u << 20)

/* A consumer skips a kind below 128 that it does not know, and takes one from 128 up for ALL_DIRTY. */
enum dr_marker {
    DR_MARKER_SYNC = 1,  /* payload: cookie. All DMA that completed before the request lies before this */
    DR_MARKER_EPOCH = 2, /* payload: epoch of an unmap. All runs of what it took away lie before this, runs of what is
                              mapped there later behind it. One in each ring of whose slice it took something away;
                              those of different unmaps come in any order, as unmaps of other IOVAs may overtake */
    DR_MARKER_ALL_DIRTY = 3, /* everything mapped in this slice is dirty */
    DR_MARKER_END = 4,       /* nothing follows: the hwpt is gone */
};

static inline uint64_t dr_run(uint64_t page, bool large, uint32_t n)
{
    return page << DR_PAGE_LG2 | (uint64_t)large << 11 | n;
}

static inline uint64_t dr_marker(enum dr_marker kind, uint64_t payload)
{
    return payload << 20 | (uint64_t)kind << 12;
}

static inline bool dr_is_marker(uint64_t entry)
{
    return (entry & DR_RUN_MAX) == 0;
}

/* The first address of a run, bytes. */
static inline uint64_t dr_run_address(uint64_t entry)
{
    return entry & ~(uint64_t)(DR_PAGE - 1);
}

/* The length of a run, bytes. */
static inline uint64_t dr_run_length(uint64_t entry)
{
    return (entry & DR_RUN_MAX) << (DR_PAGE_LG2 + ((entry >> 11 & 1) ? DR_LARGE_UNIT_LG2 : 0));
}

static inline uint32_t dr_marker_kind(uint64_t entry)
{
    return (uint32_t)(entry >> 12 & 0xff);
}

static inline uint64_t dr_marker_payload(uint64_t entry)
{
    return entry >> 20;
}

/* ---- the command ring -----------------------------------------------------------------------------------------------
 *
 * Two rings of the kind above, with the roles turned round in one of them. Each memfd holds what one side writes:
 *
 *    front-end memfd (VMM writes)                     service memfd (VMM reads)
 *    ┌────────────────────────────────────┐           ┌────────────────────────────────────┐
 *    │ 0     consumer region, completions │           │ 0     consumer region, submissions │
 *    │                                    │           │ 2048  guest status                 │
 *    │ 4096  producer region, submissions │           │ 4096  producer region, completions │
 *    └────────────────────────────────────┘           └────────────────────────────────────┘
 *
 * Both have the same capacity, and the service takes a submission only while a completion slot is free for it. The VMM
 * kicks when a submission reaches the service's `armed`, the service calls when a completion reaches the VMM's; whoever
 * releases reads the other's want_kick too (R5 in both directions). `staged` means nothing here.
 * A sync that waits for room in a ring holds up no map.
 */
#define DR_COMMAND_CONSUMER_OFFSET 0
#define DR_COMMAND_PRODUCER_OFFSET DR_PAGE
#define DR_GUEST_STATUS_OFFSET 2048
#define DR_COMMAND_CAPACITY_MIN 2u
#define DR_COMMAND_CAPACITY_MAX 4096u

enum dr_opcode {
    DR_OP_MAP = 1,     /* object: ioas; iova, length, oa */
    DR_OP_UNMAP = 2,   /* object: ioas; iova, length (UINT64_MAX: to the end of the space) */
    DR_OP_SYNC = 3,    /* object: hwpt; cookie */
    DR_OP_ENABLE = 4,  /* object: hwpt: start tracking */
    DR_OP_DISABLE = 5, /* object: hwpt: stop tracking */
    DR_OP_SPLIT = 6,   /* object: hwpt; iova, length, leaf_lg2: no leaf there is larger than 2^leaf_lg2 bytes then */
    DR_OP_COLLAPSE =
        7, /* object: hwpt; iova, length, leaf_lg2: leaves are as large as they can be, up to 2^leaf_lg2 bytes */
};

enum dr_command_flags {
    DR_MAP_READ = 1 << 0,
    DR_MAP_WRITE = 1 << 1,
    DR_MAP_IDEMPOTENT = 1 << 2, /* what is mapped to the same OA with the same rights is no error */
    DR_UNMAP_EMPTY_OK = 1 << 3, /* unmapping where nothing is mapped is no error */
    DR_UNMAP_DEFERRED = 1 << 4, /* complete after the grace period; runs come before the next sync marker */
    DR_UNMAP_DISCARD = 1 << 5,  /* do not report: the memory is going away */
};

/* Completes with 0 or a negative errno:
 *   EINVAL      unknown opcode or flag, a field not used that is not zero; address or length not a multiple of 4096 or
 *               length 0; a map without rights; both DEFERRED and DISCARD
 *   ENOENT      no such object; unmap: nothing there, or the range cuts a map in two
 *   ERANGE      outside the IOVA space
 *   EEXIST      map: something is mapped there
 *   EFAULT      map: the OA is not in the guest's memory, or the format cannot name it
 *   ENOSPC      map: no hwpt in this ioas
 *   ENOMEM      no memory for tables; map: nothing was mapped; split, collapse: what was done stays so
 *   EAGAIN      unmap: the ring is full, or what follows is tracked and what is done was not; `done` bytes from iova
 *               are unmapped: release entries, then ask for the rest
 *   EALREADY    enable, disable: it is so already
 *   EOPNOTSUPP  enable, disable, sync: no dirty tracking
 *   ENODEV      enable: a device is attached that cannot set Dirty bits there (DR_HWPT_STATUS names it); nothing was
 *               changed. As the IOMMU core's attach: it is this device's matter, where EOPNOTSUPP is the hwpt's
 *   ECANCELED   the object was destroyed meanwhile
 *   EIO         a restart of the service has lost track of it */
struct dr_command {
    uint64_t user_data; /* comes back in the completion */
    uint32_t opcode;    /* enum dr_opcode */
    uint32_t flags;     /* enum dr_command_flags */
    uint32_t object;    /* id of an ioas or hwpt */
    uint32_t leaf_lg2;  /* split, collapse: one of the sizes that the hwpt uses */
    uint64_t iova;      /* bytes */
    uint64_t length;    /* bytes */
    uint64_t oa;        /* bytes */
    uint64_t cookie;    /* sync: 44 bits */
    uint64_t reserved;  /* zero */
};

struct dr_completion {
    uint64_t user_data;
    int32_t result;    /* 0 or -errno */
    uint32_t reserved; /* zero */
    uint64_t done;     /* unmap: bytes from iova that are gone, holes included */
    uint64_t epoch;    /* unmap, IOVA rings: the epoch (44 bits) whose marker lies behind the runs of this unmap, with
                          DEFERRED or DISCARD once it is published; else 0 */
};

/* On whom the guest waits. A device that stays inside a section holds up what needs its grace period: runs, unmaps and
 * syncs of its own hwpt. When that has lasted for stall_ms, the service fills this in, `since` last (release), and
 * calls; it sets `since` to 0 when the device has gone on or died. Whoever kills the device's process ends the wait. */
struct dr_guest_status {
    uint64_t since;  /* CLOCK_MONOTONIC ns; 0: on nobody */
    uint32_t device; /* its id */
    int32_t pid;     /* its process, as the service sees it */
};

DR_STATIC_ASSERT(sizeof(struct dr_guest_status) == 16, "ABI");
DR_STATIC_ASSERT(DR_GUEST_STATUS_OFFSET + sizeof(struct dr_guest_status) <= DR_COMMAND_PRODUCER_OFFSET, "ABI");
DR_STATIC_ASSERT(sizeof(struct dr_command) == 64, "ABI: a command is a cache line");
DR_STATIC_ASSERT(sizeof(struct dr_completion) == 32, "ABI");

#ifdef __cplusplus
}
#endif

#endif
