// What all parts of libdirtyring share: failures with a sentence, objects without the C++ runtime, mappings, events.
#pragma once

#include "ring/region.hpp"
#include "ring/socket.hpp"

#include <cerrno>
#include <cinttypes>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <pthread.h>
#include <sys/random.h>
#include <utility>

namespace dirtyring::client {

using ring::Fd;
using ring::FdList;
using ring::Mapping;

// Leaves a sentence for dirtyring_error() and returns -error.
[[gnu::format(printf, 2, 3)]] int fail(int error, const char *format, ...);

// new and delete would need libstdc++.
struct Destroyer {
    template <class T> void operator()(T *object) const
    {
        object->~T();
        std::free(object);
    }
};
template <class T> using Owned = std::unique_ptr<T, Destroyer>;

// Null, with a sentence: no memory.
template <class T, class... Args> Owned<T> make(Args &&...args)
{
    void *memory = std::aligned_alloc(alignof(T), sizeof(T));
    if (memory == nullptr) {
        fail(ENOMEM, "no memory for %zu bytes", sizeof(T));
        return nullptr;
    }
    return Owned<T>(new (memory) T(std::forward<Args>(args)...));
}

// For std::lock_guard; std::mutex would need libstdc++.
class Mutex
{
  public:
    Mutex() = default;
    Mutex(const Mutex &) = delete;
    Mutex &operator=(const Mutex &) = delete;
    ~Mutex() { ::pthread_mutex_destroy(&mutex_); }

    void lock() { ::pthread_mutex_lock(&mutex_); }
    bool try_lock() { return ::pthread_mutex_trylock(&mutex_) == 0; }
    void unlock() { ::pthread_mutex_unlock(&mutex_); }

  private:
    pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
};

// Fills `out` with random bytes; at most 256.
template <class T> int draw(T &out)
{
    static_assert(sizeof out <= 256, "never interrupted");
    if (::getrandom(&out, sizeof out, 0) != static_cast<ssize_t>(sizeof out))
        return fail(errno, "no random numbers: %s", std::strerror(errno));
    return 0;
}

// Maps a whole region that the service has handed out. -EPROTO: it is shorter than `minimum`, which would be a SIGBUS
// later.
inline int map_region(const Fd &fd, std::uint64_t minimum, int protection, const char *what, Mapping &out)
{
    struct stat status;
    if (::fstat(fd.get(), &status) != 0)
        return fail(errno, "cannot stat the %s: %s", what, std::strerror(errno));
    const auto size = static_cast<std::uint64_t>(status.st_size);
    if (size < minimum)
        return fail(EPROTO, "the %s has %" PRIu64 " bytes, expected at least %" PRIu64, what, size, minimum);
    if (const int error = out.map(fd.get(), size, protection); error != 0)
        return fail(-error, "cannot map the %s: %s", what, std::strerror(-error));
    return 0;
}

// An eventfd. One that is full (EAGAIN) has rung already.
inline void signal_event(const Fd &fd)
{
    const std::uint64_t one = 1;
    while (::write(fd.get(), &one, sizeof one) < 0 && errno == EINTR) {
    }
}

inline void reset_event(const Fd &fd)
{
    std::uint64_t count = 0;
    while (::read(fd.get(), &count, sizeof count) < 0 && errno == EINTR) {
    }
}

// An eventfd that we are going to reset, which must not block when nothing is there.
inline int take_call_event(Fd fd, Fd &out)
{
    if (const int flags = ::fcntl(fd.get(), F_GETFL); flags < 0 || ::fcntl(fd.get(), F_SETFL, flags | O_NONBLOCK) != 0)
        return fail(errno, "cannot make an eventfd non-blocking: %s", std::strerror(errno));
    out = std::move(fd);
    return 0;
}

} // namespace dirtyring::client
