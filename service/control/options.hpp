// The command line of dirtyringd.
#pragma once

#include <string>
#include <variant>

namespace dirtyring::service {

struct Options {
    std::string socket_path; // empty: use fd, or a socket that was handed over
    int fd = -1;
    bool supervise = false;
    unsigned walkers = 1;
    std::string log_level = "info";
};

// What main is to do: run, or end with this exit code (help, capabilities or a usage error were printed).
std::variant<Options, int> parse_options(int argc, char **argv);

} // namespace dirtyring::service
