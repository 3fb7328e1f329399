#include "client/dirty_log.hpp"
#include "client/vm.hpp"

using namespace dirtyring::client;

struct dirtyring_log {
    struct SetCloser {
        void operator()(dirtyring_set *set) const { dirtyring_set_close(set); }
    };
    std::unique_ptr<dirtyring_set, SetCloser> set;
    DirtyLog dirty;
    bool all_dirty = false; // a marker says so, and nobody has been told

    void take(const dirtyring_batch &batch)
    {
        for (std::uint32_t i = 0; i < batch.count; ++i) {
            const std::uint64_t entry = batch.entries[i];
            if (!dr_is_marker(entry))
                dirty.set(dr_run_address(entry) >> DR_PAGE_LG2, dr_run_length(entry) >> DR_PAGE_LG2);
            else
                all_dirty |= dr_marker_kind(entry) == DR_MARKER_ALL_DIRTY || dr_marker_kind(entry) >= 128;
        }
    }

    // What is written now is in the set. 0 or -errno.
    int sync()
    {
        if (const int error = dirtyring_set_sync(set.get()); error != 0)
            return error;
        for (;;) {
            dirtyring_batch batch{};
            while (dirtyring_set_peek(set.get(), &batch)) {
                take(batch);
                dirtyring_set_release(set.get(), &batch);
            }
            if (const int synced = dirtyring_set_synced(set.get()); synced != 0)
                return synced < 0 ? synced : 0;
            static_cast<void>(dirtyring_set_wait(set.get(), look_again_ms));
        }
    }

  private:
    static constexpr int look_again_ms = 100; // for a service that is gone, which calls nobody
};

int dirtyring_log_open(dirtyring_vm *vm, uint32_t hwpt, dirtyring_log **out)
{
    *out = nullptr;
    auto log = make<dirtyring_log>();
    if (!log)
        return -ENOMEM;
    dirtyring_set *set = nullptr;
    if (const int error = dirtyring_set_open(vm, hwpt, &set); error != 0)
        return error;
    log->set.reset(set);
    if (const int error = log->dirty.open(DR_OA_LG2); error != 0)
        return fail(-error, "cannot map a log of 2^%d bytes: %s", DR_OA_LG2, std::strerror(-error));
    *out = log.release();
    return 0;
}

void dirtyring_log_close(dirtyring_log *log)
{
    Owned<dirtyring_log>{log};
}

int dirtyring_log_read(dirtyring_log *log, uint64_t address, uint64_t length, uint32_t page_lg2, void *bitmap,
                       uint32_t flags)
{
    if (length == 0 || length - 1 > UINT64_MAX - address)
        return fail(EINVAL, "%#" PRIx64 " bytes at %#" PRIx64 ": expected one or more, and no wrap", length, address);
    if (page_lg2 < DR_PAGE_LG2 || page_lg2 > 63)
        return fail(EINVAL, "pages of 2^%u bytes, expected 2^%d to 2^63", page_lg2, DR_PAGE_LG2);
    if ((flags & ~std::uint32_t{DIRTYRING_LOG_KEEP}) != 0)
        return fail(EINVAL, "flags %#x: only %#x is known", flags, DIRTYRING_LOG_KEEP);
    if (const int error = log->sync(); error != 0)
        return error;
    if (std::exchange(log->all_dirty, false))
        return fail(EOVERFLOW, "the service has lost track: everything is dirty");
    auto *bytes = static_cast<unsigned char *>(bitmap);
    const std::uint64_t first_unit = address >> page_lg2;
    log->dirty.take(address >> DR_PAGE_LG2, (address + (length - 1)) >> DR_PAGE_LG2, (flags & DIRTYRING_LOG_KEEP) != 0,
                    [&](std::uint64_t page) {
                        const std::uint64_t bit = (page >> (page_lg2 - DR_PAGE_LG2)) - first_unit;
                        bytes[bit / 8] = static_cast<unsigned char>(bytes[bit / 8] | 1u << (bit % 8));
                    });
    return 0;
}
