// The guests' VMMs, devices, and the visitor: each a child of the judge that lives, is killed, and has successors.
#pragma once

#include "client/dirtyring.hpp"
#include "tests/chaos/shared.hpp"

#include <cerrno>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace dirtyring::chaos {

// The library has given up, since the service did not answer within 10 s, and the guest or the device is lost to this
// process. So it ends, and has a successor. A service that answers nobody is the judge's to find.
struct GaveUp : migrate::Failure {
    using Failure::Failure;
};

// What a call of the library returned: throws unless it is fine.
inline void check(int result, const char *tried)
{
    const std::string sentence = result < 0 ? fmt::format("{}: {}", tried, dirtyring_error()) : "";
    if (result == -ETIMEDOUT)
        throw GaveUp(sentence);
    if (result < 0)
        throw migrate::Failure(sentence);
}

template <class T> T must(Result<T> result, const char *tried)
{
    if (!result)
        check(-result.error().code, tried);
    if constexpr (!std::is_void_v<T>)
        return std::move(*result);
}

// They return when they are asked to end; what else they throw is a failure of the run. `seed` is another in each life.
void run_device(Shared &shared, Guest &guest, unsigned index, std::uint64_t seed);
void run_vmm(Shared &shared, Guest &guest, std::uint64_t seed);
// A guest that comes and goes again and again, VMM and device in one process.
void run_visitor(Shared &shared, std::uint64_t seed);

} // namespace dirtyring::chaos
