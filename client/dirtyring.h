/* libdirtyring, the VMM's side: a guest at a dirtyring service, its maps, and the rings that report its dirty pages.
 *
 * A C ABI for C, C++ and Rust; links nothing but libc. Functions that can fail return 0 or a negative errno and leave a
 * sentence in dirtyring_error(); every errno that the service answers is listed at its request in ring/control.h and
 * ring/layout.h, what the library adds is listed here. Addresses and lengths are bytes and multiples of 4096.
 *
 * Threads: a struct dirtyring_vm belongs to one thread at a time, except where a function says otherwise. Each struct
 * dirtyring_ring may have a thread of its own; a struct dirtyring_set is used by one thread and uses its rings.
 *
 *   struct dirtyring_vm *vm;
 *   dirtyring_connect("/run/dirtyring.sock", &vm);
 *   dirtyring_memory_add(vm, 0, size, memfd, 0);
 *   dirtyring_ioas_alloc(vm, &ioas);
 *   dirtyring_hwpt_alloc(vm, ioas, &(struct dirtyring_hwpt){.aperture_lg2 = 39}, &hwpt);
 *   dirtyring_map(vm, ioas, 0, size, 0, DIRTYRING_READ | DIRTYRING_WRITE);
 *   dirtyring_enable(vm, hwpt);
 *   dirtyring_set_open(vm, hwpt, &set);
 *   while (dirtyring_set_peek(set, &batch)) {
 *       for (uint32_t i = 0; i < batch.count; i++)
 *           if (!dr_is_marker(batch.entries[i]))
 *               copy(dr_run_address(batch.entries[i]), dr_run_length(batch.entries[i]));
 *       dirtyring_set_release(set, &batch);
 *   }
 */
#ifndef DIRTYRING_H
#define DIRTYRING_H

#include "ring/layout.h"

#ifdef __cplusplus
extern "C" {
#endif

#define DIRTYRING_API __attribute__((visibility("default")))

struct dirtyring_vm;
struct dirtyring_ring;
struct dirtyring_set;

/* ---- the guest -------------------------------------------------------------------------------------------------- */

/* Connects and creates a guest with a command ring of 256 entries. Closing frees the guest and all it has.
 * -ECONNREFUSED, -ENOENT, -EACCES: as connect(2). -EPROTONOSUPPORT: the service speaks no version of ours.
 * -ETIMEDOUT: the service did not answer within 10 s. *vm is NULL on failure.
 *
 * When the service's worker dies, the next one has the guest as it was. Calls that meet the broken socket connect again
 * and go on; what was asked is done once. Rings are read and released meanwhile, and calls that wait for a command wait
 * on. A request answers -ETIMEDOUT after 10 s, and -ESHUTDOWN when nobody listens at the path any more, or who does
 * knows no such guest. After both, and after -EPROTO, every call that needs the service answers -ESHUTDOWN: the guest
 * is lost to this process. */
DIRTYRING_API int dirtyring_connect(const char *socket_path, struct dirtyring_vm **vm);

struct dirtyring_guest {
    uint32_t linger_ms;   /* how long the guest outlives a process that died or left without closing; 0: not at all */
    uint32_t stall_ms;    /* after how long dirtyring_stalled() tells; 0: 1000 */
    uint8_t secret[16];   /* random; all zero: the library draws one. Whoever has it may take the guest: keep it */
    uint32_t reserved[4]; /* zero */
};

/* The same with attributes. A secret that a guest has takes that guest. */
DIRTYRING_API int dirtyring_connect_guest(const char *socket_path, const struct dirtyring_guest *attr,
                                          struct dirtyring_vm **vm);

/* Takes a guest over from another process, dead or alive: a VMM that updates itself or comes back after a crash. Its
 * objects, maps and devices stay; its rings are opened anew and go on with the first entry that was not released.
 * Commands of the predecessor that are on their way are done, but their completions are nobody's; those it had not
 * submitted are forgotten. A predecessor that lives must have left: a call of its that needs the service would take the
 * guest back. Errors of dirtyring_connect. -ENOENT: no guest has this secret. */
DIRTYRING_API int dirtyring_take(const char *socket_path, const uint8_t secret[16], struct dirtyring_vm **vm);

/* The same as dirtyring_connect over a connected socket, which is consumed in any case and cannot be connected again:
 * when it breaks, the guest is lost. */
DIRTYRING_API int dirtyring_connect_fd(int socket, struct dirtyring_vm **vm);

/* Frees the guest and closes; rings and sets opened from vm must be closed before. NULL is allowed. Waits up to 2 s for
 * a service that is away; one that stays away frees the guest when this process has ended and linger_ms have passed. */
DIRTYRING_API void dirtyring_close(struct dirtyring_vm *vm);

/* Closes as well, but leaves the guest to a successor, for linger_ms. NULL is allowed. */
DIRTYRING_API void dirtyring_leave(struct dirtyring_vm *vm);

/* For event loops that watch dirtyring_socket(), after a hang-up: connects again. 0: all is as before, also if nothing
 * had broken. -ETIMEDOUT: not within 10 s. -ESHUTDOWN: the service is gone. */
DIRTYRING_API int dirtyring_reconnect(struct dirtyring_vm *vm);

/* One sentence about the last failure of this thread. Never NULL. */
DIRTYRING_API const char *dirtyring_error(void);

/* 16 bytes which entitle a device to attach to this guest. Valid until dirtyring_close. */
DIRTYRING_API const uint8_t *dirtyring_token(const struct dirtyring_vm *vm);

/* 16 bytes which entitle a successor to take this guest. Valid until dirtyring_close. */
DIRTYRING_API const uint8_t *dirtyring_secret(const struct dirtyring_vm *vm);

/* The socket, to be watched for a hang-up (POLLRDHUP) and nothing else: the service's worker has died;
 * dirtyring_reconnect() tells whether there is another. The number stays the same for as long as vm lives, but an epoll
 * forgets it when the library connects again, in any call: register it anew. */
DIRTYRING_API int dirtyring_socket(const struct dirtyring_vm *vm);

/* A device that holds the guest up: it has been inside a section for stall_ms, and runs, unmaps or syncs wait for
 * it. */
struct dirtyring_stalled {
    uint64_t since_ns; /* CLOCK_MONOTONIC */
    uint32_t device;   /* its id */
    int32_t pid;       /* its process, as the service sees it: ending it ends the wait */
};

/* True: *out tells who. False: the guest waits for nobody. From any thread; never waits. When the answer turns true,
 * dirtyring_command_fd() becomes readable: ask after arming. */
DIRTYRING_API bool dirtyring_stalled(const struct dirtyring_vm *vm, struct dirtyring_stalled *out);

/* Guest memory [oa, oa + length) is at offset of memfd. The descriptor is duplicated for the devices. Before the first
 * device. */
DIRTYRING_API int dirtyring_memory_add(struct dirtyring_vm *vm, uint64_t oa, uint64_t length, int memfd,
                                       uint64_t offset);

/* ---- objects ---------------------------------------------------------------------------------------------------- */

struct dirtyring_hwpt {
    uint32_t aperture_lg2;    /* IOVA space [0, 2^n), n = 21 to 48; 0: 39 */
    uint32_t shards;          /* slices, each with a ring; 0: 1 */
    uint32_t leaf_lg2_max;    /* 12, 21 or 30; 0: 12. A leaf is dirty as a whole */
    uint32_t space;           /* enum dr_space */
    uint32_t ring_entries;    /* of each ring; 0: 4096 */
    uint32_t min_interval_us; /* pacing, see struct dr_hwpt_alloc */
    uint32_t untracked;       /* 1: no dirty tracking, no rings; devices may attach that cannot track */
    uint32_t format;          /* enum dr_format of ring/control.h; 0: AMD v1 */
    uint32_t levels;          /* of page tables, see struct dr_hwpt_alloc; 0: as few as will do */
    uint32_t always_on;       /* 1: devices set Dirty from the start, see DR_HWPT_ALWAYS_ON */
    uint32_t all_sizes;       /* 1: leaves of every power of two that the format has, see DR_HWPT_ALL_SIZES */
    uint32_t split;           /* enum dr_split: what becomes of large leaves while tracking */
    uint32_t collapse;        /* 1: they are made large again by dirtyring_disable(), in the background */
    uint32_t bbml;            /* of SMMUv3 formats, see struct dr_hwpt_alloc */
    uint32_t optional;        /* 1: tracked, and devices that cannot may attach meanwhile, see DR_HWPT_DIRTY_OPTIONAL */
    uint32_t reserved;        /* zero */
};

DIRTYRING_API int dirtyring_ioas_alloc(struct dirtyring_vm *vm, uint32_t *ioas);
DIRTYRING_API int dirtyring_hwpt_alloc(struct dirtyring_vm *vm, uint32_t ioas, const struct dirtyring_hwpt *attr,
                                       uint32_t *hwpt);

/* A device that is attached to the guest. */
struct dirtyring_device_info {
    uint32_t id;
    uint32_t hwpt;
    int32_t pid;      /* its process, as the service sees it */
    uint32_t flags;   /* DR_DEVICE_* of ring/control.h */
    uint32_t formats; /* a mask of DR_FORMAT_BIT of those that it walks */
    char name[32];    /* as it has called itself */
};

/* The device with the smallest id above `above`: 0 begins. -ENOENT: there is no more. */
DIRTYRING_API int dirtyring_device_info(struct dirtyring_vm *vm, uint32_t above, struct dirtyring_device_info *out);

struct dirtyring_hwpt_status {
    uint32_t format;     /* enum dr_format */
    uint32_t supported;  /* 1: it has rings, and all its devices can track it */
    uint32_t enabled;    /* 1: from the beginning of dirtyring_enable() to the end of dirtyring_disable() */
    uint32_t devices;    /* attached */
    uint32_t in_the_way; /* the smallest id of a device that cannot track it; 0: there is none */
};

/* -ENOENT: there is no such hwpt. */
DIRTYRING_API int dirtyring_hwpt_status(struct dirtyring_vm *vm, uint32_t hwpt, struct dirtyring_hwpt_status *out);

/* Frees an ioas or an hwpt. -EBUSY: an hwpt needs the ioas, or a device the hwpt. */
DIRTYRING_API int dirtyring_destroy(struct dirtyring_vm *vm, uint32_t object);

/* ---- maps, one by one: submit and wait --------------------------------------------------------------------------- */

enum dirtyring_map_flags {
    DIRTYRING_READ = DR_MAP_READ,
    DIRTYRING_WRITE = DR_MAP_WRITE,
    DIRTYRING_IDEMPOTENT = DR_MAP_IDEMPOTENT,
};

/* How an unmap reports what was dirty. */
enum dirtyring_harvest {
    DIRTYRING_HARVEST_NOW = 0,                      /* on return the runs can be read */
    DIRTYRING_HARVEST_DEFERRED = DR_UNMAP_DEFERRED, /* they can be before the next sync marker */
    DIRTYRING_HARVEST_DISCARD = DR_UNMAP_DISCARD,   /* never: the memory is going away */
    DIRTYRING_UNMAP_EMPTY_OK = DR_UNMAP_EMPTY_OK,   /* may be or'ed in: nothing mapped is no error */
};

/* What an unmap did. */
struct dirtyring_unmapped {
    uint64_t done; /* bytes from iova that are unmapped now */
    uint64_t
        epoch; /* in IOVA rings: keep translating the `done` bytes with the old map until the ring of their slice has
                       passed this very marker, which may come before or after; 0: none */
};

/* All of them wait for the service, for as long as it takes. -ESHUTDOWN: it is gone. -EBUSY: completions of pipelined
 * commands wait to be reaped and there is no room left. */
DIRTYRING_API int dirtyring_map(struct dirtyring_vm *vm, uint32_t ioas, uint64_t iova, uint64_t length, uint64_t oa,
                                uint32_t flags);
/* -EAGAIN: a ring is full, or tracking has begun meanwhile; result->done bytes are unmapped: release entries of the
 * rings, then unmap the rest.
 * length UINT64_MAX: to the end of the space. result may be NULL. */
DIRTYRING_API int dirtyring_unmap(struct dirtyring_vm *vm, uint32_t ioas, uint64_t iova, uint64_t length,
                                  uint32_t harvest, struct dirtyring_unmapped *result);
/* On return of enable every DMA that begins is tracked; on return of disable none is. Both wait for syncs that were
 * asked for before, which wait for room in the rings, after a restart of the service perhaps once more for one whose
 * markers have been released. So let another thread release entries meanwhile. -ENODEV of enable: a device is attached
 * that cannot be tracked, which dirtyring_hwpt_status() names; nothing was changed. */
DIRTYRING_API int dirtyring_enable(struct dirtyring_vm *vm, uint32_t hwpt);
DIRTYRING_API int dirtyring_disable(struct dirtyring_vm *vm, uint32_t hwpt);

/* Makes leaves in [iova, iova + length) smaller, 2^leaf_lg2 bytes at most, or larger, up to 2^leaf_lg2 bytes where what
 * is mapped allows it, while devices use them. What was dirty is: the parts of a leaf that is split all are, if it was.
 * No leaf is of two maps. */
DIRTYRING_API int dirtyring_split(struct dirtyring_vm *vm, uint32_t hwpt, uint64_t iova, uint64_t length,
                                  uint32_t leaf_lg2);
DIRTYRING_API int dirtyring_collapse(struct dirtyring_vm *vm, uint32_t hwpt, uint64_t iova, uint64_t length,
                                     uint32_t leaf_lg2);

/* ---- maps, pipelined --------------------------------------------------------------------------------------------- */

/* Queues a command; it is sent by dirtyring_submit, or with the next call that submits itself. Commands on overlapping
 * IOVAs take effect in order. A command behind an unmap that answers -EAGAIN runs nevertheless: link what depends on it
 * by waiting. -EAGAIN: the queue is full: submit and reap. Any value of user_data. */
DIRTYRING_API int dirtyring_queue_map(struct dirtyring_vm *vm, uint32_t ioas, uint64_t iova, uint64_t length,
                                      uint64_t oa, uint32_t flags, uint64_t user_data);
DIRTYRING_API int dirtyring_queue_unmap(struct dirtyring_vm *vm, uint32_t ioas, uint64_t iova, uint64_t length,
                                        uint32_t harvest, uint64_t user_data);
/* Puts a sync marker with `cookie` (43 bits; the library keeps the rest) into every ring of the hwpt; see
 * dirtyring_set_sync for the usual way. */
DIRTYRING_API int dirtyring_queue_sync(struct dirtyring_vm *vm, uint32_t hwpt, uint64_t cookie, uint64_t user_data);

/* Hands queued commands to the service. Never blocks. */
DIRTYRING_API int dirtyring_submit(struct dirtyring_vm *vm);

/* Takes up to `max` completions, returns how many. Never blocks. */
DIRTYRING_API uint32_t dirtyring_reap(struct dirtyring_vm *vm, struct dr_completion *completions, uint32_t max);

/* Asks for one call when a completion comes; true if there is none yet, and dirtyring_command_fd may be waited for
 * (poll, epoll, io_uring; readable). Arming resets the fd: never read it. */
DIRTYRING_API bool dirtyring_command_arm(struct dirtyring_vm *vm);
DIRTYRING_API int dirtyring_command_fd(const struct dirtyring_vm *vm);

/* ---- one ring: a shard of an hwpt -------------------------------------------------------------------------------- */

DIRTYRING_API int dirtyring_ring_open(struct dirtyring_vm *vm, uint32_t hwpt, uint32_t shard,
                                      struct dirtyring_ring **ring);
DIRTYRING_API void dirtyring_ring_close(struct dirtyring_ring *ring);

/* The next published entries, contiguous and in place: *entries is valid until released. 0: none. Peeking again gives
 * those behind. Decode with dr_is_marker(), dr_run_address() and dr_run_length(). */
DIRTYRING_API uint32_t dirtyring_ring_peek(struct dirtyring_ring *ring, const uint64_t **entries);

/* Gives back the oldest n entries peeked. Release after the copy: what is not released comes again after a
 * reconnect. */
DIRTYRING_API void dirtyring_ring_release(struct dirtyring_ring *ring, uint32_t n);

/* Asks for one call when an entry comes behind those peeked; true if there is none yet, and dirtyring_ring_fd may be
 * waited for. Arming resets the fd: never read it. */
DIRTYRING_API bool dirtyring_ring_arm(struct dirtyring_ring *ring);
DIRTYRING_API int dirtyring_ring_fd(const struct dirtyring_ring *ring);

/* ---- all rings of an hwpt as one --------------------------------------------------------------------------------- */

struct dirtyring_batch {
    const uint64_t *entries; /* in place */
    uint32_t count;          /* >= 1 */
    uint32_t shard;          /* whose ring */
};

/* Opens every ring of the hwpt. */
DIRTYRING_API int dirtyring_set_open(struct dirtyring_vm *vm, uint32_t hwpt, struct dirtyring_set **set);
DIRTYRING_API void dirtyring_set_close(struct dirtyring_set *set);

/* The next entries of the next ring that has some, in turn; markers are among them. false: none has. Batches of one
 * ring are released in the order in which they were peeked. */
DIRTYRING_API bool dirtyring_set_peek(struct dirtyring_set *set, struct dirtyring_batch *batch);
DIRTYRING_API void dirtyring_set_release(struct dirtyring_set *set, const struct dirtyring_batch *batch);

/* As for a ring. The fd is an epoll of all rings' fds; arming forgets who has called. */
DIRTYRING_API bool dirtyring_set_arm(struct dirtyring_set *set);
DIRTYRING_API int dirtyring_set_fd(const struct dirtyring_set *set);

/* Arms and sleeps in one system call, for who waits for nothing else. 1: peek, something may be there; 0: timeout_ms
 * are over (-1: never); -EINTR: a signal. A service that is gone calls nobody: see dirtyring_socket. */
DIRTYRING_API int dirtyring_set_wait(struct dirtyring_set *set, int timeout_ms);

/* Starts a sync of the hwpt, from any thread: whoever has released every entry up to its markers has all whose DMA had
 * completed before this call. Go on with peek and release until dirtyring_set_synced. -EBUSY: one is running, or queued
 * commands leave no room until they are reaped. */
DIRTYRING_API int dirtyring_set_sync(struct dirtyring_set *set);

/* 1: the markers of all rings have been released. 0: not yet, or no sync was started. Negative: the service refused, or
 * is gone, or the last sync could not start. Never waits: while the service is away, the answer is 0. */
DIRTYRING_API int dirtyring_set_synced(struct dirtyring_set *set);

/* ---- a bitmap, for those who want one ---------------------------------------------------------------------------- */

/* Reads all rings of an hwpt, and nobody else does meanwhile. Keeps what they report until it is read: in this process,
 * so a successor takes everything for dirty. */
struct dirtyring_log;
DIRTYRING_API int dirtyring_log_open(struct dirtyring_vm *vm, uint32_t hwpt, struct dirtyring_log **log);
DIRTYRING_API void dirtyring_log_close(struct dirtyring_log *log);

#define DIRTYRING_LOG_KEEP 1u /* what is reported stays dirty; as IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR */

/* Sets a bit for each page of 2^page_lg2 bytes, 12 to 63, that has a page of 4 KiB in [address, address + length) which
 * was written by DMA that ended before this call: bit 0 of byte 0 for the page that address is in. Sets no bit to 0.
 * What is set in no bit is cleared by none: a page that lies in the range in part is read in part. Neither range nor
 * bitmap need be aligned to anything. Addresses are those of the hwpt's space. -EINVAL: length is 0 or wraps; page_lg2;
 * an unknown flag. -EOVERFLOW: the service has lost track, and everything is dirty; told once. Else as
 * dirtyring_set_synced; what was reported is kept. */
DIRTYRING_API int dirtyring_log_read(struct dirtyring_log *log, uint64_t address, uint64_t length, uint32_t page_lg2,
                                     void *bitmap, uint32_t flags);

#ifdef __cplusplus
}
#endif

#endif
