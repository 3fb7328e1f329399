// The rules that can be broken (iommu/rules.hpp), by name.
#pragma once

#include "iommu/rules.hpp"

#include <optional>
#include <string>

namespace dirtyring::search {

inline std::optional<Rule> rule_of(const std::string &name)
{
#define X(rule)        \
    if (name == #rule) \
        return Rule::rule;
    DIRTYRING_RULES(X)
#undef X
    return std::nullopt;
}

} // namespace dirtyring::search
