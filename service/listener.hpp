// The socket that dirtyringd listens on.
#pragma once

#include "ring/region.hpp"

#include <tl/expected.hpp>

#include <string>
#include <sys/types.h>

namespace dirtyring::service {

// Binds and listens; takes the path away again at the end, if it is still the one it made.
class Listener
{
  public:
    // The error is a sentence. A socket left over by a dead service is replaced, a living one is not.
    static tl::expected<Listener, std::string> open(const std::string &path);
    // An inherited descriptor: a stream socket, listening or connected.
    static tl::expected<Listener, std::string> inherit(int fd);

    Listener(Listener &&other) noexcept = default;
    Listener &operator=(Listener &&) = delete;
    ~Listener() { remove(); }

    void remove();

    [[nodiscard]] ring::Fd take() { return std::move(fd_); }

  private:
    Listener(ring::Fd fd, std::string path, dev_t device, ino_t inode)
        : fd_(std::move(fd)), path_(std::move(path)), device_(device), inode_(inode)
    {
    }

    ring::Fd fd_;
    std::string path_;
    dev_t device_;
    ino_t inode_;
};

} // namespace dirtyring::service
