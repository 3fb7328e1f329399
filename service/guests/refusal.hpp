// Why a request is not done.
#pragma once

#include <tl/expected.hpp>

#include <string>
#include <utility>

namespace dirtyring::service {

struct Refusal {
    int error; // a positive errno
    std::string sentence;
};

template <class T> using Result = tl::expected<T, Refusal>;

inline tl::unexpected<Refusal> refusal(int error, std::string sentence)
{
    return tl::unexpected<Refusal>({error, std::move(sentence)});
}

} // namespace dirtyring::service
