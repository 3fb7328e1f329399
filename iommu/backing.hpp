// Where the memory of a sparse region comes from.
#pragma once

#include <cstdint>
#include <functional>

namespace dirtyring::iommu {

// Bytes [offset, offset + length) of the region.
struct Backing {
    std::function<int(std::uint64_t offset, std::uint64_t length)> make_present; // 0 or -errno
    std::function<void(std::uint64_t offset, std::uint64_t length)> give_back;   // nobody uses it; zero when it is back
    // All large_page bytes are in use: they may become one page, at leisure, and made_large() is told. Does not wait.
    std::function<void(std::uint64_t offset)> make_large;
};

} // namespace dirtyring::iommu
