#include "client/migrate/results.hpp"

#include "client/migrate/failure.hpp"
#include "client/migrate/units.hpp"

#include <nlohmann/json.hpp>

#include <cstring>
#include <filesystem>

namespace dirtyring::migrate {
namespace {

double ms(const std::atomic<std::uint64_t> &ns)
{
    return static_cast<double>(load(ns)) / 1e6;
}

// The directory is made if need be.
std::string in_directory(const std::string &directory, const char *name)
{
    if (directory.empty())
        return {};
    std::error_code error;
    std::filesystem::create_directories(directory, error);
    if (error)
        throw BadInput(fmt::format("--ram-dir {}: {}", directory, error.message()));
    return directory + "/" + name;
}

nlohmann::ordered_json options_json(const Options &o)
{
    nlohmann::ordered_json json{{"memory", o.memory}};
    if (o.synthetic())
        json.update({{"trace", nullptr}, {"pattern", name(o.pattern)}, {"rate", o.rate}, {"seconds", o.seconds}});
    else
        json.update({{"trace", o.trace}, {"speed", o.speed}, {"loops", o.loops}});
    json.update({{"devices", o.devices},
                 {"tracking", o.tracking ? "on" : "none"},
                 {"format", name(o.format)},
                 {"levels", o.levels},
                 {"bbml", o.bbml},
                 {"always_on", o.always_on},
                 {"space", name(o.space)},
                 {"leaf", std::uint64_t{1} << o.leaf_lg2},
                 {"all_sizes", o.all_sizes},
                 {"split", name(o.split)},
                 {"shards", o.shards},
                 {"ring_entries", o.ring_entries},
                 {"min_interval_us", o.min_interval_us},
                 {"bandwidth", o.bandwidth},
                 {"downtime_limit_ms", o.downtime_limit_ms},
                 {"max_rounds", o.max_rounds},
                 {"kill_service_ms", o.kill_service_ms}});
    return json;
}

nlohmann::ordered_json to_json(const Shared &shared, const Judgement &judgement)
{
    const Control &c = shared.control;
    nlohmann::ordered_json rounds = nlohmann::ordered_json::array();
    for (std::uint32_t i = 0; i < c.rounds_done.load(std::memory_order_relaxed); ++i)
        rounds.push_back({{"pages_copied", c.rounds[i].pages},
                          {"pages_reported", c.rounds[i].reported},
                          {"ms", static_cast<double>(c.rounds[i].us) / 1000}});
    return {{"rounds", rounds.size()},
            {"converged", c.converged.load(std::memory_order_relaxed) != 0},
            {"runs_published", load(c.runs_published)},
            {"runs_while_writing", load(c.runs_while_writing)},
            {"pages_reported", load(c.pages_reported)},
            {"pages_written", judgement.journal.written},
            {"pages_copied", load(c.pages_copied)},
            {"bytes_sent", load(c.bytes_sent)},
            {"over_reported", load(c.over_reported)},
            {"service_kills", load(c.service_kills)},
            {"longest_gap_ms", ms(c.longest_gap_ns)},
            {"pages_gone", load(c.pages_gone)},
            {"unreported_writes", judgement.journal.unreported},
            {"differing_pages", judgement.differing_pages},
            {"total_ms", ms(c.total_ns)},
            {"downtime_ms", ms(c.downtime_ns)},
            {"per_round", rounds},
            {"options", options_json(shared.options)}};
}

} // namespace

Judgement judge(const Shared &shared)
{
    Judgement judgement{.differing_pages = 0, .journal = shared.journal.judge()};
    const std::byte *source = shared.source.map.data();
    const std::byte *destination = shared.destination.map.data();
    for (std::uint64_t at = 0; at < shared.options.memory; at += page_size)
        judgement.differing_pages += std::memcmp(source + at, destination + at, page_size) != 0;
    return judgement;
}

void print_summary(const Shared &shared, const Judgement &judgement)
{
    const Options &o = shared.options;
    const Control &c = shared.control;
    const auto line = [](const char *what, const std::string &value) { fmt::print("  {:<12}{}\n", what, value); };
    const std::uint32_t rounds = c.rounds_done.load(std::memory_order_relaxed);
    const bool converged = c.converged.load(std::memory_order_relaxed) != 0;
    const double seconds = ms(c.total_ns) / 1000;

    fmt::print("migrated {} in {}, with the guest stopped for {}\n", bytes(o.memory), duration(ms(c.total_ns)),
               duration(ms(c.downtime_ns)));
    line("load", o.synthetic()
                     ? fmt::format("{}, {} pages/s", name(o.pattern), count(o.rate))
                     : fmt::format("{}, speed {}", std::filesystem::path(o.trace).filename().string(), o.speed));
    line("rounds", fmt::format("{}{}", rounds,
                               converged ? ""
                                         : fmt::format("; the rest did not fit {} ms and was copied all the same",
                                                       o.downtime_limit_ms)));
    line("sent", fmt::format("{}, {} pages, {}/s", bytes(load(c.bytes_sent)), count(load(c.pages_copied)),
                             bytes(static_cast<double>(load(c.bytes_sent)) / seconds)));
    line("written", fmt::format("{} pages", count(judgement.journal.written)));
    if (o.tracking)
        line("reported",
             fmt::format("{} pages in {} runs, {} while devices were writing; {} not written since the last report",
                         count(load(c.pages_reported)), count(load(c.runs_published)),
                         count(load(c.runs_while_writing)), count(load(c.over_reported))));
    else
        line("reported", "everything, without tracking");
    if (o.kill_service_ms != 0)
        line("service", fmt::format("killed {} times, at most {} from a kill to the next run",
                                    count(load(c.service_kills)), duration(ms(c.longest_gap_ns))));
    line("judges", fmt::format("{} pages differ, {} writes unreported", count(judgement.differing_pages),
                               count(judgement.journal.unreported)));
}

Outputs::File::File(const std::string &p) : path(p), file(p.empty() ? nullptr : std::fopen(p.c_str(), "we"))
{
    if (!p.empty() && !file)
        throw BadInput(fmt::format("{}: cannot be written: {}", p, std::strerror(errno)));
}

void Outputs::File::write(const void *data, std::size_t size)
{
    if (std::fwrite(data, 1, size, file.get()) != size)
        throw system_failure(fmt::format("{}: cannot be written", path));
}

void Outputs::File::close()
{
    if (std::fclose(file.release()) != 0)
        throw system_failure(fmt::format("{}: cannot be written", path));
}

Outputs::Outputs(const Options &options)
    : json_(options.json), source_(in_directory(options.ram_dir, "source.ram")),
      destination_(in_directory(options.ram_dir, "destination.ram"))
{
}

void Outputs::write(const Shared &shared, const Judgement &judgement)
{
    if (json_.file) {
        const std::string text = to_json(shared, judgement).dump(2) + "\n";
        json_.write(text.data(), text.size());
        json_.close();
    }
    if (source_.file) {
        source_.write(shared.source.map.data(), shared.source.map.size());
        source_.close();
        destination_.write(shared.destination.map.data(), shared.destination.map.size());
        destination_.close();
    }
}

} // namespace dirtyring::migrate
