// A directory below /tmp that is removed with everything in it, even when this process is killed.
#pragma once

#include "ring/region.hpp"

#include <string>
#include <sys/types.h>

namespace dirtyring::migrate {

class TemporaryDirectory
{
  public:
    // Forks a janitor that sits behind a pipe and removes the directory when the last process that holds the other end
    // is gone.
    TemporaryDirectory();
    TemporaryDirectory(const TemporaryDirectory &) = delete;
    TemporaryDirectory &operator=(const TemporaryDirectory &) = delete;
    ~TemporaryDirectory();

    [[nodiscard]] const std::string &path() const { return path_; }

  private:
    std::string path_;
    ring::Fd lifeline_;
    pid_t janitor_ = 0;
};

} // namespace dirtyring::migrate
