#include "tests/engine/oracle.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace dirtyring::test {

std::uint64_t chosen_seed(std::uint64_t otherwise)
{
    const char *text = std::getenv("DIRTYRING_SEED");
    const std::uint64_t seed = text != nullptr ? std::strtoull(text, nullptr, 0) : otherwise;
    std::printf("[     seed ] DIRTYRING_SEED=%llu\n", static_cast<unsigned long long>(seed));
    return seed;
}

bool full_length()
{
    const char *text = std::getenv("DIRTYRING_FULL");
    return text != nullptr && std::strcmp(text, "1") == 0;
}

} // namespace dirtyring::test
