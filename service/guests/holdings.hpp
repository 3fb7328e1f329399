// The descriptors of one object, on their way into the store when the object is made, or out of it after a restart.
// Either all of them stay there or none.
//
// Their names, for guest g and in it hwpt or device i, shard s:
//
//    Pg     private: GuestRecord                       Tg.i   tables               Bg.i.s  doorbell
//    Fg     front-end memfd                            Xg.i   translation          Cg.i.s  call
//    Sg     service memfd                              Rg.i   SliceRecords         Hg.i.s  producer region
//    Kg     kick                                       Dg.i   cells                Ug.i.s  consumer region
//    Cg     call                                       Qg.i   the device's process
//    Wg.n   the front-end's process, after n takeovers
//    Mg.n   memory, in slot n
#pragma once

#include "ring/region.hpp"
#include "service/guests/refusal.hpp"
#include "service/keeper/fd_store.hpp"

#include <fmt/format.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace dirtyring::service {

using Names = std::vector<std::string>;

inline std::string kept_name(char kind, std::uint32_t guest)
{
    return fmt::format("{}{}", kind, guest);
}
template <class... Rest> std::string kept_name(char kind, std::uint32_t guest, Rest... rest)
{
    std::string name = kept_name(kind, guest);
    ((name += fmt::format(".{}", rest)), ...);
    return name;
}

// The guest whose GuestRecord has this name; nothing: another descriptor has it.
std::optional<std::uint32_t> guest_of(std::string_view name);

void forget(FdStore &store, const Names &names);

class Holdings
{
  public:
    enum class Way { in, out };

    Holdings(FdStore &store, Way way) : store_(store), way_(way) {}
    Holdings(const Holdings &) = delete;
    Holdings &operator=(const Holdings &) = delete;
    // Not held: nothing of it stays in the store.
    ~Holdings() { forget(store_, names_); }

    // The object was there before: what its descriptors lead to is not to be initialised.
    [[nodiscard]] bool restored() const { return way_ == Way::out; }

    // Made, or taken and found to have this size.
    Result<ring::Region> region(const std::string &name, const char *label, std::uint64_t size, ring::Pages pages);
    Result<ring::Fd> eventfd(const std::string &name);

    Result<void> put(const std::string &name, int fd);
    Result<ring::Fd> take(const std::string &name);

    // The object is whole: they stay.
    Names hold() { return std::move(names_); }

  private:
    FdStore &store_;
    Way way_;
    Names names_;
};

} // namespace dirtyring::service
