// The formats that there are, and how one is chosen at run time: the only place that lists them.
#pragma once

#include "iommu/format_amdv1.hpp"
#include "iommu/format_smmuv3.hpp"
#include "iommu/format_vtdss.hpp"

#include <cassert>
#include <cstdint>

namespace dirtyring::iommu {

// Calls visit(F{}) of each format, in the order of their numbers.
template <class Visit> constexpr void for_each_format(Visit visit)
{
    visit(AmdV1{});
    visit(VtdSs{});
    visit(SmmuV3S2{});
    visit(SmmuV3S1{});
}

// format: enum dr_format.
constexpr bool knows_format(unsigned format)
{
    bool known = false;
    for_each_format([&](auto f) { known |= decltype(f)::id == format; });
    return known;
}

// visit(F{}) of the format, which is known.
template <class Visit> constexpr auto with_format(unsigned format, Visit visit)
{
    assert(knows_format(format));
    switch (format) {
    case VtdSs::id:
        return visit(VtdSs{});
    case SmmuV3S2::id:
        return visit(SmmuV3S2{});
    case SmmuV3S1::id:
        return visit(SmmuV3S1{});
    default:
        return visit(AmdV1{});
    }
}

} // namespace dirtyring::iommu
