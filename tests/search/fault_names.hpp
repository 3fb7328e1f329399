// The rules that can be broken (iommu/fault.hpp), by name.
#pragma once

#include "iommu/fault.hpp"

#include <optional>
#include <string>

namespace dirtyring::search {

inline std::optional<Fault> fault_of(const std::string &name)
{
#define X(rule)        \
    if (name == #rule) \
        return Fault::rule;
    DIRTYRING_RULES(X)
#undef X
    return std::nullopt;
}

} // namespace dirtyring::search
