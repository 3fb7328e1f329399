// What a device's IOMMU can do, and whether that is enough for an hwpt.
#pragma once

#include "ring/control.h"
#include "service/guests/refusal.hpp"

#include <cstdint>
#include <string>

namespace dirtyring::service {

// As DEVICE_ATTACH has declared it, and checked.
struct Capabilities {
    std::uint32_t flags;   // DR_DEVICE_*
    std::uint32_t formats; // DR_FORMAT_BIT of each that it walks
    char name[DR_NAME_BYTES];

    static Result<Capabilities> of(const dr_device_attach &request);

    [[nodiscard]] bool walks(std::uint32_t format) const;
    // Sets Dirty bits in tables of the format.
    [[nodiscard]] bool tracks(std::uint32_t format) const;
    // Of a device that does not: what it lacks, as the predicate of a sentence.
    [[nodiscard]] std::string why_not(std::uint32_t format) const;

    bool operator==(const Capabilities &) const = default;
};

// "amdv1 (1), vtdss (2)": those of the mask that are known here.
std::string format_names(std::uint32_t mask);

} // namespace dirtyring::service
