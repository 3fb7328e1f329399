// Linked into dirtyringd_faulty: the service with a rule broken, or that dies between two instructions. From the environment:
//
//   DIRTYRING_FAULT      the number of the rule, of enum Fault (iommu/fault.hpp)
//   DIRTYRING_DIE_AT     a point of DIRTYRING_POINTS, or "point:n": it kills itself when it gets there, for the n-th time
//   DIRTYRING_DIE_ONCE   a path: whoever dies makes that file, and nobody dies when it is there
#include "iommu/fault.hpp"

#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <iterator>
#include <string_view>
#include <unistd.h>

namespace {

using dirtyring::Point;

constexpr std::string_view names[] = {
#define X(name) #name,
    DIRTYRING_POINTS(X)
#undef X
};

void die_at(std::string_view where)
{
    static std::atomic<long> left;
    const std::size_t colon = where.find(':');
    left = colon == std::string_view::npos ? 1 : std::atol(where.data() + colon + 1);
    const std::string_view name = where.substr(0, colon);
    std::size_t i = 0;
    while (i < std::size(names) && names[i] != name)
        ++i;
    if (i == std::size(names)) {
        std::fprintf(stderr, "DIRTYRING_DIE_AT: there is no point %s\n", where.data());
        std::_Exit(2);
    }
    const char *once = std::getenv("DIRTYRING_DIE_ONCE");
    dirtyring::at_point = [point = static_cast<Point>(i), once](Point p) {
        if (p == point && --left == 0 && (once == nullptr || ::open(once, O_CREAT | O_EXCL | O_CLOEXEC, 0600) >= 0))
            ::kill(::getpid(), SIGKILL);
    };
}

const bool armed = [] {
    if (const char *number = std::getenv("DIRTYRING_FAULT"))
        dirtyring::active_fault.store(static_cast<dirtyring::Fault>(std::atoi(number)), std::memory_order_relaxed);
    if (const char *where = std::getenv("DIRTYRING_DIE_AT"))
        die_at(where);
    return true;
}();

} // namespace
