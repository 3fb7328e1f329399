// Descriptors for a peer, and the peer's process.
#pragma once

#include "ring/region.hpp"
#include "service/guests/refusal.hpp"

#include <utility>
#include <vector>

namespace dirtyring::service {

Result<ring::Fd> duplicate(int fd);
Result<ring::Fd> read_only(const ring::Region &region);

// Collects descriptors for a reply; remembers the first failure.
class Collector
{
  public:
    void add(Result<ring::Fd> fd)
    {
        if (fd)
            fds_.push_back(std::move(*fd));
        else if (ok_)
            ok_ = tl::unexpected(fd.error());
    }
    [[nodiscard]] const Result<void> &ok() const { return ok_; }
    std::vector<ring::Fd> take() { return std::move(fds_); }

  private:
    std::vector<ring::Fd> fds_;
    Result<void> ok_;
};

struct Process {
    int pid;
    ring::Fd pidfd;
};

// Who connected.
Result<Process> peer_process(int socket);

// Has the process ended?
bool has_ended(const ring::Fd &pidfd);

} // namespace dirtyring::service
