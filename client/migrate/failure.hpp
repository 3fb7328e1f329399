// How a part of a migration ends early: by an exception that carries the one sentence its user will read.
#pragma once

#include <fmt/format.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

namespace dirtyring::migrate {

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// What the user asked for, or gave us to read, makes no sense: exit code 2.
struct BadInput : Failure {
    using Failure::Failure;
};

inline Failure system_failure(const std::string &what)
{
    return Failure(fmt::format("{}: {}", what, std::strerror(errno)));
}

// The value of a dirtyring::Result, or a Failure that says what was tried, where the library's sentence does not.
template <class Result> auto must(Result result, const char *tried = nullptr)
{
    if (!result)
        throw Failure(tried == nullptr ? result.error().sentence
                                       : fmt::format("{}: {}", tried, result.error().sentence));
    if constexpr (!std::is_void_v<typename Result::value_type>)
        return std::move(*result);
}

} // namespace dirtyring::migrate
