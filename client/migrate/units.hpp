// Numbers as people read them.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <iterator>
#include <string>

namespace dirtyring::migrate {

// 512 MiB, 1.25 GiB
inline std::string bytes(double value)
{
    constexpr const char *units[] = {"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    std::size_t unit = 0;
    for (; value >= 1024 && unit + 1 < std::size(units); ++unit)
        value /= 1024;
    return fmt::format("{:.4g} {}", value, units[unit]);
}

inline std::string bytes(std::uint64_t value)
{
    return bytes(static_cast<double>(value));
}

// 1,048,576
inline std::string count(std::uint64_t value)
{
    std::string digits = fmt::format("{}", value);
    for (std::size_t at = digits.size(); at > 3; at -= 3)
        digits.insert(at - 3, 1, ',');
    return digits;
}

// 12.4 ms, 3.05 s
inline std::string duration(double ms)
{
    return ms < 1000 ? fmt::format("{:.1f} ms", ms) : fmt::format("{:.2f} s", ms / 1000);
}

} // namespace dirtyring::migrate
