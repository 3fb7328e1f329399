/* libdirtyring, the device's side: DMA by IOVA through the hwpt of a guest, setting Access and Dirty as an IOMMU would.
 *
 * Functions that can fail return 0 or a negative errno and leave a sentence in dirtyring_error() (client/dirtyring.h).
 *
 * Threads: attach and detach from one thread; each struct dirtyring_dma belongs to one thread at a time.
 *
 *   struct dirtyring_device *dev;
 *   dirtyring_device_attach(path, &(struct dirtyring_attach){.token = token, .hwpt = hwpt}, &dev);
 *   struct dirtyring_dma *dma = dirtyring_device_dma(dev, 0);
 *   dirtyring_dma_write(dma, iova, data, length, NULL);
 */
#ifndef DIRTYRING_DEVICE_H
#define DIRTYRING_DEVICE_H

#include "client/dirtyring.h"

#include <sys/uio.h>

#ifdef __cplusplus
extern "C" {
#endif

struct dirtyring_device;
struct dirtyring_dma;

struct dirtyring_attach {
    const uint8_t *token; /* 16 bytes, of dirtyring_token */
    uint32_t hwpt;
    uint32_t threads;      /* DMA threads; 0: 1; at most 64 */
    uint32_t cannot_track; /* 1: an IOMMU without Dirty bits; what requires tracking, or is enabled, refuses it */
    uint32_t pins;         /* DMA in flight at once, of each thread; threads * pins at most 4096; 0: none */
    uint32_t formats;      /* that its IOMMU walks: DR_FORMAT_BIT of each (ring/control.h); 0: all of the library's */
    uint32_t not_coherent; /* 1: an IOMMU whose walks are not coherent: in VT-d tables it cannot track */
    uint32_t reserved[2];  /* zero */
    const char *name;      /* for messages: 1 to 31 printable characters of ASCII; NULL: "unnamed" */
};

/* Connects, attaches to the hwpt, and maps the guest's memory and the tables. On return every walker knows the device's
 * cells. DMA is this process's alone: after fork(2) the child has no business here. Errors of connect(2), of struct
 * dr_device_attach, and of mmap(2). *dev is NULL on failure. */
DIRTYRING_API int dirtyring_device_attach(const char *socket_path, const struct dirtyring_attach *attach,
                                          struct dirtyring_device **dev);

/* Detaches and frees; on failure the device stays. -EBUSY: a thread is in a section or holds a pin. NULL is allowed.
 * Connects again if the service's worker has died, which DMA need not know. When the service is gone there is nothing
 * to detach from: frees, returns 0. */
DIRTYRING_API int dirtyring_device_detach(struct dirtyring_device *dev);

/* The DMA of thread `index`; NULL if there is no such thread. */
DIRTYRING_API struct dirtyring_dma *dirtyring_device_dma(struct dirtyring_device *dev, uint32_t index);

/* The socket: hung up (POLLRDHUP) means that the service's worker has died. */
DIRTYRING_API int dirtyring_device_socket(const struct dirtyring_device *dev);

enum dirtyring_fault_reason {
    DIRTYRING_FAULT_NONE = 0,
    DIRTYRING_FAULT_NOT_PRESENT = 1, /* no translation */
    DIRTYRING_FAULT_READ = 2,        /* the map forbids reading */
    DIRTYRING_FAULT_WRITE = 3,       /* the map forbids writing */
    DIRTYRING_FAULT_APERTURE = 4,    /* outside the IOVA space */
    DIRTYRING_FAULT_TABLE = 5,       /* a table entry points outside the tables, as if by a hardware error */
    DIRTYRING_FAULT_MEMORY = 6,      /* the OA is not in the guest's memory */
    DIRTYRING_FAULT_CLOSED = 7,      /* pin: the range is being unmapped */
    DIRTYRING_FAULT_STALLED = 8,     /* the leaf was being replaced for too long: the service stands still */
};

struct dirtyring_fault {
    uint64_t iova; /* of the access that failed, bytes */
    uint32_t reason;
    uint32_t write; /* 1: it was a write */
    uint64_t done;  /* bytes transferred before it */
};

/* A section: short, for copies. Its runs are published after it ends, and map changes wait for it, so never sleep, wait
 * or do I/O inside. DMA outside a section makes one of its own, of at most 64 KiB at a time. Sections do not nest. */
DIRTYRING_API void dirtyring_dma_begin(struct dirtyring_dma *dma);
DIRTYRING_API void dirtyring_dma_end(struct dirtyring_dma *dma);

/* Copies between data and the guest's memory at [iova, iova + length). -EFAULT: *fault tells (may be NULL). */
DIRTYRING_API int dirtyring_dma_write(struct dirtyring_dma *dma, uint64_t iova, const void *data, uint64_t length,
                                      struct dirtyring_fault *fault);
DIRTYRING_API int dirtyring_dma_read(struct dirtyring_dma *dma, uint64_t iova, void *data, uint64_t length,
                                     struct dirtyring_fault *fault);

/* Pins: for DMA that is in flight without a section, as a disk read that lands straight in the guest's memory.
 *
 *   int pin = dirtyring_dma_pin(dma, iova, length, DIRTYRING_WRITE, pieces, &count, NULL);
 *   … readv from the disk into pieces, by io_uring …
 *   dirtyring_dma_unpin(dma, pin);        after the data has landed
 *   … tell the guest …
 *
 * While it is pinned the translation stays: an unmap of the range waits, and so does a sync if the pin is for writing.
 * Runs of the range are published all the same. When the process dies, what was pinned for writing is reported; what
 * the kernel brings in for a request that outlives it, and that nobody told the guest of, is not. */
#define DIRTYRING_PIN_MAX (4u << 20) /* bytes of one pin */

/* Pins [iova, iova + length) for DMA that reads guest memory (DIRTYRING_READ) or writes it (DIRTYRING_WRITE), and puts
 * the pieces of guest memory it translates to, in order, into `pieces`. *count: of entries there; on return, also of a
 * failure, of those used. iova and length need no alignment. Returns the pin, which is below dirtyring_attach.pins, or:
 * -EAGAIN: all pins are held. -EMSGSIZE: more pieces than *count, which now tells how many. -EINVAL: the length is 0 or
 * over DIRTYRING_PIN_MAX, or neither READ nor WRITE. -EFAULT: *fault tells (may be NULL). */
DIRTYRING_API int dirtyring_dma_pin(struct dirtyring_dma *dma, uint64_t iova, uint64_t length, uint32_t direction,
                                    struct iovec *pieces, uint32_t *count, struct dirtyring_fault *fault);

/* Gives a pin back, from the thread that took it; for writing, it is dirty from here on. -EINVAL: no such pin is held.
 * -EFAULT: the tables were damaged, and not all of it could be marked dirty; the pin is gone. */
DIRTYRING_API int dirtyring_dma_unpin(struct dirtyring_dma *dma, int pin);

#ifdef __cplusplus
}
#endif

#endif
