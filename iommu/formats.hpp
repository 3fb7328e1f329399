// The formats that there are, and how one is chosen at run time: the only place that lists them.
#pragma once

#include "iommu/format_amdv1.hpp"
#include "iommu/format_smmuv3.hpp"
#include "iommu/format_vtdss.hpp"

#include <cassert>
#include <cstdint>

namespace dirtyring::iommu {

// `Of`: a template made of all of them.
template <Format... F> struct FormatList {
    template <template <class...> class T> using Of = T<F...>;
};

using Formats = FormatList<AmdV1, VtdSs, SmmuV3S2, SmmuV3S1>;

// Calls visit(F{}) of each format, in the order of the list.
template <class Visit> constexpr void for_each_format(Visit visit)
{
    [&]<Format... F>(FormatList<F...>)
    {
        (visit(F{}), ...);
    }
    (Formats{});
}

// format: enum dr_format.
constexpr bool knows_format(unsigned format)
{
    bool known = false;
    for_each_format([&](auto f) { known |= decltype(f)::id == format; });
    return known;
}

template <Format First, Format... Rest, class Visit>
constexpr auto with_format(FormatList<First, Rest...> /*formats*/, unsigned format, Visit &&visit)
{
    if constexpr (sizeof...(Rest) == 0)
        return visit(First{});
    else
        return format == First::id ? visit(First{}) : with_format(FormatList<Rest...>{}, format, visit);
}

// visit(F{}) of the format, which is known.
template <class Visit> constexpr auto with_format(unsigned format, Visit visit)
{
    assert(knows_format(format));
    return with_format(Formats{}, format, visit);
}

} // namespace dirtyring::iommu
