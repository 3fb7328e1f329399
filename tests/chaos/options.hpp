// The command line of the chaos program.
#pragma once

#include "iommu/rules.hpp"

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

namespace dirtyring::chaos {

// What is disturbed.
enum class Only { everything, service, devices, vmm, stops };

// What a run may find.
enum class Finding { nothing, loss, hang };

struct Options {
    double seconds = 60;
    std::uint64_t kills = 0; // of the service; 0: until the time is up
    std::uint64_t seed = 0;
    unsigned guests = 0;         // 0: one of each kind
    std::vector<unsigned> kinds; // of guests, in turn: numbers of `layouts`
    unsigned devices = 2;        // of each guest
    Only only = Only::everything;
    Rule rule = Rule::none; // broken in the service
    Finding wanted = Finding::nothing;
    std::vector<Point> points; // where the service is killed

    // Whoever gets no further for so long, and nobody disturbs it, hangs. To go on takes milliseconds, but seconds
    // where others have the processors: the kernel's own threads take a dead worker's io_uring apart, and its successor
    // waits for them. A hang that is wanted is one sooner.
    [[nodiscard]] std::uint64_t patience_ns() const
    {
        return wanted == Finding::hang ? 10'000'000'000 : 60'000'000'000;
    }
};

std::string_view name_of(Point point);

// The options, or an exit code.
std::variant<Options, int> parse_options(int argc, char **argv);

} // namespace dirtyring::chaos
