// Programs that speak the protocol, each wrong in the one way that its last argument names; `right` is wrong in none.
#pragma once

#include "client/check/guest.hpp"

#include <ctime>
#include <string>
#include <string_view>

namespace dirtyring::test {

// A context in which nothing is reported.
struct Silence {
    check::Verdicts verdicts{check::Role::service};
    check::Context context;

    explicit Silence(std::string socket)
        : context{verdicts, std::move(socket), "", check::Deadline(std::chrono::minutes(10))}
    {
    }
};

// Passes only while this process runs, so that no window closes while it is held still.
inline void spin(std::chrono::microseconds time)
{
    const auto now = [] {
        timespec t{};
        ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
        return std::chrono::seconds(t.tv_sec) + std::chrono::nanoseconds(t.tv_nsec);
    };
    for (const auto until = now() + time; now() < until;) {
    }
}

int consume(const std::string &socket, std::string_view fault);
int be_a_device(const std::string &socket, const std::string &token, std::uint32_t hwpt, std::string_view fault);

} // namespace dirtyring::test
