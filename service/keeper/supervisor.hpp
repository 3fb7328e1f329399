// dirtyringd --supervise: keeps a worker alive, and the descriptors that must outlive it.
#pragma once

#include "ring/region.hpp"

#include <string>
#include <vector>

namespace dirtyring::service {

// The exit code of a program that was called wrongly: it is not started again.
constexpr int usage_error = 2;

// Starts the program, and again whenever it dies, until it ends as asked or cannot be helped: the exit code.
// `listener`, if there is one, is the first descriptor that it is handed. Takes SIGCHLD and the signals that end a
// service for itself: the caller has one thread.
int supervise(const std::string &program, std::vector<std::string> arguments, ring::Fd listener = {});

} // namespace dirtyring::service
