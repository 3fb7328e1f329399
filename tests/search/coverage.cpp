#include "tests/search/coverage.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <fstream>
#include <sstream>
#include <string_view>
#include <sys/mman.h>
#include <utility>

namespace dirtyring::search {

namespace {

const char *const state_names[] = {
#define X(name) #name,
    DIRTYRING_STATES(X)
#undef X
};

const char *const row_names[] = {
#define X(name) #name,
    DIRTYRING_EVENTS(X)
#undef X
#define X(name) "dies_at_" #name,
        DIRTYRING_POINTS(X)
#undef X
};

constexpr std::size_t rows = Coverage::events + Coverage::points;
constexpr std::size_t columns = Coverage::states + 1;
constexpr std::size_t bytes = rows * columns * sizeof(std::atomic<std::uint32_t>);

std::string short_number(std::uint32_t n)
{
    return n == 0 ? "." : n < 1000 ? std::to_string(n) : n < 1'000'000 ? fmt::format("{}k", n / 1000) : "M";
}

// Event and state; "*" at the end of either stands for any end.
using Pattern = std::pair<std::string, std::string>;

std::vector<Pattern> explained(const std::string &path)
{
    std::vector<Pattern> patterns;
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);) {
        std::istringstream words(line);
        std::string event;
        std::string state;
        std::string reason;
        if (words >> event >> state && event[0] != '#' && std::getline(words, reason))
            patterns.emplace_back(event, state);
    }
    return patterns;
}

bool matches(const std::string &pattern, std::string_view name)
{
    return pattern.ends_with('*') ? name.starts_with(pattern.substr(0, pattern.size() - 1)) : name == pattern;
}

} // namespace

Coverage::Coverage()
    : counts_(static_cast<std::atomic<std::uint32_t> *>(
          ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)))
{
}

Coverage::~Coverage()
{
    ::munmap(counts_, bytes);
}

void Coverage::count(std::size_t row, std::uint64_t states)
{
    std::atomic<std::uint32_t> *counts = counts_ + row * columns;
    counts[Coverage::states].fetch_add(1, std::memory_order_relaxed);
    for (; states != 0; states &= states - 1)
        counts[std::countr_zero(states)].fetch_add(1, std::memory_order_relaxed);
}

bool Coverage::print(const std::string &unreachable) const
{
    const std::vector<Pattern> patterns = explained(unreachable);
    for (std::size_t s = 0; s < states; ++s)
        fmt::print("{:>32} {}\n", fmt::format("{}", s + 1), state_names[s]);
    fmt::print("{:>32} {:>5}", "", "all");
    for (std::size_t s = 0; s < states; ++s)
        fmt::print("{:>5}", s + 1);
    fmt::print("\n");
    std::size_t never = 0;
    std::size_t known = 0;
    std::string list;
    std::string wrong;
    for (std::size_t row = 0; row < rows; ++row) {
        const std::atomic<std::uint32_t> *counts = counts_ + row * columns;
        const auto reason = [&](const char *state) {
            return std::any_of(patterns.begin(), patterns.end(), [&](const Pattern &p) {
                return matches(p.first, row_names[row]) && matches(p.second, state);
            });
        };
        fmt::print("{:>32} {:>5}", row_names[row], short_number(counts[states].load()));
        std::string missing;
        std::string met;
        for (std::size_t s = 0; s < states; ++s) {
            fmt::print("{:>5}", short_number(counts[s].load()));
            const bool has_reason = reason(state_names[s]);
            if (counts[s].load() != 0) {
                if (has_reason)
                    met += fmt::format(" {}", state_names[s]);
                continue;
            }
            ++never;
            if (has_reason)
                ++known;
            else
                missing += fmt::format(" {}", state_names[s]);
        }
        fmt::print("\n");
        if (!missing.empty())
            list += fmt::format("  {}:{}\n", row_names[row], missing);
        if (!met.empty())
            wrong += fmt::format("  {}:{}\n", row_names[row], met);
    }
    fmt::print("never met, and not explained:\n{}", list);
    if (!wrong.empty())
        fmt::print("met, though {} says that it cannot be:\n{}", unreachable, wrong);
    fmt::print("never met: {}, of which {} are explained\n", never, known);
    return wrong.empty();
}

} // namespace dirtyring::search
