// The owner's private record of what is mapped where; peers never see it.
#pragma once

#include "iommu/format.hpp"

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>

namespace dirtyring::iommu {

struct Extent {
    std::uint64_t start; // IOVA, bytes
    std::uint64_t end;   // half-open
    std::uint64_t oa;    // of start
    Rights rights;
    std::uint32_t tag = 0; // the owner's; parts of a cut extent keep it
    unsigned leaf_lg2 = 0; // its leaves are 2^leaf_lg2 bytes at most; so are those of its parts
};

class ExtentMap
{
  public:
    // The first extent that reaches into [start, end).
    [[nodiscard]] std::optional<Extent> first_in(std::uint64_t start, std::uint64_t end) const
    {
        const auto it = reaching(start);
        if (it == extents_.end() || it->first >= end)
            return std::nullopt;
        return extent(it);
    }

    // True: [start, end) is mapped throughout to oa with these rights.
    [[nodiscard]] bool maps_to(std::uint64_t start, std::uint64_t end, std::uint64_t oa, Rights rights) const
    {
        const std::uint64_t offset = oa - start;
        while (start < end) {
            const auto e = first_in(start, end);
            if (!e || e->start > start || e->oa - e->start != offset || e->rights != rights)
                return false;
            start = e->end;
        }
        return true;
    }

    // True: an extent begins before `at` and ends after it.
    [[nodiscard]] bool spans(std::uint64_t at) const
    {
        const auto it = reaching(at);
        return it != extents_.end() && it->first < at;
    }

    // [e.start, e.end) holds nothing.
    void insert(const Extent &e) { extents_.emplace(e.start, Rest{e.end, e.oa, e.rights, e.tag, e.leaf_lg2}); }

    // Forgets [start, end); an extent that reaches across a border is cut.
    void erase(std::uint64_t start, std::uint64_t end)
    {
        for (auto e = first_in(start, end); e; e = first_in(start, end)) {
            extents_.erase(e->start);
            if (e->start < start)
                insert({e->start, start, e->oa, e->rights, e->tag, e->leaf_lg2});
            if (e->end > end)
                insert({end, e->end, e->oa + (end - e->start), e->rights, e->tag, e->leaf_lg2});
        }
    }

    [[nodiscard]] bool empty() const { return extents_.empty(); }

    template <class Visit> void for_each(Visit visit) const
    {
        for (auto it = extents_.begin(); it != extents_.end(); ++it)
            visit(extent(it));
    }

  private:
    struct Rest {
        std::uint64_t end;
        std::uint64_t oa;
        Rights rights;
        std::uint32_t tag;
        unsigned leaf_lg2;
    };
    using Map = std::map<std::uint64_t, Rest>;

    static Extent extent(Map::const_iterator it)
    {
        return {it->first, it->second.end, it->second.oa, it->second.rights, it->second.tag, it->second.leaf_lg2};
    }

    // The first extent that ends after `at`.
    [[nodiscard]] Map::const_iterator reaching(std::uint64_t at) const
    {
        auto it = extents_.upper_bound(at);
        if (it != extents_.begin() && std::prev(it)->second.end > at)
            --it;
        return it;
    }

    Map extents_;
};

} // namespace dirtyring::iommu
