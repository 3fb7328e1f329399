// Puts what the programs have found into one table, one JSON file, perf/REPORT.md and plots.
#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <sched.h>
#include <stdexcept>
#include <string>
#include <sys/utsname.h>
#include <vector>

namespace {

using nlohmann::json;

struct Options {
    std::vector<std::string> results;
    std::string json;
    std::string report;
    std::string notes;
    std::string plots;
    std::string commit;
    std::string effort;
};

std::string read_file(const std::string &path)
{
    std::ifstream file(path);
    if (!file)
        throw std::runtime_error(path + " cannot be read");
    return {std::istreambuf_iterator<char>(file), {}};
}

void write_file(const std::string &path, const std::string &text)
{
    if (!(std::ofstream(path) << text))
        throw std::runtime_error(path + " cannot be written");
}

std::string text_of(const json &value)
{
    return value.is_null()     ? ""
           : value.is_number() ? fmt::format("{:.4g}", value.get<double>())
                               : value.get<std::string>();
}

std::string with_name(const json &figure, const char *key, const char *name)
{
    return figure[key].is_null() ? "" : fmt::format("{} ({})", text_of(figure[key]), text_of(figure[name]));
}

// One row a figure, its columns as wide as they need be: a table of Markdown that can be read as it is.
std::string table(const json &figures)
{
    std::vector<std::vector<std::string>> rows{{"figure", "ours", "unit", "peer", "limit", "ratio", "goal", ""}};
    for (const json &f : figures) {
        const std::string verdict = f.contains("skipped")  ? "skipped: " + text_of(f["skipped"])
                                    : f["met"].is_null()   ? ""
                                    : f["met"].get<bool>() ? "met"
                                                           : "MISSED";
        rows.push_back({text_of(f["name"]), text_of(f["ours"]), text_of(f["unit"]), with_name(f, "peer", "peer_name"),
                        with_name(f, "limit", "limit_name"), text_of(f["ratio"]), text_of(f["goal"]), verdict});
    }
    std::vector<std::size_t> widths(rows[0].size(), 1);
    for (const auto &row : rows) {
        for (std::size_t i = 0; i < row.size(); ++i)
            widths[i] = std::max(widths[i], row[i].size());
    }
    std::string text;
    const auto add = [&](const std::vector<std::string> &row, char fill) {
        for (std::size_t i = 0; i < row.size(); ++i)
            text += fmt::format("| {}{} ", row[i], std::string(widths[i] - row[i].size(), fill));
        text += "|\n";
    };
    add(rows[0], ' ');
    add(std::vector<std::string>(widths.size()), '-');
    for (std::size_t i = 1; i < rows.size(); ++i)
        add(rows[i], ' ');
    return text;
}

std::string raw_data(const json &figures)
{
    std::string text;
    for (const json &f : figures) {
        if (!f.contains("samples"))
            continue;
        text += fmt::format("{} ({})\n", text_of(f["name"]), text_of(f["unit"]));
        for (const auto &[who, samples] : f["samples"].items()) {
            std::vector<std::string> values;
            for (const json &sample : samples)
                values.push_back(text_of(sample));
            text += fmt::format("  {:<6}{}\n", who, fmt::join(values, " "));
        }
    }
    return text;
}

std::string line_of(const char *path, const std::string &key)
{
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);) {
        if (line.starts_with(key))
            return line.substr(line.find_first_not_of(" \t:", key.size()));
    }
    return "?";
}

std::string machine(const Options &options)
{
    utsname system{};
    ::uname(&system);
    cpu_set_t cpus;
    ::sched_getaffinity(0, sizeof cpus, &cpus);
    return fmt::format(
        "| | |\n|---|---|\n| processor | {}, {} cores |\n| memory | {} |\n| kernel | {} {} |\n| compiler | {} |\n"
        "| commit | {} |\n| run | {} |\n",
        line_of("/proc/cpuinfo", "model name"), CPU_COUNT(&cpus), line_of("/proc/meminfo", "MemTotal"), system.sysname,
        system.release,
#ifdef __clang__
        "clang " __clang_version__,
#else
        "gcc " __VERSION__,
#endif
        options.commit, options.effort);
}

void draw(const json &plot, const std::string &directory)
{
    const std::unique_ptr<FILE, decltype(&::pclose)> gnuplot(::popen("gnuplot", "w"), &::pclose);
    if (!gnuplot)
        throw std::runtime_error("gnuplot does not start");
    std::string script =
        fmt::format("set terminal svg size 800,480 noenhanced background 'white'\nset output '{}/{}.svg'\n"
                    "set title \"{}\"\nset xlabel \"{}\"\nset ylabel \"{}\"\nset grid\nset key left top\n",
                    directory, text_of(plot["name"]), text_of(plot["title"]), text_of(plot["x"]), text_of(plot["y"]));
    if (plot["logarithmic_x"].get<bool>())
        script += "set logscale x\n";
    if (plot["logarithmic_y"].get<bool>())
        script += "set logscale y\n";
    std::vector<std::string> lines;
    for (std::size_t i = 0; i < plot["lines"].size(); ++i) {
        const json &line = plot["lines"][i];
        script += fmt::format("$line{} << END\n", i);
        for (const json &point : line["points"])
            script += fmt::format("{} {}\n", point[0].get<double>(), point[1].get<double>());
        script += "END\n";
        lines.push_back(fmt::format("$line{} with linespoints title \"{}\"", i, text_of(line["name"])));
    }
    script += fmt::format("plot {}\n", fmt::join(lines, ", "));
    std::fputs(script.c_str(), gnuplot.get());
}

void report(const Options &options)
{
    json all = {{"figures", json::array()}, {"plots", json::array()}};
    for (const std::string &path : options.results) {
        const json one = json::parse(read_file(path));
        for (const char *kind : {"figures", "plots"})
            all[kind].insert(all[kind].end(), one[kind].begin(), one[kind].end());
    }
    std::string plots;
    for (const json &plot : all["plots"]) {
        draw(plot, options.plots);
        plots += fmt::format("![{}](plots/{}.svg)\n", text_of(plot["title"]), text_of(plot["name"]));
    }
    const std::string figures = table(all["figures"]);
    write_file(
        options.report,
        fmt::format("# What it costs\n\n`perf/run.sh` has written this page; [notes.md](notes.md) is the part written "
                    "by hand. What each figure means stands in\n[README.md](README.md).\n\n{}\n## "
                    "Figures\n\n{}\n{}\n## Plots\n\n{}\n"
                    "## Raw data\n\nOne value a turn.\n\n```\n{}```\n",
                    machine(options), figures, read_file(options.notes), plots, raw_data(all["figures"])));
    if (!options.json.empty())
        write_file(options.json, all["figures"].dump(1) + "\n");
    fmt::print("{}", figures);
}

} // namespace

int main(int argc, char **argv)
{
    Options options;
    CLI::App app("Puts what the programs of perf/ have found into one table, which it prints, and a report.");
    app.add_option("--json", options.json, "write all figures to this file");
    app.add_option("--report", options.report, "write the report to this file")->required();
    app.add_option("--notes", options.notes, "what it says of what missed its goal")->required();
    app.add_option("--plots", options.plots, "write plots into this folder")->required();
    app.add_option("--commit", options.commit, "what was measured")->required();
    app.add_option("--effort", options.effort, "quick or full")->required();
    app.add_option("results", options.results, "what the programs have written")->required();
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError &e) {
        return app.exit(e) == 0 ? 0 : 2;
    }
    try {
        report(options);
        return 0;
    } catch (const std::exception &e) {
        fmt::print(stderr, "perf_report: {}\n", e.what());
        return 1;
    }
}
