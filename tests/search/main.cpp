// Searches the states of the engine at random: tests/search/README.md.
#include "tests/engine/hook.hpp"
#include "tests/engine/oracle.hpp"
#include "tests/search/isolated.hpp"
#include "tests/search/rule_names.hpp"

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <fstream>
#include <iterator>
#include <thread>

namespace {

using namespace dirtyring;
using namespace dirtyring::search;

struct Options {
    Hunt hunt;
    std::string rule;
    std::vector<std::string> table;
    std::string replay;
    bool one = false;
    bool coverage = false;
    bool keep = false;
    std::string unreachable;
    unsigned tries = 3000;
};

// Of the rule that was broken.
void print_test(const Result &result, const std::string &rule)
{
    fmt::print("// {}\n// {}: {}\nTEST(Search, Found)\n{{\n    replay(Rule::{}, {{{}}}, {{\n", result.attributes,
               result.finding->kind, result.finding->text, rule.empty() ? "none" : rule,
               fmt::join(result.schedule.attributes, ", "));
    for (std::size_t i = 0; i < result.schedule.steps.size(); ++i) {
        fmt::print("        {{{}}}, // {}\n", fmt::join(result.schedule.steps[i], ", "),
                   i < result.told.size() ? result.told[i] : "");
    }
    fmt::print("    }});\n}}\n");
    for (std::size_t i = result.schedule.steps.size(); i < result.told.size(); ++i)
        fmt::print("// the end: {}\n", result.told[i]);
}

// The finding of a seed, as short as it can be.
Result shortest(std::uint64_t seed, Coverage &coverage, const Options &options)
{
    const Result first = run_isolated(Choices(seed, steps_of(seed)), coverage);
    if (!first.finding)
        return first;
    const Schedule schedule =
        options.keep ? first.schedule : minimise(first.schedule, first.finding->kind, coverage, options.tries);
    Result last = run_isolated(Choices(schedule), coverage, true);
    last.schedule = schedule;
    return last;
}

int search_once(const Options &options, Coverage &coverage)
{
    const Found found = hunt(options.hunt, coverage);
    fmt::print("{} schedules in {:.1f} s\n", found.schedules, found.seconds);
    if (found.seed) {
        fmt::print("found by seed {}: {}: {}\n", *found.seed, found.finding.kind, found.finding.text);
        std::fflush(stdout);
        const Result result = shortest(*found.seed, coverage, options);
        if (result.finding)
            print_test(result, options.rule);
    }
    return found.seed.has_value() ? 1 : 0;
}

int replay(const Options &options, Coverage &coverage)
{
    std::ifstream file(options.replay);
    if (!file) {
        fmt::print(stderr, "{}: cannot be read\n", options.replay);
        return 2;
    }
    const Schedule schedule = from_text({std::istreambuf_iterator<char>(file), {}});
    Result result = run_isolated(Choices(schedule), coverage, true);
    if (!result.finding) {
        fmt::print("nothing is found\n");
        return 0;
    }
    result.schedule = schedule;
    print_test(result, options.rule);
    return 1;
}

int table(const Options &options, Coverage &coverage)
{
    bool all = true;
    fmt::print("| rule | found as | schedules | seconds | steps |\n|---|---|---|---|---|\n");
    for (const std::string &name : options.table) {
        const auto rule = rule_of(name);
        if (!rule) {
            fmt::print(stderr, "{}: there is no such rule\n", name);
            return 2;
        }
        const test::Breaking breaking(*rule);
        const Found found = hunt(options.hunt, coverage);
        if (!found.seed) {
            all = false;
            fmt::print("| `{}` | - | {} | {:.1f} | |\n", name, found.schedules, found.seconds);
        } else {
            const Result result = shortest(*found.seed, coverage, options);
            fmt::print("| `{}` | {} | {} | {:.1f} | {} |\n", name, found.finding.kind, found.schedules, found.seconds,
                       result.schedule.steps.size());
        }
        std::fflush(stdout);
    }
    return all ? 0 : 1;
}

} // namespace

int main(int argc, char **argv)
{
    Options options;
    CLI::App app{"Searches the states of the engine at random, in one thread; a seed repeats."};
    app.add_option("--seconds", options.hunt.seconds, "begin no schedule after so long");
    app.add_option("--schedules", options.hunt.schedules,
                   "at most so many; without either 3,000, or, with DIRTYRING_FULL, an hour on each processor");
    app.add_option("--jobs", options.hunt.jobs, "processes")->check(CLI::Range(1, 256));
    app.add_option("--seed", options.hunt.seed, "of the first schedule");
    app.add_flag("--one", options.one, "only that schedule, shortened");
    app.add_option("--break", options.rule, "break this rule of enum Rule: not to find it is the failure");
    app.add_option("--only", options.hunt.only, "pass over findings of other kinds");
    app.add_flag("--all", options.hunt.all, "tell each finding, and go on");
    app.add_option("--table", options.table, "break one rule after the other, and print a table");
    app.add_option("--replay", options.replay, "a schedule as it was printed");
    app.add_flag("--coverage", options.coverage, "what has met what, and what never");
    app.add_option("--unreachable", options.unreachable, "a file that says which pairs cannot meet, and why");
    app.add_flag("--keep", options.keep, "do not shorten what is found");
    app.add_option("--tries", options.tries, "how often to try to shorten it");
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError &e) {
        return app.exit(e) == 0 ? 0 : 2;
    }
    if (options.one) {
        options.hunt.schedules = 1;
    } else if (app.count("--seconds") == 0 && app.count("--schedules") == 0) {
        if (test::full_length()) {
            options.hunt.seconds = 3600;
            options.hunt.jobs = std::thread::hardware_concurrency();
            options.coverage = true;
        } else {
            options.hunt.schedules = 3000;
        }
    }
    Coverage coverage;
    if (!options.replay.empty())
        return replay(options, coverage);
    if (!options.table.empty())
        return table(options, coverage);
    int code = 0;
    if (options.rule.empty()) {
        code = search_once(options, coverage);
    } else if (const auto rule = rule_of(options.rule)) {
        const test::Breaking breaking(*rule);
        code = 1 - search_once(options, coverage);
    } else {
        fmt::print(stderr, "{}: there is no such rule\n", options.rule);
        return 2;
    }
    if (options.coverage && !coverage.print(options.unreachable))
        code = 1;
    return code;
}
