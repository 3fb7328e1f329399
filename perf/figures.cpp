#include "perf/figures.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sched.h>
#include <string_view>

namespace dirtyring::perf {
namespace {

cpu_set_t allowed()
{
    cpu_set_t set;
    CPU_ZERO(&set);
    ::sched_getaffinity(0, sizeof set, &set);
    return set;
}

// As the process was started.
const cpu_set_t &all_cores()
{
    static const cpu_set_t set = allowed();
    return set;
}

nlohmann::json number(const Samples &samples)
{
    return samples.empty() ? nlohmann::json() : nlohmann::json(median(samples));
}

Samples divide(const Samples &a, const Samples &b)
{
    Samples ratios;
    for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i)
        ratios.push_back(a[i] / b[i]);
    return ratios;
}

Samples ratios(const Figure &f)
{
    const Samples none;
    const Samples &peer = f.peer ? f.peer->samples : none;
    const Samples &limit = f.limit ? f.limit->samples : none;
    switch (f.ratio) {
    case Ratio::ours_to_peer:
        return divide(f.ours, peer);
    case Ratio::peer_to_ours:
        return divide(peer, f.ours);
    case Ratio::ours_to_limit:
        return divide(f.ours, limit);
    case Ratio::limit_to_ours:
        return divide(limit, f.ours);
    case Ratio::none:
        break;
    }
    return none;
}

nlohmann::json describe(const Goal &goal, const std::string &unit)
{
    if (goal.of == Goal::Of::nothing)
        return {};
    return fmt::format("{} {:g}{}", goal.least ? ">=" : "<=", goal.value,
                       goal.of == Goal::Of::ratio ? " x" : " " + unit);
}

nlohmann::json met(const Goal &goal, const nlohmann::json &ours, const nlohmann::json &ratio)
{
    const nlohmann::json &value = goal.of == Goal::Of::ratio ? ratio : ours;
    if (goal.of == Goal::Of::nothing || value.is_null())
        return {};
    return goal.least ? value.get<double>() >= goal.value : value.get<double>() <= goal.value;
}

std::string shown(const nlohmann::json &value)
{
    return value.is_null() ? "" : fmt::format("{:.4g}", value.get<double>());
}

void print(const nlohmann::json &f)
{
    fmt::print("{:<58}{:>10} {:<8}", f["name"].get<std::string>(), shown(f["ours"]), f["unit"].get<std::string>());
    if (!f["peer"].is_null())
        fmt::print("  {} {}", f["peer_name"].get<std::string>(), shown(f["peer"]));
    if (!f["limit"].is_null())
        fmt::print("  {} {}", f["limit_name"].get<std::string>(), shown(f["limit"]));
    if (!f["ratio"].is_null())
        fmt::print("  ratio {}", shown(f["ratio"]));
    if (!f["met"].is_null())
        fmt::print("  goal {}: {}", f["goal"].get<std::string>(), f["met"].get<bool>() ? "met" : "missed");
    fmt::print("\n");
    std::fflush(stdout);
}

} // namespace

double quantile(Samples samples, double q)
{
    if (samples.empty())
        return 0;
    const auto at = static_cast<std::ptrdiff_t>(std::ceil(q * static_cast<double>(samples.size())) - 1);
    const auto nth = samples.begin() + std::max<std::ptrdiff_t>(at, 0);
    std::nth_element(samples.begin(), nth, samples.end());
    return *nth;
}

std::vector<Samples> in_turns(unsigned turns, const std::vector<Way> &ways)
{
    std::vector<Samples> samples(ways.size());
    for (const Way &way : ways)
        way();
    for (unsigned turn = 0; turn < turns; ++turn) {
        for (std::size_t i = 0; i < ways.size(); ++i)
            samples[i].push_back(ways[i]());
    }
    return samples;
}

unsigned cores()
{
    return static_cast<unsigned>(CPU_COUNT(&all_cores()));
}

void pin_to_core(unsigned n)
{
    n %= cores();
    int cpu = 0;
    while (!CPU_ISSET(cpu, &all_cores()) || n-- > 0)
        ++cpu;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    if (::sched_setaffinity(0, sizeof one, &one) != 0)
        throw Failure("a thread cannot be pinned");
}

void unpin()
{
    ::sched_setaffinity(0, sizeof all_cores(), &all_cores());
}

void Session::add(const Figure &f)
{
    nlohmann::json json = {{"name", f.name}, {"unit", f.unit}, {"samples", {{"ours", f.ours}}}};
    json["ours"] = number(f.ours);
    json["peer"] = json["limit"] = nullptr;
    if (f.peer) {
        json["peer"] = number(f.peer->samples);
        json["peer_name"] = f.peer->name;
        json["samples"]["peer"] = f.peer->samples;
    }
    if (f.limit) {
        json["limit"] = number(f.limit->samples);
        json["limit_name"] = f.limit->name;
        json["samples"]["limit"] = f.limit->samples;
    }
    json["ratio"] = number(ratios(f));
    json["goal"] = describe(f.goal, f.unit);
    json["met"] = met(f.goal, json["ours"], json["ratio"]);
    print(json);
    results_["figures"].push_back(std::move(json));
}

void Session::skip(const std::string &name, const std::string &why)
{
    fmt::print("{:<58}skipped: {}\n", name, why);
    std::fflush(stdout);
    nlohmann::json json = {{"name", name}, {"unit", ""}, {"skipped", why}};
    for (const char *nothing : {"ours", "peer", "limit", "ratio", "goal", "met"})
        json[nothing] = nullptr;
    results_["figures"].push_back(std::move(json));
}

void Session::add(const Plot &plot)
{
    nlohmann::json lines = nlohmann::json::array();
    for (const Plot::Line &line : plot.lines)
        lines.push_back({{"name", line.name}, {"points", line.points}});
    results_["plots"].push_back({{"name", plot.name},
                                 {"title", plot.title},
                                 {"x", plot.x},
                                 {"y", plot.y},
                                 {"logarithmic_x", plot.logarithmic_x},
                                 {"logarithmic_y", plot.logarithmic_y},
                                 {"lines", lines}});
}

void Session::write(const std::string &file) const
{
    if (!file.empty() && !(std::ofstream(file) << results_.dump(1) << '\n'))
        throw Failure(file + " cannot be written");
}

int run(int argc, char **argv, void (*measure)(Session &))
{
    Effort effort = Effort::full;
    std::string file;
    for (int i = 1; i < argc; ++i) {
        const std::string_view word(argv[i]);
        if (word == "--quick") {
            effort = Effort::quick;
        } else if (word == "--smoke") {
            effort = Effort::smoke;
        } else if (word == "--json" && i + 1 < argc) {
            file = argv[++i];
        } else {
            fmt::print(stderr, "usage: {} [--quick | --smoke] [--json FILE]\n", argv[0]);
            return 2;
        }
    }
    try {
        pin_to_core(0);
        Session session(effort);
        measure(session);
        session.write(file);
        return 0;
    } catch (const std::exception &e) {
        fmt::print(stderr, "{}: {}\n", argv[0], e.what());
        return 1;
    }
}

} // namespace dirtyring::perf
