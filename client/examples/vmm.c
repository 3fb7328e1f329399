/* vmm SOCKET [REPORTS]: a VMM that tracks what devices write to its guest's memory, and copies it, as a migration
 * would.
 *
 * Prints `token <hex> hwpt <id>`, with which a device (device.c) can attach; copies until REPORTS runs (100) have come,
 * then syncs, and ends when everything written before the sync has been copied.
 */
#define _GNU_SOURCE
#include "client/dirtyring.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MEMORY_BYTES (64ul << 20)

struct migration {
    const char *memory; /* the guest's */
    char *destination;
    uint64_t runs;
    uint64_t bytes;
};

static int fail(const char *what, const char *why)
{
    fprintf(stderr, "vmm: %s: %s\n", what, why);
    return 1;
}

/* Copies what one entry names. The rings are made in OA space, so addresses are guest-physical: offsets into our
 * memory. */
static int copy(struct migration *m, uint64_t entry)
{
    uint64_t at = dr_run_address(entry);
    uint64_t length = dr_run_length(entry);

    if (dr_is_marker(entry)) {
        uint32_t kind = dr_marker_kind(entry);
        if (kind == DR_MARKER_END)
            return fail("the hwpt", "has gone");
        if (kind != DR_MARKER_ALL_DIRTY && kind < 128)
            return 0; /* a sync marker (the set has seen it), or a kind that we need not know */
        at = 0;
        length = MEMORY_BYTES;
    }
    if (at > MEMORY_BYTES || length > MEMORY_BYTES - at)
        return fail("a run", "lies outside the guest's memory");
    memcpy(m->destination + at, m->memory + at, length);
    m->runs++;
    m->bytes += length;
    return 0;
}

/* Everything that can be read now. Entries are given back once copied; the service makes room of them. */
static int drain(struct dirtyring_set *set, struct migration *m)
{
    struct dirtyring_batch batch;

    while (dirtyring_set_peek(set, &batch)) {
        for (uint32_t i = 0; i < batch.count; i++) {
            if (copy(m, batch.entries[i]) != 0)
                return 1;
        }
        dirtyring_set_release(set, &batch);
    }
    return 0;
}

static int migrate(struct dirtyring_vm *vm, struct dirtyring_set *set, struct migration *m, uint64_t reports)
{
    struct pollfd fds[] = {{.fd = dirtyring_set_fd(set), .events = POLLIN},
                           {.fd = dirtyring_socket(vm), .events = POLLRDHUP}};
    int synced = 0;
    int syncing = 0;

    while (!synced) {
        if (drain(set, m) != 0)
            return 1;
        /* A real VMM stops the guest's CPUs and devices before this sync. */
        if (!syncing && m->runs >= reports) {
            if (dirtyring_set_sync(set) != 0)
                return fail("sync", dirtyring_error());
            syncing = 1;
        }
        synced = dirtyring_set_synced(set);
        if (synced < 0)
            return fail("sync", dirtyring_error());
        /* Arm, and sleep only if nothing has come meanwhile. */
        if (!synced && dirtyring_set_arm(set)) {
            if (poll(fds, 2, -1) < 0 && errno != EINTR)
                return fail("poll", strerror(errno));
            if (fds[1].revents != 0)
                return fail("the service", "has gone");
        }
    }
    printf("synced after %llu runs, %llu bytes\n", (unsigned long long)m->runs, (unsigned long long)m->bytes);
    return 0;
}

int main(int argc, char **argv)
{
    struct dirtyring_vm *vm;
    struct dirtyring_set *set;
    struct migration m = {0};
    struct dirtyring_hwpt attr = {.space = DR_SPACE_OA, .shards = 2, .min_interval_us = 1000};
    uint32_t ioas;
    uint32_t hwpt;

    if (argc < 2 || argc > 3) {
        fprintf(stderr, "usage: vmm SOCKET [REPORTS]\n");
        return 2;
    }
    int memfd = memfd_create("guest", MFD_CLOEXEC);
    if (memfd < 0 || ftruncate(memfd, MEMORY_BYTES) != 0)
        return fail("the guest's memory", strerror(errno));
    m.memory = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    m.destination = calloc(1, MEMORY_BYTES);
    if (m.memory == MAP_FAILED || m.destination == NULL)
        return fail("memory", strerror(errno));

    /* The guest, its memory, an IOVA space with a page table, and all memory mapped at IOVA 0. */
    if (dirtyring_connect(argv[1], &vm) != 0)
        return fail("connect", dirtyring_error());
    if (dirtyring_memory_add(vm, 0, MEMORY_BYTES, memfd, 0) != 0 || dirtyring_ioas_alloc(vm, &ioas) != 0 ||
        dirtyring_hwpt_alloc(vm, ioas, &attr, &hwpt) != 0 ||
        dirtyring_map(vm, ioas, 0, MEMORY_BYTES, 0, DIRTYRING_READ | DIRTYRING_WRITE) != 0)
        return fail("set-up", dirtyring_error());

    /* From here on, what devices write is reported. */
    if (dirtyring_enable(vm, hwpt) != 0 || dirtyring_set_open(vm, hwpt, &set) != 0)
        return fail("tracking", dirtyring_error());

    /* Whoever knows the token can attach a device. */
    printf("token ");
    for (int i = 0; i < 16; i++)
        printf("%02x", dirtyring_token(vm)[i]);
    printf(" hwpt %u\n", hwpt);
    fflush(stdout);

    int status = migrate(vm, set, &m, argc == 3 ? strtoull(argv[2], NULL, 0) : 100);
    dirtyring_set_close(set);
    dirtyring_close(vm);
    return status;
}
