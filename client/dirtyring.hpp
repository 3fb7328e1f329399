// The C API as C++ values: handles that close themselves, failures as values. Nothing more.
#pragma once

#include "client/dirtyring_device.h"

#include <tl/expected.hpp>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

namespace dirtyring {

struct Error {
    int code; // a positive errno
    std::string sentence;
};

template <class T> using Result = tl::expected<T, Error>;

namespace detail {

inline tl::unexpected<Error> failure(int rc)
{
    return tl::unexpected(Error{-rc, dirtyring_error()});
}

inline Result<void> result(int rc)
{
    if (rc < 0)
        return failure(rc);
    return {};
}

template <auto close> struct Closer {
    template <class T> void operator()(T *handle) const { close(handle); }
};

} // namespace detail

// All rings of an hwpt. Close it before its guest.
class RingSet
{
  public:
    static Result<RingSet> open(dirtyring_vm *vm, std::uint32_t hwpt)
    {
        dirtyring_set *set = nullptr;
        if (const int rc = dirtyring_set_open(vm, hwpt, &set); rc < 0)
            return detail::failure(rc);
        return RingSet(set);
    }

    [[nodiscard]] std::optional<dirtyring_batch> peek()
    {
        dirtyring_batch batch{};
        return dirtyring_set_peek(set_.get(), &batch) ? std::optional(batch) : std::nullopt;
    }
    void release(const dirtyring_batch &batch) { dirtyring_set_release(set_.get(), &batch); }

    // True: nothing is there yet, and fd() may be waited for.
    [[nodiscard]] bool arm() { return dirtyring_set_arm(set_.get()); }
    [[nodiscard]] int fd() const { return dirtyring_set_fd(set_.get()); }
    // False: the time is over. True after a signal, too.
    bool wait(int timeout_ms = -1) { return dirtyring_set_wait(set_.get(), timeout_ms) != 0; }

    Result<void> sync() { return detail::result(dirtyring_set_sync(set_.get())); }
    [[nodiscard]] Result<bool> synced()
    {
        const int rc = dirtyring_set_synced(set_.get());
        if (rc < 0)
            return detail::failure(rc);
        return rc == 1;
    }

  private:
    explicit RingSet(dirtyring_set *set) : set_(set) {}

    std::unique_ptr<dirtyring_set, detail::Closer<dirtyring_set_close>> set_;
};

class Guest
{
  public:
    static Result<Guest> connect(const std::string &socket_path)
    {
        dirtyring_vm *vm = nullptr;
        if (const int rc = dirtyring_connect(socket_path.c_str(), &vm); rc < 0)
            return detail::failure(rc);
        return Guest(vm);
    }

    static Result<Guest> connect(const std::string &socket_path, const dirtyring_guest &attributes)
    {
        dirtyring_vm *vm = nullptr;
        if (const int rc = dirtyring_connect_guest(socket_path.c_str(), &attributes, &vm); rc < 0)
            return detail::failure(rc);
        return Guest(vm);
    }
    static Result<Guest> take(const std::string &socket_path, const std::uint8_t *secret)
    {
        dirtyring_vm *vm = nullptr;
        if (const int rc = dirtyring_take(socket_path.c_str(), secret, &vm); rc < 0)
            return detail::failure(rc);
        return Guest(vm);
    }
    // For a successor. Rings are closed before; nothing may be called after.
    void leave() { dirtyring_leave(vm_.release()); }
    Result<void> reconnect() { return detail::result(dirtyring_reconnect(vm_.get())); }

    [[nodiscard]] const std::uint8_t *token() const { return dirtyring_token(vm_.get()); }
    [[nodiscard]] const std::uint8_t *secret() const { return dirtyring_secret(vm_.get()); }
    [[nodiscard]] std::optional<struct dirtyring_stalled> stalled() const
    {
        struct dirtyring_stalled told {
        };
        return dirtyring_stalled(vm_.get(), &told) ? std::optional(told) : std::nullopt;
    }
    [[nodiscard]] int socket() const { return dirtyring_socket(vm_.get()); }

    Result<void> memory_add(std::uint64_t oa, std::uint64_t length, int memfd)
    {
        return detail::result(dirtyring_memory_add(vm_.get(), oa, length, memfd, 0));
    }
    Result<std::uint32_t> ioas_alloc()
    {
        std::uint32_t ioas = 0;
        if (const int rc = dirtyring_ioas_alloc(vm_.get(), &ioas); rc < 0)
            return detail::failure(rc);
        return ioas;
    }
    Result<std::uint32_t> hwpt_alloc(std::uint32_t ioas, const dirtyring_hwpt &attributes)
    {
        std::uint32_t hwpt = 0;
        if (const int rc = dirtyring_hwpt_alloc(vm_.get(), ioas, &attributes, &hwpt); rc < 0)
            return detail::failure(rc);
        return hwpt;
    }
    // The device with the smallest id above `above`; ENOENT: there is no more.
    Result<struct dirtyring_device_info> device_info(std::uint32_t above)
    {
        struct dirtyring_device_info told {
        };
        if (const int rc = dirtyring_device_info(vm_.get(), above, &told); rc < 0)
            return detail::failure(rc);
        return told;
    }
    Result<struct dirtyring_hwpt_status> hwpt_status(std::uint32_t hwpt)
    {
        struct dirtyring_hwpt_status told {
        };
        if (const int rc = dirtyring_hwpt_status(vm_.get(), hwpt, &told); rc < 0)
            return detail::failure(rc);
        return told;
    }
    Result<void> map(std::uint32_t ioas, std::uint64_t iova, std::uint64_t length, std::uint64_t oa,
                     std::uint32_t flags)
    {
        return detail::result(dirtyring_map(vm_.get(), ioas, iova, length, oa, flags));
    }
    Result<void> split(std::uint32_t hwpt, std::uint64_t iova, std::uint64_t length, std::uint32_t leaf_lg2)
    {
        return detail::result(dirtyring_split(vm_.get(), hwpt, iova, length, leaf_lg2));
    }
    Result<void> collapse(std::uint32_t hwpt, std::uint64_t iova, std::uint64_t length, std::uint32_t leaf_lg2)
    {
        return detail::result(dirtyring_collapse(vm_.get(), hwpt, iova, length, leaf_lg2));
    }
    Result<void> enable(std::uint32_t hwpt) { return detail::result(dirtyring_enable(vm_.get(), hwpt)); }
    Result<RingSet> open_rings(std::uint32_t hwpt) { return RingSet::open(vm_.get(), hwpt); }

    // Pipelined. An error whose code is EAGAIN: submit and reap first.
    Result<void> queue_map(std::uint32_t ioas, std::uint64_t iova, std::uint64_t length, std::uint64_t oa,
                           std::uint32_t flags, std::uint64_t user_data)
    {
        return detail::result(dirtyring_queue_map(vm_.get(), ioas, iova, length, oa, flags, user_data));
    }
    Result<void> queue_unmap(std::uint32_t ioas, std::uint64_t iova, std::uint64_t length, std::uint32_t harvest,
                             std::uint64_t user_data)
    {
        return detail::result(dirtyring_queue_unmap(vm_.get(), ioas, iova, length, harvest, user_data));
    }
    Result<void> submit() { return detail::result(dirtyring_submit(vm_.get())); }
    [[nodiscard]] std::uint32_t reap(dr_completion *completions, std::uint32_t max)
    {
        return dirtyring_reap(vm_.get(), completions, max);
    }
    [[nodiscard]] bool command_arm() { return dirtyring_command_arm(vm_.get()); }
    [[nodiscard]] int command_fd() const { return dirtyring_command_fd(vm_.get()); }

  private:
    explicit Guest(dirtyring_vm *vm) : vm_(vm) {}

    std::unique_ptr<dirtyring_vm, detail::Closer<dirtyring_close>> vm_;
};

class Device
{
  public:
    static Result<Device> attach(const std::string &socket_path, const dirtyring_attach &attributes)
    {
        dirtyring_device *device = nullptr;
        if (const int rc = dirtyring_device_attach(socket_path.c_str(), &attributes, &device); rc < 0)
            return detail::failure(rc);
        return Device(device);
    }

    [[nodiscard]] dirtyring_dma *dma(std::uint32_t thread) const { return dirtyring_device_dma(device_.get(), thread); }

  private:
    explicit Device(dirtyring_device *device) : device_(device) {}

    std::unique_ptr<dirtyring_device, detail::Closer<dirtyring_device_detach>> device_;
};

// A section: DMA under it is published as a whole.
class Section
{
  public:
    explicit Section(dirtyring_dma *dma) : dma_(dma) { dirtyring_dma_begin(dma_); }
    Section(const Section &) = delete;
    Section &operator=(const Section &) = delete;
    ~Section() { dirtyring_dma_end(dma_); }

  private:
    dirtyring_dma *dma_;
};

} // namespace dirtyring
