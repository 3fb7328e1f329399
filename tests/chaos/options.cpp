#include "tests/chaos/options.hpp"

#include "tests/chaos/layout.hpp"

#include <CLI/CLI.hpp>

#include <cstdlib>
#include <map>
#include <numeric>
#include <random>

namespace dirtyring::chaos {
namespace {

constexpr std::string_view point_names[] = {
#define X(name) #name,
    DIRTYRING_POINTS(X)
#undef X
};

std::map<std::string, Point> all_points()
{
    std::map<std::string, Point> all;
    for (std::size_t i = 0; i < std::size(point_names); ++i)
        all.emplace(point_names[i], static_cast<Point>(i));
    return all;
}

std::map<std::string, unsigned> all_kinds()
{
    std::map<std::string, unsigned> all;
    for (unsigned i = 0; i < std::size(layouts); ++i)
        all.emplace(layouts[i].name, i);
    return all;
}

struct Broken {
    Rule rule;
    Finding wanted; // what it leads to
};
// Of the service, those that chaos finds. Others need more luck than a run has.
const std::map<std::string, Broken> rules{
    {"no_grace", {Rule::no_grace, Finding::loss}},
    {"publish_before_advance", {Rule::publish_before_advance, Finding::loss}},
    {"unmap_without_grace", {Rule::unmap_without_grace, Finding::loss}},
    {"no_full_scan_on_death", {Rule::no_full_scan_on_death, Finding::loss}},
    {"arm_without_look", {Rule::arm_without_look, Finding::hang}},
    {"clear_before_stage", {Rule::clear_before_stage, Finding::loss}},
    {"restart_without_advance", {Rule::restart_without_advance, Finding::loss}},
    {"restart_without_scan", {Rule::restart_without_scan, Finding::loss}},
    {"restart_without_call", {Rule::restart_without_call, Finding::hang}},
    {"resumed_map_not_scanned", {Rule::resumed_map_not_scanned, Finding::loss}},
    {"commands_not_recorded", {Rule::commands_not_recorded, Finding::hang}},
    {"present_forgotten", {Rule::present_forgotten, Finding::loss}},
    {"epoch_at_submission", {Rule::epoch_at_submission, Finding::loss}},
    {"destroy_not_ended", {Rule::destroy_not_ended, Finding::hang}},
};
const std::map<std::string, Only> parts{{"everything", Only::everything},
                                        {"service", Only::service},
                                        {"devices", Only::devices},
                                        {"vmm", Only::vmm},
                                        {"stops", Only::stops}};

} // namespace

std::string_view name_of(Point point)
{
    return point_names[static_cast<std::size_t>(point)];
}

std::variant<Options, int> parse_options(int argc, char **argv)
{
    constexpr int usage_error = 2;
    Options options;
    std::string rule;
    options.seed = std::random_device{}();
    if (std::getenv("DIRTYRING_FULL") != nullptr)
        options.kills = 1000;
    CLI::App app("chaos: kills and stops a dirtyring service, its devices and its VMMs, and looks for a lost page.");
    app.name("chaos");
    app.add_option("--seconds", options.seconds, "how long")
        ->envname("DIRTYRING_CHAOS_SECONDS")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    app.add_option("--kills", options.kills, "until the service was killed so often; 0: for --seconds")
        ->capture_default_str();
    app.add_option("--seed", options.seed, "repeats what is asked for, not who is first")->envname("DIRTYRING_SEED");
    app.add_option("--kinds", options.kinds, "of guests, in turn; all by default")
        ->delimiter(',')
        ->transform(CLI::CheckedTransformer(all_kinds()));
    app.add_option("--guests", options.guests, "guests; one of each kind by default")->check(CLI::Range(1, 32));
    app.add_option("--devices", options.devices, "devices of each guest")
        ->check(CLI::Range(1, 8))
        ->capture_default_str();
    app.add_option("--only", options.only, "what is disturbed")->transform(CLI::CheckedTransformer(parts));
    app.add_option("--break", rule, "break this rule in the service; then the loss must be found, or the hang")
        ->check(CLI::IsMember(&rules));
    app.add_option("--points", options.points, "where the service is killed, besides anywhere; all by default")
        ->delimiter(',')
        ->transform(CLI::CheckedTransformer(all_points()));
    app.footer("DIRTYRING_FULL=1 in the environment: --kills 1000 unless it is given.\n"
               "Exit codes: 0 no loss and no hang, or, with --break, the one that was to be found; 1 otherwise; "
               "2 wrong usage.");
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError &e) {
        return app.exit(e) == 0 ? 0 : usage_error;
    }
    if (options.kinds.empty()) {
        options.kinds.resize(std::size(layouts));
        std::iota(options.kinds.begin(), options.kinds.end(), 0u);
    }
    if (options.guests == 0)
        options.guests = static_cast<unsigned>(options.kinds.size());
    if (!rule.empty()) {
        options.rule = rules.at(rule).rule;
        options.wanted = rules.at(rule).wanted;
    }
    return options;
}

} // namespace dirtyring::chaos
