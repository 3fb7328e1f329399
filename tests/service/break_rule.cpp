// Linked into dirtyringd_breakable: the service with a rule broken, or that dies between two instructions. From the
// environment:
//
//   DIRTYRING_BREAK      the number of the rule, of enum Rule (iommu/rules.hpp)
//   DIRTYRING_DIE_AT     a point of DIRTYRING_POINTS, or "point:n": it kills itself when it gets there, for the n-th
//                        time
//   DIRTYRING_DIE_ONCE   a path: whoever dies makes that file, and nobody dies when it is there
//   DIRTYRING_DIE_PLAN   instead, a file with a DiePlan, which says so anew whenever it likes
#include "iommu/rules.hpp"
#include "tests/service/die_plan.hpp"

#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <iterator>
#include <string_view>
#include <sys/mman.h>
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

void die_as_planned(const char *path)
{
    using dirtyring::test::DiePlan;
    const int file = ::open(path, O_RDWR | O_CLOEXEC);
    void *memory = ::mmap(nullptr, sizeof(DiePlan), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    ::close(file);
    if (memory == MAP_FAILED) {
        std::perror(path);
        std::_Exit(2);
    }
    dirtyring::at_point = [plan = static_cast<DiePlan *>(memory)](Point p) {
        if (plan->at.load() != static_cast<std::uint64_t>(p) + 1 || plan->left.fetch_sub(1) != 1)
            return;
        plan->died.fetch_add(1);
        ::kill(::getpid(), SIGKILL);
    };
}

const bool armed = [] {
    if (const char *number = std::getenv("DIRTYRING_BREAK"))
        dirtyring::broken_rule.store(static_cast<dirtyring::Rule>(std::atoi(number)), std::memory_order_relaxed);
    if (const char *where = std::getenv("DIRTYRING_DIE_AT"))
        die_at(where);
    if (const char *plan = std::getenv("DIRTYRING_DIE_PLAN"))
        die_as_planned(plan);
    return true;
}();

} // namespace
