/* device SOCKET TOKEN HWPT [PAGES_PER_SECOND [SECONDS]]: an emulated device that writes to its guest's memory by DMA.
 *
 * SOCKET is the service's, TOKEN (32 hex digits) and HWPT are what vmm.c prints. Writes at random IOVAs below 64 MiB
 * until the time (10 s) is up or the service lets go of it.
 */
#define _GNU_SOURCE
#include "client/dirtyring_device.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MEMORY_BYTES (64ul << 20)
#define PAGE 4096u

static int fail(const char *what, const char *why)
{
    fprintf(stderr, "device: %s: %s\n", what, why);
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

/* True once the service has gone, at the latest after timeout_ms. */
static int hung_up(const struct dirtyring_device *dev, int timeout_ms)
{
    struct pollfd fd = {.fd = dirtyring_device_socket(dev), .events = POLLRDHUP};

    return poll(&fd, 1, timeout_ms) > 0;
}

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void sleep_until(uint64_t ns)
{
    struct timespec t = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};

    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR) {
    }
}

/* Writes one page every interval_ns. */
static int write_pages(struct dirtyring_device *dev, uint64_t interval_ns, uint64_t end_ns)
{
    struct dirtyring_dma *dma = dirtyring_device_dma(dev, 0);
    struct dirtyring_fault fault;
    char page[PAGE];
    uint64_t random = 88172645463325252u; /* xorshift */
    uint64_t written = 0;

    for (uint64_t next = now_ns(); next < end_ns && !hung_up(dev, 0); next += interval_ns) {
        sleep_until(next);
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        memset(page, (int)(random >> 56), sizeof page);

        /* One write is one section, unless dirtyring_dma_begin and _end put several into one. */
        if (dirtyring_dma_write(dma, random % (MEMORY_BYTES / PAGE) * PAGE, page, sizeof page, &fault) != 0) {
            if (fault.reason == DIRTYRING_FAULT_NOT_PRESENT && hung_up(dev, 1000))
                break; /* the guest was taken down: its maps first, then we */
            return fail("write", dirtyring_error());
        }
        written++;
    }
    printf("wrote %llu pages\n", (unsigned long long)written);
    return 0;
}

int main(int argc, char **argv)
{
    uint8_t token[16];
    struct dirtyring_attach attach = {.token = token};
    struct dirtyring_device *dev;

    if (argc < 4 || argc > 6 || parse_token(argv[2], token) != 0) {
        fprintf(stderr, "usage: device SOCKET TOKEN HWPT [PAGES_PER_SECOND [SECONDS]]\n");
        return 2;
    }
    attach.hwpt = (uint32_t)strtoul(argv[3], NULL, 0);
    uint64_t rate = argc > 4 ? strtoull(argv[4], NULL, 0) : 1000;
    uint64_t seconds = argc > 5 ? strtoull(argv[5], NULL, 0) : 10;
    if (rate == 0 || rate > 1000000000u)
        return fail("PAGES_PER_SECOND", "1 to 1000000000");

    if (dirtyring_device_attach(argv[1], &attach, &dev) != 0)
        return fail("attach", dirtyring_error());
    int status = write_pages(dev, 1000000000u / rate, now_ns() + seconds * 1000000000u);
    if (dirtyring_device_detach(dev) != 0)
        return fail("detach", dirtyring_error());
    return status;
}
