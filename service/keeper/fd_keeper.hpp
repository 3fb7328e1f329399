// The other side of fd_store.hpp, as systemd does it: keeps the descriptors of one process for its successor.
#pragma once

#include "ring/region.hpp"

#include <string>
#include <string_view>
#include <sys/types.h>
#include <vector>

namespace dirtyring::service {

class FdKeeper
{
  public:
    struct Kept {
        std::string name;
        ring::Fd fd;
    };

    FdKeeper();

    // Readable when there are messages.
    [[nodiscard]] int socket() const { return socket_.get(); }
    // For NOTIFY_SOCKET.
    [[nodiscard]] const std::string &address() const { return address_; }

    // Does what messages ask that were sent before this call: those of process `sender`, the others are thrown away.
    // True: it said that it is ready.
    [[nodiscard]] bool receive(pid_t sender);

    void keep(std::string name, ring::Fd fd);
    // In the order of descriptors, which are 3 or more: so the n-th of them is n + 3 or more.
    [[nodiscard]] const std::vector<Kept> &kept();

  private:
    // False: none is there any more, or the mark that ends the work.
    bool receive_one(pid_t sender, bool &ready);
    void handle(std::string_view text, std::vector<ring::Fd> fds, bool &ready);

    ring::Fd socket_;
    std::string address_;
    std::vector<Kept> kept_;
};

} // namespace dirtyring::service
