/* uring_consumer SOCKET [REPORTS]: a VMM whose event loop is io_uring: it waits for its dirty ring as it does for all
 * else.
 *
 * Prints `token <hex> hwpt <id>` for device.c, and ends when REPORTS runs (100) have come.
 */
#define _GNU_SOURCE
#include "client/dirtyring.h"

#include <liburing.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MEMORY_BYTES (64ul << 20)

enum { RING_CALLED = 1, SERVICE_GONE = 2 }; /* user_data */

static int fail(const char *what, const char *why)
{
    fprintf(stderr, "uring_consumer: %s: %s\n", what, why);
    return 1;
}

/* Queues a one-shot poll. */
static void poll_for(struct io_uring *uring, int fd, unsigned events, uint64_t user_data)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(uring); /* never NULL: two polls at most, the queue has room for four */

    io_uring_prep_poll_add(sqe, fd, events);
    io_uring_sqe_set_data64(sqe, user_data);
}

/* Takes what there is and counts its runs. False: nothing follows, the hwpt is gone. */
static bool consume(struct dirtyring_ring *ring, uint64_t *runs)
{
    const uint64_t *entries;
    bool ended = false;
    uint32_t n;

    while ((n = dirtyring_ring_peek(ring, &entries)) > 0) {
        for (uint32_t i = 0; i < n; i++) {
            *runs += !dr_is_marker(entries[i]); /* here a VMM copies; vmm.c shows how */
            ended |= dr_is_marker(entries[i]) && dr_marker_kind(entries[i]) == DR_MARKER_END;
        }
        dirtyring_ring_release(ring, n);
    }
    return !ended;
}

static int loop(struct dirtyring_vm *vm, struct dirtyring_ring *ring, struct io_uring *uring, uint64_t reports)
{
    struct io_uring_cqe *cqe;
    uint64_t runs = 0;
    int error;

    poll_for(uring, dirtyring_socket(vm), POLLRDHUP, SERVICE_GONE);
    for (;;) {
        /* Arm after everything was taken: false says that more has come, so look again instead of waiting. */
        bool more;
        do
            more = consume(ring, &runs);
        while (more && !dirtyring_ring_arm(ring));
        if (!more || runs >= reports)
            break;
        poll_for(uring, dirtyring_ring_fd(ring), POLLIN, RING_CALLED);
        do
            error = io_uring_submit_and_wait(uring, 1);
        while (error == -EINTR);
        if (error < 0 || (error = io_uring_peek_cqe(uring, &cqe)) < 0)
            return fail("io_uring", strerror(-error));
        uint64_t what = io_uring_cqe_get_data64(cqe);
        io_uring_cqe_seen(uring, cqe);
        if (what == SERVICE_GONE)
            return fail("the service", "has gone");
    }
    printf("took %llu runs\n", (unsigned long long)runs);
    return 0;
}

int main(int argc, char **argv)
{
    struct dirtyring_vm *vm;
    struct dirtyring_ring *ring;
    struct dirtyring_hwpt attr = {.space = DR_SPACE_OA, .min_interval_us = 1000};
    struct io_uring uring;
    uint32_t ioas;
    uint32_t hwpt;

    if (argc < 2 || argc > 3) {
        fprintf(stderr, "usage: uring_consumer SOCKET [REPORTS]\n");
        return 2;
    }
    int memfd = memfd_create("guest", MFD_CLOEXEC);
    if (memfd < 0 || ftruncate(memfd, MEMORY_BYTES) != 0)
        return fail("the guest's memory", strerror(errno));
    int error = io_uring_queue_init(4, &uring, 0);
    if (error != 0)
        return fail("io_uring", strerror(-error));

    if (dirtyring_connect(argv[1], &vm) != 0)
        return fail("connect", dirtyring_error());
    if (dirtyring_memory_add(vm, 0, MEMORY_BYTES, memfd, 0) != 0 || dirtyring_ioas_alloc(vm, &ioas) != 0 ||
        dirtyring_hwpt_alloc(vm, ioas, &attr, &hwpt) != 0 ||
        dirtyring_map(vm, ioas, 0, MEMORY_BYTES, 0, DIRTYRING_READ | DIRTYRING_WRITE) != 0 ||
        dirtyring_enable(vm, hwpt) != 0 || dirtyring_ring_open(vm, hwpt, 0, &ring) != 0)
        return fail("set-up", dirtyring_error());

    printf("token ");
    for (int i = 0; i < 16; i++)
        printf("%02x", dirtyring_token(vm)[i]);
    printf(" hwpt %u\n", hwpt);
    fflush(stdout);

    int status = loop(vm, ring, &uring, argc == 3 ? strtoull(argv[2], NULL, 0) : 100);
    dirtyring_ring_close(ring);
    dirtyring_close(vm);
    io_uring_queue_exit(&uring);
    return status;
}
