/* file_reader SOCKET TOKEN HWPT IOVA FILE [DEPTH]: an emulated disk: reads FILE by io_uring straight into its guest's
 * memory.
 *
 * SOCKET is the service's, TOKEN (32 hex digits) and HWPT are what vmm.c prints. FILE goes to IOVA, with up to DEPTH
 * (64, at most 1024) reads in flight. What is in flight is pinned: pin, read into the pieces, unpin, tell the guest.
 */
#define _GNU_SOURCE
#include "client/dirtyring_device.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define READ_BYTES 65536u
#define PIECES_MAX (READ_BYTES / 4096u + 1) /* one more than pages: IOVA need not be aligned */
#define DEPTH_MAX 1024u

/* One read in flight. */
struct request {
    struct request *next; /* while it is free */
    int pin;
    uint64_t offset;              /* in the file, */
    uint64_t left;                /*   of what has not landed yet */
    struct iovec *piece;          /* the first of those */
    uint32_t pieces;              /*   that are left */
    struct iovec all[PIECES_MAX]; /* as they were pinned */
};

struct disk {
    struct dirtyring_dma *dma;
    struct io_uring uring;
    int file;
    uint64_t size; /* of what is to be read */
    uint64_t iova;
    uint64_t next; /* offset of the next read */
    struct request *free;
    uint32_t in_flight;
    uint32_t most; /* in flight at once */
    uint64_t done; /* bytes that have landed */
};

static int fail(const char *what, const char *why)
{
    fprintf(stderr, "file_reader: %s: %s\n", what, why);
    return 1;
}

static int parse_token(const char *hex, uint8_t token[16])
{
    if (strlen(hex) != 32 || strspn(hex, "0123456789abcdef") != 32)
        return -1;
    for (int i = 0; i < 16; i++) {
        char digits[3] = {hex[2 * i], hex[2 * i + 1], '\0'};
        token[i] = (uint8_t)strtoul(digits, NULL, 16);
    }
    return 0;
}

static int parse_number(const char *word, uint64_t max, uint64_t *number)
{
    char *end;

    errno = 0;
    *number = strtoull(word, &end, 0);
    return errno == 0 && end != word && *end == '\0' && *number <= max ? 0 : -1;
}

/* Queues what is left of a request. */
static void queue(struct disk *d, struct request *r)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&d->uring); /* never NULL: the queue has room for DEPTH */

    io_uring_prep_readv(sqe, d->file, r->piece, r->pieces, r->offset);
    io_uring_sqe_set_data(sqe, r);
}

/* Begins as many reads as can be pinned. */
static int begin(struct disk *d)
{
    while (d->next < d->size) {
        uint64_t left = d->size - d->next;
        uint32_t length = left < READ_BYTES ? (uint32_t)left : READ_BYTES;
        struct iovec pieces[PIECES_MAX];
        uint32_t count = PIECES_MAX;
        int pin = dirtyring_dma_pin(d->dma, d->iova + d->next, length, DIRTYRING_WRITE, pieces, &count, NULL);

        if (pin == -EAGAIN)
            return 0; /* all pins are held: each read that ends gives one back */
        if (pin < 0)
            return fail("pin", dirtyring_error());

        struct request *r = d->free; /* never NULL: there is one for each pin */
        d->free = r->next;
        r->pin = pin;
        r->offset = d->next;
        r->left = length;
        r->piece = memcpy(r->all, pieces, sizeof pieces);
        r->pieces = count;
        queue(d, r);
        d->next += length;
        if (++d->in_flight > d->most)
            d->most = d->in_flight;
    }
    return 0;
}

/* n bytes have landed, fewer than were left. */
static void advance(struct request *r, uint64_t n)
{
    r->offset += n;
    r->left -= n;
    for (; n >= r->piece->iov_len; r->pieces--)
        n -= r->piece++->iov_len;
    r->piece->iov_base = (char *)r->piece->iov_base + n;
    r->piece->iov_len -= n;
}

/* Takes a completion: bytes, 0 at the end of the file, or a negative errno. */
static int complete(struct disk *d, struct request *r, int result)
{
    uint64_t n = result > 0 ? (uint64_t)result : 0;
    int status = 0;

    d->done += n;
    if (result == -EINTR || result == -EAGAIN || (n > 0 && n < r->left)) {
        advance(r, n);
        queue(d, r); /* the rest, under the same pin */
        return 0;
    }
    if (result < 0)
        status = fail("read", strerror(-result));
    if (result <= 0)
        d->size = 0; /* also if the file has become shorter: begin no more */

    /* In this order: the data has landed; unpin; tell the guest. (Nobody listens: we count.) */
    if (dirtyring_dma_unpin(d->dma, r->pin) != 0)
        status = fail("unpin", dirtyring_error());
    r->next = d->free;
    d->free = r;
    d->in_flight--;
    return status;
}

static int read_file(struct disk *d)
{
    int status = begin(d);

    /* Also after a failure: what is in flight lands, so its pins are held until then. */
    while (d->in_flight > 0) {
        struct io_uring_cqe *cqe;
        int error = io_uring_submit_and_wait(&d->uring, 1);

        if (error < 0 && error != -EINTR && error != -EAGAIN)
            return fail("io_uring", strerror(-error));
        while (io_uring_peek_cqe(&d->uring, &cqe) == 0) {
            status |= complete(d, io_uring_cqe_get_data(cqe), cqe->res);
            io_uring_cqe_seen(&d->uring, cqe);
        }
        if (status == 0)
            status = begin(d);
    }
    return status;
}

int main(int argc, char **argv)
{
    uint8_t token[16];
    uint64_t hwpt;
    uint64_t depth = 64;
    struct disk d = {0};
    struct dirtyring_attach attach = {.token = token};
    struct dirtyring_device *dev;
    struct stat status;

    if (argc < 6 || argc > 7 || parse_token(argv[2], token) != 0 || parse_number(argv[3], UINT32_MAX, &hwpt) != 0 ||
        parse_number(argv[4], UINT64_MAX, &d.iova) != 0 ||
        (argc == 7 && (parse_number(argv[6], DEPTH_MAX, &depth) != 0 || depth == 0))) {
        fprintf(stderr, "usage: file_reader SOCKET TOKEN HWPT IOVA FILE [DEPTH], DEPTH 1 to %u\n", DEPTH_MAX);
        return 2;
    }
    d.file = open(argv[5], O_RDONLY | O_CLOEXEC);
    if (d.file < 0 || fstat(d.file, &status) != 0)
        return fail(argv[5], strerror(errno));
    d.size = (uint64_t)status.st_size;
    struct request *requests = calloc(depth, sizeof *requests);
    if (requests == NULL)
        return fail("memory", strerror(errno));
    for (uint64_t i = 0; i < depth; i++) {
        requests[i].next = d.free;
        d.free = &requests[i];
    }
    int error = io_uring_queue_init((unsigned)depth, &d.uring, 0);
    if (error != 0)
        return fail("io_uring", strerror(-error));

    attach.hwpt = (uint32_t)hwpt;
    attach.pins = (uint32_t)depth;
    if (dirtyring_device_attach(argv[1], &attach, &dev) != 0)
        return fail("attach", dirtyring_error());
    d.dma = dirtyring_device_dma(dev, 0);
    int result = read_file(&d);
    if (dirtyring_device_detach(dev) != 0)
        return fail("detach", dirtyring_error());
    io_uring_queue_exit(&d.uring);
    free(requests);
    if (result == 0)
        printf("read %llu bytes, at most %u reads in flight\n", (unsigned long long)d.done, d.most);
    return result;
}
