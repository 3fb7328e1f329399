// What can be said of a command without knowing what is mapped.
#pragma once

#include "iommu/format.hpp"
#include "ring/layout.h"

#include <algorithm>
#include <cstdint>

namespace dirtyring::service {

inline constexpr std::uint64_t payload_mask = (1ull << DR_PAYLOAD_BITS) - 1;

inline bool is_range(std::uint32_t opcode)
{
    return opcode == DR_OP_MAP || opcode == DR_OP_UNMAP;
}

inline bool is_resize(std::uint32_t opcode)
{
    return opcode == DR_OP_SPLIT || opcode == DR_OP_COLLAPSE;
}

// Of a map.
inline iommu::Rights rights_of(const dr_command &request)
{
    return {(request.flags & DR_MAP_READ) != 0, (request.flags & DR_MAP_WRITE) != 0};
}

// Of a range, if nothing bounds it but its own words.
inline std::uint64_t end_of(const dr_command &request)
{
    return request.iova + std::min(request.length, UINT64_MAX - request.iova);
}

// The same, below 2^aperture_lg2; 0: it is outside.
inline std::uint64_t end_within(const dr_command &request, unsigned aperture_lg2)
{
    const std::uint64_t aperture = 1ull << aperture_lg2;
    const bool rest = request.opcode == DR_OP_UNMAP && request.length == UINT64_MAX;
    if (request.iova >= aperture || (!rest && request.length > aperture - request.iova))
        return 0;
    return rest ? aperture : request.iova + request.length;
}

// False: -EINVAL.
bool well_formed(const dr_command &request);

} // namespace dirtyring::service
