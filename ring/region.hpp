// Shared memory as dirtyring hands it out: sealed memfds, read-write or read-only. No allocation, no exceptions:
// libdirtyring uses it too. Functions return 0 or a negative errno.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

namespace dirtyring::ring {

// Owns a descriptor.
class Fd
{
  public:
    Fd() = default;
    explicit Fd(int fd) : fd_(fd) {}
    Fd(Fd &&other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    Fd &operator=(Fd &&other) noexcept
    {
        std::swap(fd_, other.fd_);
        return *this;
    }
    ~Fd()
    {
        if (fd_ >= 0)
            ::close(fd_);
    }
    [[nodiscard]] int get() const { return fd_; }
    [[nodiscard]] int release() { return std::exchange(fd_, -1); }
    explicit operator bool() const { return fd_ >= 0; }

  private:
    int fd_ = -1;
};

inline constexpr std::size_t large_page = 2u << 20; // of the processor

// Owns a mapping.
class Mapping
{
  public:
    Mapping() = default;
    Mapping(Mapping &&other) noexcept : base_(std::exchange(other.base_, nullptr)), size_(std::exchange(other.size_, 0))
    {
    }
    Mapping &operator=(Mapping &&other) noexcept
    {
        std::swap(base_, other.base_);
        std::swap(size_, other.size_);
        return *this;
    }
    ~Mapping()
    {
        if (base_ != nullptr)
            ::munmap(base_, size_);
    }

    // Where a large page has room, the mapping begins at a multiple of one if it can: so the kernel may map such pages.
    int map(int fd, std::size_t size, int protection, off_t offset = 0)
    {
        void *base = ::mmap(size < large_page ? nullptr : aligned_room(size), size, protection,
                            MAP_SHARED | MAP_NORESERVE, fd, offset);
        if (base == MAP_FAILED)
            return -errno;
        *this = Mapping(base, size);
        return 0;
    }

    [[nodiscard]] std::byte *data() const { return static_cast<std::byte *>(base_); }
    [[nodiscard]] std::size_t size() const { return size_; }
    template <class T> [[nodiscard]] T *as(std::size_t offset = 0) const
    {
        return reinterpret_cast<T *>(data() + offset);
    }

  private:
    Mapping(void *base, std::size_t size) : base_(base), size_(size) {}

    // A hint: another thread may be faster, and the descriptor's own pages may be larger.
    static void *aligned_room(std::size_t size)
    {
        void *room = ::mmap(nullptr, size + large_page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (room == MAP_FAILED)
            return nullptr;
        ::munmap(room, size + large_page);
        return static_cast<std::byte *>(room) + (-reinterpret_cast<std::uintptr_t>(room) & (large_page - 1));
    }

    void *base_ = nullptr;
    std::size_t size_ = 0;
};

// Pages of a new region: there from the start, or made by make_present before use.
enum class Pages { present, sparse };

// A memfd of our own making and our mapping of it.
struct Region {
    Fd fd;
    Mapping map;

    // Makes a zeroed region of `size` bytes. Its size is sealed and so are its seals. Its mode is 0600: a descriptor
    // that is handed out read-only cannot be reopened for writing by another user (one and the same user always can).
    int make(const char *name, std::size_t size, Pages pages)
    {
        Fd file(::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
        if (!file)
            return -errno;
        if (::fchmod(file.get(), 0600) != 0 || ::ftruncate(file.get(), static_cast<off_t>(size)) != 0)
            return -errno;
        if (pages == Pages::present && ::fallocate(file.get(), 0, 0, static_cast<off_t>(size)) != 0)
            return -errno;
        if (::fcntl(file.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
            return -errno;
        if (const int error = map.map(file.get(), size, PROT_READ | PROT_WRITE); error != 0)
            return error;
        fd = std::move(file);
        return 0;
    }

    // Makes the pages of [offset, offset + length) exist, so that touching them cannot fail later.
    int make_present(std::size_t offset, std::size_t length) const
    {
        return ::fallocate(fd.get(), 0, static_cast<off_t>(offset), static_cast<off_t>(length)) == 0 ? 0 : -errno;
    }

    // The other way round: nobody uses them; zeroes when they are touched again.
    void give_back(std::size_t offset, std::size_t length) const
    {
        ::fallocate(fd.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                    static_cast<off_t>(length));
    }

    // Puts what is in large_page bytes at `offset` into one page, for everybody who maps it aligned. Waits for all
    // processors: milliseconds, where they are busy. 0 or -errno; then it is as it was.
    int make_large(std::size_t offset) const
    {
        constexpr int collapse = 25; // MADV_COLLAPSE, newer than Debian 12's headers: Linux 6.1
        return ::madvise(map.data() + offset, large_page, collapse) == 0 ? 0 : -errno;
    }

    // A descriptor of the same memory that cannot be mapped for writing.
    int read_only(Fd &out) const
    {
        char path[32];
        std::snprintf(path, sizeof path, "/proc/self/fd/%d", fd.get());
        out = Fd(::open(path, O_RDONLY | O_CLOEXEC));
        return out ? 0 : -errno;
    }
};

} // namespace dirtyring::ring
