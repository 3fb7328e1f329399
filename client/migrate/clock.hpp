// Time as all processes of a migration see it.
#pragma once

#include <cstdint>
#include <ctime>

namespace dirtyring::migrate {

inline std::uint64_t now_ns()
{
    timespec t{};
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<std::uint64_t>(t.tv_sec) * 1'000'000'000u + static_cast<std::uint64_t>(t.tv_nsec);
}

constexpr std::uint64_t never = UINT64_MAX;

// After a full ring, which the source's other thread is reading.
constexpr std::uint64_t retry_pause_ns = 200'000;

// For ppoll: how long until `deadline_ns`.
inline timespec until(std::uint64_t deadline_ns)
{
    constexpr std::uint64_t longest = 1'000'000'000; // a sleeper looks round once a second whatever happens
    const std::uint64_t now = now_ns();
    const std::uint64_t left = deadline_ns <= now ? 0 : deadline_ns - now < longest ? deadline_ns - now : longest;
    return {static_cast<time_t>(left / 1'000'000'000), static_cast<long>(left % 1'000'000'000)};
}

} // namespace dirtyring::migrate
