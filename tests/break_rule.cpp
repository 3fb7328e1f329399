// Linked into dirtyringd_faulty: the service with the rule broken whose number of enum Fault (iommu/fault.hpp) stands in DIRTYRING_FAULT.
#include "iommu/fault.hpp"

#include <cstdlib>

namespace {

const bool broken = [] {
    const char *number = std::getenv("DIRTYRING_FAULT");
    if (number != nullptr)
        dirtyring::active_fault.store(static_cast<dirtyring::Fault>(std::atoi(number)), std::memory_order_relaxed);
    return number != nullptr;
}();

} // namespace
