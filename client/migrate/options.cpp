#include "client/migrate/options.hpp"

#include "client/migrate/failure.hpp"
#include "client/migrate/units.hpp"
#include "iommu/formats.hpp"

#include <CLI/CLI.hpp>
#include <algorithm>

#include <bit>
#include <cctype>
#include <charconv>
#include <cmath>
#include <fstream>
#include <map>
#include <string_view>

namespace dirtyring::migrate {
namespace {

const std::map<std::string, Pattern> patterns{
    {"sequential", Pattern::sequential}, {"uniform", Pattern::uniform}, {"hotset", Pattern::hotset}};
const std::map<std::string, dr_space> spaces{{"iova", DR_SPACE_IOVA}, {"oa", DR_SPACE_OA}};
const std::map<std::string, dr_format> formats = [] {
    std::map<std::string, dr_format> by_name;
    iommu::for_each_format([&](auto f) { by_name[f.name] = static_cast<dr_format>(f.id); });
    return by_name;
}();
const std::map<std::string, std::uint32_t> leaves{{"4K", 12}, {"2M", 21}, {"1G", 30}};
const std::map<std::string, dr_split> splits{
    {"none", DR_SPLIT_NONE}, {"eager", DR_SPLIT_EAGER}, {"lazy", DR_SPLIT_LAZY}};
const std::map<std::string, bool> trackings{{"on", true}, {"none", false}};

template <class Value> CLI::Validator one_of(const std::map<std::string, Value> &values)
{
    std::string names;
    for (const auto &[name, value] : values)
        names += (names.empty() ? "" : "|") + name;
    return {[&values, names](std::string &text) {
                return values.contains(text) ? std::string{} : fmt::format("expected {}, found \"{}\"", names, text);
            },
            names};
}

template <class Value>
CLI::Option *add_choice(CLI::App &app, const std::string &flag, Value &value,
                        const std::map<std::string, Value> &values, const std::string &help)
{
    return app
        .add_option_function<std::string>(
            flag, [&value, &values](const std::string &text) { value = values.at(text); }, help)
        ->check(one_of(values));
}

CLI::Option *add_size(CLI::App &app, const std::string &flag, std::uint64_t &value, const std::string &help)
{
    return app
        .add_option_function<std::string>(
            flag,
            [&value, flag](const std::string &text) {
                const auto size = parse_size(text);
                if (!size)
                    throw CLI::ValidationError(
                        flag,
                        fmt::format("expected bytes with a suffix K, M, G or T, such as 512M, found \"{}\"", text));
                value = *size;
            },
            help)
        ->type_name("SIZE");
}

// What the kernel could give out without swapping, bytes.
std::uint64_t memory_available()
{
    std::ifstream meminfo("/proc/meminfo");
    for (std::string key, unit; meminfo >> key;) {
        std::uint64_t kib = 0;
        meminfo >> kib;
        if (key == "MemAvailable:")
            return kib << 10;
        std::getline(meminfo, unit);
    }
    return UINT64_MAX;
}

} // namespace

const char *name(Pattern pattern)
{
    switch (pattern) {
    case Pattern::sequential:
        return "sequential";
    case Pattern::uniform:
        return "uniform";
    case Pattern::hotset:
        return "hotset";
    }
    return "";
}

const char *name(dr_space space)
{
    return space == DR_SPACE_OA ? "oa" : "iova";
}

std::string name(dr_split split)
{
    return std::find_if(splits.begin(), splits.end(), [&](const auto &s) { return s.second == split; })->first;
}

const char *name(dr_format format)
{
    return iommu::with_format(format, [](auto f) { return f.name; });
}

std::optional<std::uint64_t> parse_size(const std::string &text)
{
    std::uint64_t value = 0;
    const char *end = text.data() + text.size();
    const auto [rest, error] = std::from_chars(text.data(), end, value);
    if (error != std::errc{} || end - rest > 1)
        return std::nullopt;
    if (rest == end)
        return value;
    const std::size_t suffix =
        std::string_view("KMGT").find(static_cast<char>(std::toupper(static_cast<unsigned char>(*rest))));
    if (suffix == std::string_view::npos)
        return std::nullopt;
    const unsigned shift = static_cast<unsigned>(suffix + 1) * 10;
    if (value > UINT64_MAX >> shift)
        return std::nullopt;
    return value << shift;
}

void declare(CLI::App &app, Options &options)
{
    add_size(app, "--memory", options.memory, "the guest's memory (512M)");

    auto *trace = app.add_option("--trace", options.trace, "a DMA trace for the devices to replay, plain or gzip")
                      ->type_name("FILE");
    app.add_option("--speed", options.speed, "of the replay; 0: as fast as possible (1)")
        ->needs(trace)
        ->check(CLI::Range(0.0, 1e6));
    app.add_option("--loops", options.loops, "how often to replay; 0: until the migration ends (1)")->needs(trace);

    add_choice(app, "--pattern", options.pattern, patterns, "which pages the devices write without a trace (uniform)")
        ->excludes(trace);
    app.add_option("--rate", options.rate, "pages/s that all devices together write (10000)")
        ->excludes(trace)
        ->check(CLI::Range(1, 100'000'000));
    app.add_option("--seconds", options.seconds, "how long they write; 0: until the migration ends (0)")
        ->excludes(trace)
        ->check(CLI::Range(0.0, 1e6));

    app.add_option("--devices", options.devices, "device processes (1)")->check(CLI::Range(1u, devices_max));
    app.add_flag("!--no-device-tracking", options.devices_can_track, "the devices cannot set Dirty bits");

    add_size(app, "--bandwidth", options.bandwidth, "of the link, bytes/s; 0: unlimited (0)");
    app.add_option("--downtime-limit", options.downtime_limit_ms, "ms that the guest may stand still (300)");
    app.add_option("--max-rounds", options.max_rounds, "after which the guest is stopped in any case (30)")
        ->check(CLI::Range(1u, rounds_max));

    add_choice(app, "--tracking", options.tracking, trackings, "none: everything counts as dirty (on)");
    add_choice(app, "--format", options.format, formats, "of the page tables (amdv1)");
    app.add_option("--levels", options.levels, "of page tables; 0: as few as the IOVA space needs (0)")
        ->check(CLI::Range(0u, 6u));
    app.add_option("--bbml", options.bbml, "of SMMUv3 formats, 0 to 2: how leaves may change their size (0)")
        ->check(CLI::Range(0u, 2u));
    app.add_flag("--always-on", options.always_on, "devices set Dirty bits before the migration begins, too");
    add_choice(app, "--space", options.space, spaces, "what the rings name (oa)");
    add_choice(app, "--leaf", options.leaf_lg2, leaves, "the largest leaf used; one is dirty as a whole (4K)");
    app.add_flag("--all-sizes", options.all_sizes, "leaves of every power of two that the format has, not only those");
    add_choice(app, "--split", options.split, splits,
               "larger leaves while tracking: eager, all of them; lazy, those that were dirty; none (none)");
    app.add_option("--shards", options.shards, "slices of the IOVA space, each with a ring (1)");
    app.add_option("--ring-entries", options.ring_entries, "of each ring (4096)");
    app.add_option("--min-interval", options.min_interval_us, "µs between two sweeps of a slice (1000)");

    auto *socket_path =
        app.add_option("--socket-path", options.socket_path, "of a running dirtyringd, instead of one of our own")
            ->type_name("PATH");
    app.add_option("--kill-service", options.kill_service_ms,
                   "every so many ms, kill the worker of our own dirtyringd, which is supervised then")
        ->type_name("MS")
        ->excludes(socket_path)
        ->check(CLI::Range(1u, 3'600'000u));
    app.add_option("--ram-dir", options.ram_dir, "where to leave source.ram and destination.ram")->type_name("DIR");
    app.add_option("--json", options.json, "where to write the results")->type_name("FILE");
}

void check(const Options &options)
{
    if (options.memory == 0 || options.memory % page_size != 0)
        throw BadInput(fmt::format("--memory: expected a multiple of 4K above 0, found {} bytes", options.memory));
    constexpr std::uint64_t address_space = std::uint64_t{1} << 44;
    const std::uint64_t available = memory_available();
    if (options.memory > address_space || options.memory * 2 > available)
        throw BadInput(
            fmt::format("--memory: {} for the source and as much for the destination is more than the {} that "
                        "are available here",
                        bytes(options.memory), bytes(available)));
    if (options.kill_service_ms != 0 && !options.tracking)
        throw BadInput("--kill-service: with --tracking none nothing tells when the service is back");
    if (options.always_on && !options.tracking)
        throw BadInput("--always-on: with --tracking none no device sets Dirty bits");
    const bool smmuv3 = options.format == DR_FORMAT_SMMUV3_S2 || options.format == DR_FORMAT_SMMUV3_S1;
    if (options.bbml != 0 && !smmuv3)
        throw BadInput(
            fmt::format("--bbml: expected 0 with --format {}, found {}", name(options.format), options.bbml));
    if (std::isnan(options.speed) || std::isnan(options.seconds))
        throw BadInput("--speed, --seconds: expected a number");
    if (!std::has_single_bit(options.shards) || options.shards > 64)
        throw BadInput(fmt::format("--shards: expected a power of two from 1 to 64, found {}", options.shards));
    if (!std::has_single_bit(options.ring_entries) || options.ring_entries < DR_CAPACITY_MIN ||
        options.ring_entries > DR_CAPACITY_MAX)
        throw BadInput(fmt::format("--ring-entries: expected a power of two from {} to {}, found {}", DR_CAPACITY_MIN,
                                   DR_CAPACITY_MAX, options.ring_entries));
}

} // namespace dirtyring::migrate
