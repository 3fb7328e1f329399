// dirtyring check: holds a program to the sentences of ring/SPEC.md.
#pragma once

#include <chrono>
#include <string>

namespace CLI {
class App;
}

namespace dirtyring::check {

struct Options {
    std::string role;        // of the program; empty: all programs of ours
    std::string socket_path; // of a running service; empty: the kit starts one
    std::string program;     // how; empty: dirtyringd
    std::string json;        // empty: none
    unsigned seconds = 10;   // for one check
};

// Declares the options of `dirtyring check`, to be parsed into `options`.
void declare(CLI::App &app, Options &options);

// Checks and reports. False: a MUST failed. Throws migrate::Failure where it cannot check at all.
bool check(const Options &options);

} // namespace dirtyring::check
