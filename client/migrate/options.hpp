// What a migration is asked to do.
#pragma once

#include "ring/control.h"
#include "ring/layout.h"

#include <cstdint>
#include <optional>
#include <string>

namespace CLI {
class App;
}

namespace dirtyring::migrate {

constexpr std::uint64_t page_size = 4096;
constexpr unsigned devices_max = 64;
constexpr unsigned rounds_max = 1000;

enum class Pattern { sequential, uniform, hotset };

struct Options {
    std::uint64_t memory = 512u << 20; // bytes

    std::string trace;       // empty: synthetic
    double speed = 1;        // 0: as fast as possible
    std::uint64_t loops = 1; // 0: until the migration ends

    Pattern pattern = Pattern::uniform;
    std::uint64_t rate = 10'000; // pages/s, all devices together
    double seconds = 0;          // 0: until the migration ends

    unsigned devices = 1;
    bool devices_can_track = true;

    std::uint64_t bandwidth = 0; // bytes/s, 0: unlimited
    std::uint64_t downtime_limit_ms = 300;
    unsigned max_rounds = 30;

    bool tracking = true;
    dr_format format = DR_FORMAT_AMDV1;
    std::uint32_t levels = 0; // of page tables; 0: as few as will do
    std::uint32_t bbml = 0;   // of SMMUv3 formats
    bool always_on = false;   // devices set Dirty bits before the migration begins, too
    dr_space space = DR_SPACE_OA;
    std::uint32_t leaf_lg2 = 12;
    bool all_sizes = false; // of leaves: every power of two that the format has
    dr_split split = DR_SPLIT_NONE;
    std::uint32_t shards = 1; // a power of two
    std::uint32_t ring_entries = 4096;
    std::uint32_t min_interval_us = 1000;

    std::string socket_path;           // empty: a service of our own
    std::uint64_t kill_service_ms = 0; // how often its worker is killed; 0: never
    std::string ram_dir;               // empty: none
    std::string json;                  // empty: none

    [[nodiscard]] bool synthetic() const { return trace.empty(); }
    [[nodiscard]] std::uint64_t pages() const { return memory / page_size; }
};

const char *name(Pattern pattern);
const char *name(dr_space space);
const char *name(dr_format format);
std::string name(dr_split split);

// Declares the options of `dirtyring migrate`, to be parsed into `options`.
void declare(CLI::App &app, Options &options);

// Throws BadInput where values that are fine by themselves make no sense together or on this machine.
void check(const Options &options);

// Bytes, with a suffix K, M, G or T (powers of 1024).
std::optional<std::uint64_t> parse_size(const std::string &text);

} // namespace dirtyring::migrate
