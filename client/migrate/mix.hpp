// A bijection of 64-bit words that looks random (the finalizer of splitmix64): different inputs, different outputs.
#pragma once

#include <cstdint>

namespace dirtyring::migrate {

constexpr std::uint64_t mix(std::uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

} // namespace dirtyring::migrate
