// relacy_models [--list | --ctest | [--trace] suite[.mutation]...]: runs the named checks, or all.
//
// A suite must hold, a mutation of it must be refuted; --trace prints the execution that refutes. --ctest prints what
// CTest includes.
#include "tests/models/relacy/suites.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <string_view>

namespace dirtyring::model {

namespace {

struct Result {
    rl::test_result_e found;
    std::uint64_t iterations;

    [[nodiscard]] bool holds() const { return found == rl::test_result_success; }
    // Anything else that Relacy complains of is a fault of the suite.
    [[nodiscard]] bool refuted() const
    {
        return found == rl::test_result_user_assert_failed || found == rl::test_result_data_race;
    }
};

Result explore(const Suite &suite, rl::scheduler_type_e search, std::uint64_t iterations, unsigned switches, bool trace)
{
    std::ostream nowhere(nullptr);
    rl::test_params params;
    params.iteration_count = iterations;
    params.search_type = search;
    params.context_bound = switches;
    params.output_stream = trace ? &std::cout : &nowhere;
    params.progress_stream = &nowhere;
    suite.simulate(params);
    return {params.test_result, params.stop_iteration};
}

bool check(const Suite &suite, const Mutation *mutation, bool trace)
{
    const std::uint64_t iterations = suite.iterations * (std::getenv("DIRTYRING_FULL") != nullptr ? 10 : 1);
    weakenings = mutation != nullptr ? mutation->weakened : std::vector<Weakening>{};
    delay = mutation != nullptr ? mutation->delayed : std::nullopt;
    broken_rule.store(mutation != nullptr ? mutation->rule : Rule::none, std::memory_order_relaxed);

    const std::string name = std::string(suite.name) + (mutation != nullptr ? std::string(".") + mutation->name : "");
    const bool covered = mutation != nullptr && mutation->covered_by != nullptr;
    const bool expect_refuted = mutation != nullptr && !covered;
    Result r = explore(suite, rl::sched_random, iterations, 0, trace);
    std::printf("%-40s %-10s %8llu at random", name.c_str(), mutation != nullptr ? mutation->edge : suite.edges,
                static_cast<unsigned long long>(r.iterations));
    if (r.holds() && suite.switches > 0) {
        r = explore(suite, rl::sched_bound, 0, suite.switches, trace);
        std::printf(", %llu with %u switches", static_cast<unsigned long long>(r.iterations), suite.switches);
    }
    const bool met = std::all_of(weakenings.begin(), weakenings.end(), [](const Weakening &w) { return w.met; }) &&
                     (!delay || delay->met);
    const bool good = (expect_refuted ? r.refuted() : r.holds()) && met;
    std::printf(": %s%s%s%s%s\n", r.holds() ? "holds" : "refuted, ", r.holds() ? "" : rl::test_result_str(r.found),
                covered ? ", covered by " : "", covered ? mutation->covered_by : "",
                !met   ? "  <-- THERE IS NO SUCH ACCESS"
                : good ? ""
                       : "  <-- UNEXPECTED");
    std::fflush(stdout);
    return good;
}

const std::vector<Suite> &all()
{
    static const std::vector<Suite> suites = {section(),  tag(),       leaving(),  summary(), sync(),     doorbell(),
                                              pin_bell(), kick(),      call(),     table(),   tracking(), ring(),
                                              header(),   pin_unmap(), pin_sync(), slot(),    closing()};
    return suites;
}

int run(const std::vector<std::string_view> &names, bool trace)
{
    unsigned found = 0;
    bool good = true;
    const auto wanted = [&](const std::string &name) {
        const bool yes = names.empty() || std::find(names.begin(), names.end(), name) != names.end();
        found += yes ? 1 : 0;
        return yes;
    };
    for (const Suite &suite : all()) {
        if (wanted(suite.name))
            good &= check(suite, nullptr, trace);
        for (const Mutation &mutation : suite.mutations) {
            if (wanted(std::string(suite.name) + "." + mutation.name))
                good &= check(suite, &mutation, trace);
        }
    }
    if (found < names.size())
        std::fprintf(stderr, "no such suite or mutation; --list names them\n");
    return good && found >= names.size() ? 0 : 1;
}

std::vector<std::string> names_of_all()
{
    std::vector<std::string> names;
    for (const Suite &suite : all()) {
        names.emplace_back(suite.name);
        for (const Mutation &mutation : suite.mutations)
            names.push_back(std::string(suite.name) + "." + mutation.name);
    }
    return names;
}

} // namespace

} // namespace dirtyring::model

int main(int argc, char **argv)
{
    using namespace dirtyring::model;
    std::vector<std::string_view> names(argv + 1, argv + argc);
    if (names.size() == 1 && names[0] == "--list") {
        for (const std::string &name : names_of_all())
            std::printf("%s\n", name.c_str());
        return 0;
    }
    if (names.size() == 1 && names[0] == "--ctest") {
        for (const std::string &name : names_of_all())
            std::printf("add_test(models.relacy.%s \"%s\" %s)\n"
                        "set_tests_properties(models.relacy.%s PROPERTIES LABELS models TIMEOUT 1200)\n",
                        name.c_str(), argv[0], name.c_str(), name.c_str());
        return 0;
    }
    const bool trace = std::erase(names, "--trace") > 0;
    return run(names, trace);
}
