// Descriptors that outlive this process: whoever has started it keeps them and hands them to its successor, by
// systemd's protocol.
#pragma once

#include "ring/region.hpp"

#include <cstddef>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace dirtyring::service {

// The worker's side. The keeper is systemd, or supervisor.hpp; without one nothing is kept, and nothing fails.
class FdStore
{
  public:
    static constexpr std::size_t fds_max = 8192; // FileDescriptorStoreMax=
    // The names come back in one environment string, and the kernel takes none of more than 128 KiB: that is 15 bytes
    // for each of fds_max names.
    static constexpr std::size_t names_max = 120 * 1024; // bytes, each name with its colon
    static constexpr std::size_t name_max = 32;

    // Takes what the starter has handed over. Call it once.
    static FdStore inherit();

    // Whether somebody keeps descriptors for us.
    [[nodiscard]] bool kept() const;

    // Has a copy of the descriptor kept, even when what it refers to hangs up. Names are letters, digits and dots.
    // systemd silently drops a descriptor that shares its open file description with one that it has: a second name for
    // one file needs the file opened a second time. 0, or a negative errno: -ENOSPC means that the keeper could not
    // hand one more over.
    [[nodiscard]] int put(const std::string &name, int fd);
    // All that are kept under this name.
    void remove(const std::string &name);

    // ---- what was handed over ----

    // Not taken yet.
    [[nodiscard]] std::vector<std::string> names() const;
    // Stays here. -1: there is none.
    [[nodiscard]] int get(const std::string &name) const;
    // Stays with the keeper. Invalid: there is none.
    [[nodiscard]] ring::Fd take(const std::string &name);
    // Closes what nobody has taken, and has it kept no longer. A name of which one descriptor was taken stays with the
    // keeper.
    void drop_rest();

  private:
    void remember(const std::string &name);

    std::multimap<std::string, ring::Fd> inherited_;
    std::multiset<std::string> stored_; // what the keeper has
    std::size_t names_size_ = 0;
};

} // namespace dirtyring::service
