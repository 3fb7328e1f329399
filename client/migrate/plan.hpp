// A trace made ready to be replayed by several processes that keep its order where it matters: an access waits for the
// maps before it, an unmap for the accesses before it. The guest page of every access is worked out here, from the
// trace alone: the service has no say in what the journal notes.
#pragma once

#include "client/migrate/options.hpp"
#include "client/trace.hpp"

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace dirtyring::migrate {

// A read or a write; devices deal them out among themselves in turn.
struct Access {
    std::uint64_t time_us;
    std::uint64_t iova;
    std::uint32_t length;
    std::uint32_t first_page;  // index of its first guest page in Plan::pages; the others follow
    std::uint32_t maps_before; // of the trace
    std::uint32_t line;
    bool write;
};

// A map or an unmap; the source's to do.
struct MapChange {
    std::uint64_t time_us;
    std::uint64_t iova;
    std::uint64_t length; // unmap: UINT64_MAX: the rest of the space
    std::uint64_t oa;
    std::uint64_t accesses_before; // of the trace
    std::uint32_t line;
    bool map;
};

struct Plan {
    std::vector<Access> accesses;
    std::vector<std::uint32_t> pages;
    std::vector<MapChange> changes; // empty: the guest's memory is mapped as it is
    std::uint64_t maps = 0;         // among changes
    std::uint64_t duration_us = 0;
    std::uint64_t iova_end = 0; // no access or map reaches beyond

    // The guest pages of an access.
    [[nodiscard]] std::span<const std::uint32_t> pages_of(const Access &access) const
    {
        const std::uint64_t first = access.iova / page_size;
        const std::uint64_t last = (access.iova + access.length - 1) / page_size;
        return std::span(pages).subspan(access.first_page, last - first + 1);
    }
};

// Throws BadInput for a trace that cannot be replayed in a guest of `memory` bytes. `path` is for its sentences.
Plan make_plan(const std::string &path, const std::vector<TraceEvent> &events, std::uint64_t memory);

} // namespace dirtyring::migrate
