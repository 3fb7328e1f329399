// The socket that dirtyringd listens on.
#pragma once

#include "ring/region.hpp"
#include "service/keeper/fd_store.hpp"

#include <tl/expected.hpp>

#include <optional>
#include <string>
#include <sys/types.h>

namespace dirtyring::service {

bool is_listening(int fd);

// Binds and listens; takes the path away again at the end, if it is still the one it made. Unless it is kept: then it
// outlives a death, and clients who connect meanwhile wait for the next one who listens.
class Listener
{
  public:
    static constexpr const char *kept_name = "listener";

    // The error is a sentence. A socket left over by a dead service is replaced, a living one is not.
    static tl::expected<Listener, std::string> open(const std::string &path);
    // An inherited descriptor: a stream socket, listening or connected.
    static tl::expected<Listener, std::string> inherit(int fd);
    // What the starter hands over: the socket of the predecessor, on `path` perhaps, or one of its own under any name.
    static std::optional<Listener> handed_over(FdStore &store, const std::string &path);

    Listener(Listener &&other) noexcept = default;
    Listener &operator=(Listener &&) = delete;
    ~Listener()
    {
        if (!kept_)
            remove_file();
    }

    // Has it kept, if it was opened here.
    void keep(FdStore &store);
    // Nobody is to listen here any more.
    void remove(FdStore &store);

    [[nodiscard]] ring::Fd take() { return std::move(fd_); }

  private:
    // The path is that of a socket file now, or empty: somebody else's.
    Listener(ring::Fd fd, std::string path);

    void remove_file();

    ring::Fd fd_;
    std::string path_;
    dev_t device_ = 0;
    ino_t inode_ = 0;
    bool kept_ = false;
};

} // namespace dirtyring::service
