/* The control messages of dirtyring: set-up and descriptors, over a Unix stream socket.
 *
 * A message is a header, a payload and descriptors (SCM_RIGHTS, sent with the header's first byte):
 *
 *    ┌─────────┬─────────┬─────────┬──────────┬──────────────────────────────┐
 *    │ request │ flags   │ size    │ sequence │ payload: size bytes          │  flags: bits 1..0 version
 *    │  u32    │  u32    │  u32    │   u32    │ its first u32 is its own size│  (1), bit 2 reply, bit 3 refusal
 *    └─────────┴─────────┴─────────┴──────────┴──────────────────────────────┘
 *
 * Framing follows vhost-user; growth follows iommufd: a payload holds at least the fields of version 1, else EINVAL;
 * what a request has beyond the fields known must be zero, else E2BIG; what a reply has beyond them is ignored. Each
 * request gets one reply with its number and sequence and DR_MESSAGE_REPLY; a refusal carries struct dr_refusal instead
 * of the reply's payload. The first request of a connection is HELLO. A connection is a front-end (after GUEST_CREATE)
 * or a device (after DEVICE_ATTACH), never both. Descriptors are exactly those listed; more or fewer is EINVAL, and all
 * are closed.
 *
 * A front-end's connection is its guest's life: closing it frees the guest, unless a successor takes it within
 * linger_ms. A device is the process that connected; its cells are waited for until it says DETACH or that process is
 * gone, whatever becomes of the connection.
 *
 * When the service dies and another worker takes its place, connections break and nothing else does: regions, eventfds,
 * rings and what is in them stay. Until its process ends, nobody has to hurry: who needs the socket connects again,
 * says HELLO, and then
 *
 *    a front-end   GUEST_CREATE with its secret and DR_GUEST_AGAIN, then the request that got no reply, with its old
 *                  sequence: what MEMORY_ADD, IOAS_ALLOC, HWPT_ALLOC or DESTROY has done is not done again, and the
 *                  reply is the one that was lost
 *    a device      DEVICE_ATTACH with its key: it is the device that it was
 *
 * A front-end's sequences grow from request to request (modulo 2^32), over all connections of its guest.
 *
 * Errors that any request may meet: EPROTO (no HELLO yet, or the wrong kind of connection), E2BIG (see above), EINVAL
 * (payload too short to hold its first fields, wrong number of descriptors), EOPNOTSUPP (unknown request), ENOMEM,
 * EMFILE.
 */
#ifndef DIRTYRING_RING_CONTROL_H
#define DIRTYRING_RING_CONTROL_H

#include "ring/layout.h"

#ifdef __cplusplus
extern "C" {
#endif

#define DR_PROTOCOL_VERSION 1u
#define DR_MESSAGE_VERSION_MASK 3u
#define DR_MESSAGE_REPLY (1u << 2)
#define DR_MESSAGE_REFUSAL (1u << 3)
#define DR_MESSAGE_MAX 8192u /* bytes of payload */
#define DR_MESSAGE_FDS_MAX 160u

#define DR_TOKEN_BYTES 16
#define DR_GUEST_REGIONS_MAX 64u
#define DR_SHARDS_MAX 64u
#define DR_DEVICE_THREADS_MAX 64u
#define DR_DEVICE_PINS_MAX 4096u /* of all threads of a device */

/* Features. Both sides offer, both use what both offered. */
#define DR_FEATURE_SUMMARY (1ull << 0)  /* devices set summary words (iommu/layout.h) */
#define DR_FEATURE_OA_SPACE (1ull << 1) /* rings may name guest-physical addresses */
#define DR_FEATURES_ALL (DR_FEATURE_SUMMARY | DR_FEATURE_OA_SPACE)

enum dr_request {
    DR_HELLO = 1,         /* either:    dr_hello          → dr_hello */
    DR_GUEST_CREATE = 2,  /* front-end: dr_guest_create   → dr_guest, fds: front-end memfd (rw), service memfd (ro),
                                                            kick eventfd, call eventfd */
    DR_MEMORY_ADD = 3,    /* front-end: dr_memory_region + fd: memory → dr_empty */
    DR_IOAS_ALLOC = 4,    /* front-end: dr_empty          → dr_object */
    DR_HWPT_ALLOC = 5,    /* front-end: dr_hwpt_alloc     → dr_hwpt */
    DR_RING_GET = 6,      /* front-end: dr_ring_get       → dr_ring, fds: producer region (ro), consumer region (rw),
                                                            call eventfd, kick eventfd */
    DR_DESTROY = 7,       /* front-end: dr_object         → dr_empty */
    DR_DEVICE_ATTACH = 8, /* device:    dr_device_attach  → dr_device, fds: tables (rw), translation (ro), cells (rw),
                                                            doorbell eventfd of each shard, memory of each region */
    DR_DEVICE_DETACH = 9, /* device:    dr_empty          → dr_empty */
    DR_GUEST_DESTROY = 10, /* front-end: dr_empty         → dr_empty; frees the guest, lingering or not */
    DR_DEVICE_INFO = 11,   /* front-end: dr_object        → dr_device_info */
    DR_HWPT_STATUS = 12,   /* front-end: dr_object        → dr_hwpt_status */
};

struct dr_message_header {
    uint32_t request;  /* enum dr_request */
    uint32_t flags;    /* DR_MESSAGE_* */
    uint32_t size;     /* of the payload, bytes: 4 to DR_MESSAGE_MAX */
    uint32_t sequence; /* the sender's; comes back in the reply */
};

struct dr_empty {
    uint32_t size;
};

/* EPROTONOSUPPORT: no common version. */
struct dr_hello {
    uint32_t size;
    uint32_t version; /* request: the newest the sender speaks; reply: the one both use */
    uint64_t features;
};

#define DR_GUEST_TAKE (1u << 0)  /* only take a guest over: there must be one with this secret */
#define DR_GUEST_AGAIN (1u << 1) /* the same, and only if this process had it last: its connection has broken */

/* Creates a guest, or takes over the one that has this secret; a front-end that still has it loses its connection.
 * EINVAL: command_entries is no power of two within DR_COMMAND_CAPACITY_*, unknown flags, a secret of zeroes. ENOENT:
 * any flag, and no guest has this secret. ENOSPC: too many guests. EBUSY: this connection has a guest; DR_GUEST_AGAIN,
 * and another process has taken it over. ESRCH: the peer's process cannot be watched. */
struct dr_guest_create {
    uint32_t size;
    uint32_t command_entries; /* of a new guest */
    uint32_t flags;           /* DR_GUEST_* */
    /* How long the guest waits for a successor when the connection is closed. 0: not at all; of a guest that is taken
     * over: as long as before. */
    uint32_t linger_ms;
    /* A device that holds the guest up for so long is told in dr_guest_status. 0: 1000; of a guest that is taken over:
     * as before. */
    uint32_t stall_ms;
    /* Random, of the front-end's choice: whoever has it may take the guest over. Keep it. */
    uint8_t secret[DR_TOKEN_BYTES];
};

struct dr_guest {
    uint32_t size;
    uint32_t command_entries;
    uint8_t token[DR_TOKEN_BYTES]; /* whoever has it may attach devices; hand it to them out of band */
    uint32_t sequence;             /* of the last request that changed the guest; a successor's go on from here */
};

/* A piece of guest-physical memory. The service passes its descriptor on to devices and never maps it.
 * EINVAL: not aligned to 4096, empty, wraps, or reaches beyond 2^DR_OA_LG2. EEXIST: overlaps another. ENOSPC:
 * DR_GUEST_REGIONS_MAX are there. EBUSY: a device is attached: memory is added before. EBADF: not a memfd, or a file on
 * tmpfs or hugetlbfs. */
#define DR_OA_LG2 52 /* output addresses are below 2^52, as page-table entries hold them */
struct dr_memory_region {
    uint32_t size;
    uint32_t reserved;
    uint64_t oa;     /* bytes */
    uint64_t length; /* bytes */
    uint64_t offset; /* of the piece in the descriptor, bytes */
};

/* IOAS_ALLOC: ENOSPC: too many objects. */
struct dr_object {
    uint32_t size;
    uint32_t id; /* DESTROY: ENOENT: no such object; EBUSY: an ioas with an hwpt, an hwpt with a device.
                    DEVICE_INFO: of the device with the smallest id above this one; ENOENT: there is no more.
                    HWPT_STATUS: ENOENT: no such hwpt */
};

enum dr_format {
    DR_FORMAT_AMDV1 = 1,     /* AMD I/O Virtualization Technology (IOMMU) Specification, v1: 1 to 6 levels */
    DR_FORMAT_VTDSS = 2,     /* Intel Virtualization Technology for Directed I/O, second stage: 3 to 5 levels */
    DR_FORMAT_SMMUV3_S2 = 3, /* Arm SMMUv3, stage 2, granule of 4 KiB: 2 to 4 levels, OAs below 2^48 */
    DR_FORMAT_SMMUV3_S1 = 4, /* the same of stage 1; without a write-only right: what may be written may be read */
};

#define DR_HWPT_DIRTY_TRACKING (1u << 0) /* as IOMMU_HWPT_ALLOC_DIRTY_TRACKING: refuse devices that cannot */
/* With DR_HWPT_DIRTY_TRACKING: devices set Dirty from the start, and ENABLE and DISABLE begin and end the reporting
 * only. SMMUv3 formats are so without being asked, since there a clean leaf can be written only while the hardware sets
 * Dirty. */
#define DR_HWPT_ALWAYS_ON (1u << 1)

#define DR_HWPT_ALL_SIZES \
    (1u << 2) /* leaves of every power of two that the format has, not only of what an entry spans: AMD v1 */
#define DR_HWPT_COLLAPSE (1u << 3) /* DISABLE makes leaves as large again as they can be, in the background */

/* Instead of DR_HWPT_DIRTY_TRACKING: it has rings, and devices that cannot set Dirty bits may attach while nothing is
 * reported. ENABLE is refused as long as one is attached, and such a device from the beginning of an ENABLE to the
 * completion of DISABLE. Not where devices set Dirty from the start. */
#define DR_HWPT_DIRTY_OPTIONAL (1u << 4)

/* What becomes of leaves larger than 4 KiB while dirt is reported. In the background; what is mapped may be written
 * meanwhile. */
enum dr_split {
    DR_SPLIT_NONE = 0,  /* they stay */
    DR_SPLIT_EAGER = 1, /* ENABLE splits all of them, and maps that come have none */
    DR_SPLIT_LAZY = 2,  /* one that was reported is split */
};

/* ENOENT: no such ioas. EOPNOTSUPP: format; space is DR_SPACE_OA without DR_FEATURE_OA_SPACE. EINVAL: any other field
 * out of its range; flags that exclude each other. ENOSPC: too many objects. EBUSY: the ioas has an hwpt, or maps (an
 * hwpt comes before the maps of its ioas). */
struct dr_hwpt_alloc {
    uint32_t size;
    uint32_t ioas;
    uint32_t format;          /* enum dr_format */
    uint32_t flags;           /* DR_HWPT_* */
    uint32_t aperture_lg2;    /* the IOVA space is [0, 2^aperture_lg2): 21 to 48 */
    uint32_t shards;          /* slices of the space, each with a ring: a power of two, each slice >= 1 GiB, or 1 */
    uint32_t leaf_lg2_max;    /* largest leaf used: 12, 21 or 30; what is dirty is known by leaf */
    uint32_t space;           /* enum dr_space: what runs name */
    uint32_t ring_entries;    /* of each ring: a power of two, DR_CAPACITY_MIN to DR_CAPACITY_MAX */
    uint32_t min_interval_us; /* a slice in which something was dirty is not swept again before this many µs;
                                 0: not before its consumer has released everything */
    uint32_t split;           /* enum dr_split */
    uint32_t bbml;            /* SMMUv3: IDR3.BBML, 0 to 2: how the size of leaves may change under DMA; others: 0 */
    uint32_t levels;          /* of tables, within what the format has and the aperture needs; 0: as few as that */
};

struct dr_hwpt {
    uint32_t size;
    uint32_t id;
    uint32_t shards;
    uint32_t slice_lg2; /* shard of an IOVA: iova >> slice_lg2 */
};

/* ENOENT: no such hwpt or shard. EOPNOTSUPP: no dirty tracking. */
struct dr_ring_get {
    uint32_t size;
    uint32_t hwpt;
    uint32_t shard;
};

struct dr_ring {
    uint32_t size;
    uint32_t shards; /* of the hwpt, each with a ring */
};

/* What a device's IOMMU can do, as IOMMU_GET_HW_INFO tells it: flags, and a mask of the formats that it walks, in which
 * DR_FORMAT_BIT(format) stands for a format. It can track an hwpt if it sets Dirty bits, and in VT-d tables only if its
 * walks are coherent besides. */
#define DR_DEVICE_CAN_TRACK (1u << 0) /* it sets Dirty bits */
#define DR_DEVICE_COHERENT (1u << 1)  /* its walks snoop the processors' caches */
#define DR_FORMAT_BIT(format) (1u << (format))
#define DR_NAME_BYTES 32

/* EACCES: no guest has this token. ENOENT: no such hwpt. EINVAL: threads is 0 or over DR_DEVICE_THREADS_MAX; threads *
 * pins is over DR_DEVICE_PINS_MAX; key is 0; an unknown flag; no format; a name that is empty, has no NUL, or anything
 * but printable ASCII before it or zeroes behind it; the device does not walk the hwpt's format; it cannot track the
 * hwpt, which requires dirty tracking or is enabled (as iommufd's attach). EBUSY: this connection has a device, or
 * another process has the device of this key. ENOSPC: too many devices. ESRCH: the peer's process cannot be watched.
 * EOPNOTSUPP: the hwpt has rings and the device did not offer DR_FEATURE_SUMMARY: where it left a leaf dirty, another
 * would not summarize it. */
struct dr_device_attach {
    uint32_t size;
    uint32_t hwpt;
    uint32_t flags;   /* DR_DEVICE_* */
    uint32_t threads; /* DMA threads, each with a cell */
    uint8_t token[DR_TOKEN_BYTES];
    uint32_t pins; /* slots of each thread, for DMA in flight without a section; may be 0 */
    uint32_t
        formats; /* DR_FORMAT_BIT of each that it walks; bits of formats that the service does not know mean nothing */
    /* Random, of the device's choice: attaching again with it, after the connection broke, changes nothing. */
    uint64_t key;
    char name[DR_NAME_BYTES]; /* for messages that name it; NUL-terminated, zeroes behind */
};

struct dr_device_region {
    uint64_t oa;
    uint64_t length;
    uint64_t offset;
};

/* DETACH: EBUSY: a thread is inside a section or holds a pin. */
struct dr_device {
    uint32_t size;
    uint32_t id;
    uint32_t shards;  /* doorbells */
    uint32_t regions; /* used below */
    struct dr_device_region region[DR_GUEST_REGIONS_MAX];
};

/* A device that is attached, as it has declared itself. */
struct dr_device_info {
    uint32_t size;
    uint32_t id;
    uint32_t hwpt;
    int32_t pid;      /* its process, as the service sees it */
    uint32_t flags;   /* DR_DEVICE_* */
    uint32_t formats; /* DR_FORMAT_BIT of each that it walks */
    char name[DR_NAME_BYTES];
};

#define DR_TRACKING_SUPPORTED (1u << 0) /* it has rings, and all its devices can track it */
#define DR_TRACKING_ENABLED (1u << 1)   /* from the beginning of an ENABLE to the completion of a DISABLE */

struct dr_hwpt_status {
    uint32_t size;
    uint32_t format;     /* enum dr_format */
    uint32_t flags;      /* DR_TRACKING_* */
    uint32_t devices;    /* attached */
    uint32_t in_the_way; /* the smallest id of a device that cannot track it; 0: there is none */
};

#define DR_SENTENCE_BYTES 244
struct dr_refusal {
    uint32_t size;
    int32_t error;                    /* a positive errno */
    char sentence[DR_SENTENCE_BYTES]; /* what, where, and what was expected; NUL-terminated */
};

DR_STATIC_ASSERT(sizeof(struct dr_message_header) == 16, "ABI");
DR_STATIC_ASSERT(sizeof(struct dr_empty) == 4, "ABI");
DR_STATIC_ASSERT(sizeof(struct dr_object) == 8, "ABI");
DR_STATIC_ASSERT(sizeof(struct dr_hello) == 16, "ABI");
DR_STATIC_ASSERT(sizeof(struct dr_guest_create) == 36, "ABI");
DR_STATIC_ASSERT(sizeof(struct dr_hwpt) == 16, "ABI");
DR_STATIC_ASSERT(sizeof(struct dr_ring_get) == 12, "ABI");
DR_STATIC_ASSERT(sizeof(struct dr_ring) == 8, "ABI");
DR_STATIC_ASSERT(sizeof(struct dr_guest) == 28, "ABI");
DR_STATIC_ASSERT(sizeof(struct dr_memory_region) == 32, "ABI");
DR_STATIC_ASSERT(sizeof(struct dr_hwpt_alloc) == 52, "ABI");
DR_STATIC_ASSERT(sizeof(struct dr_device_attach) == 80, "ABI");
DR_STATIC_ASSERT(sizeof(struct dr_device_info) == 56, "ABI");
DR_STATIC_ASSERT(sizeof(struct dr_hwpt_status) == 20, "ABI");
DR_STATIC_ASSERT(sizeof(struct dr_device) == 16 + 24 * DR_GUEST_REGIONS_MAX, "ABI");
DR_STATIC_ASSERT(sizeof(struct dr_refusal) == 252, "ABI");
DR_STATIC_ASSERT(3 + DR_SHARDS_MAX + DR_GUEST_REGIONS_MAX <= DR_MESSAGE_FDS_MAX, "an attach reply fits in one message");

#ifdef __cplusplus
}
#endif

#endif
