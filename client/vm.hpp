// A guest at the service, as vm.cpp, commands.cpp and rings.cpp know it.
#pragma once

#include "client/commands.hpp"
#include "client/dirtyring.h"

#include <atomic>

namespace dirtyring::client {

// Checks the header of a producer region that the service has made, and that its entries fit in the mapping. -EPROTO.
int check_ring(const Mapping &map, std::size_t offset, dr_ring_kind kind, std::uint32_t entry_size,
               dr_ring_header &header);

// Cookies from here up are those of dirtyring_set_sync, so that a set never takes the marker of dirtyring_queue_sync
// for its own.
inline constexpr std::uint64_t own_cookies = 1ull << (DR_PAYLOAD_BITS - 1);

} // namespace dirtyring::client

struct dirtyring_vm {
    dirtyring_vm(dirtyring::client::Owned<dirtyring::client::Connection> connected, const dr_guest_create &request,
                 const dr_guest &reply, dirtyring::client::Mapping front_end, dirtyring::client::Mapping service,
                 dirtyring::client::Fd kick, dirtyring::client::Fd call, std::uint64_t random)
        : connection(std::move(connected)), created(request), guest(reply),
          commands(*connection, std::move(front_end), std::move(service), std::move(kick), std::move(call), random),
          next_cookie(random)
    {
    }

    // Markers of a predecessor's syncs may lie in the rings: cookies begin anywhere.
    std::uint64_t new_cookie()
    {
        using dirtyring::client::own_cookies;
        return own_cookies | (next_cookie.fetch_add(1, std::memory_order_relaxed) & (own_cookies - 1));
    }

    dirtyring::client::Owned<dirtyring::client::Connection> connection;
    dr_guest_create created;
    dr_guest guest;
    dirtyring::client::Commands commands;
    std::atomic<std::uint64_t> next_cookie;
};
