#include "client/check/verdicts.hpp"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>

namespace dirtyring::check {
namespace {

constexpr std::size_t findings_kept = 3;

const char *name(Outcome outcome)
{
    switch (outcome) {
    case Outcome::pass:
        return "pass";
    case Outcome::fail:
        return "fail";
    case Outcome::skip:
        return "skip";
    }
    return "";
}

} // namespace

const char *name(Role role)
{
    switch (role) {
    case Role::sender:
        return "sender";
    case Role::client:
        return "client";
    case Role::service:
        return "service";
    case Role::front_end:
        return "front-end";
    case Role::consumer:
        return "consumer";
    case Role::device:
        return "device";
    }
    return "";
}

void Verdicts::fail(Rule rule, Finding finding)
{
    Verdict &verdict = at(rule);
    ++verdict.failures;
    const bool known = std::find(verdict.findings.begin(), verdict.findings.end(), finding) != verdict.findings.end();
    if (!known && verdict.findings.size() < findings_kept)
        verdict.findings.push_back(std::move(finding));
}

void Verdicts::skip(Rule rule, std::string why)
{
    if (at(rule).why_skipped.empty())
        at(rule).why_skipped = std::move(why);
}

Outcome Verdicts::outcome(std::size_t index) const
{
    const Verdict &verdict = verdicts_[index];
    if (verdict.failures > 0)
        return Outcome::fail;
    return verdict.held ? Outcome::pass : Outcome::skip;
}

std::string Verdicts::why_skipped(std::size_t index) const
{
    const std::string &why = verdicts_[index].why_skipped;
    return why.empty() ? "nothing came that would show it" : why;
}

template <class Visit> void Verdicts::for_each(Visit visit) const
{
    for (std::size_t i = 0; i < std::size(requirements); ++i) {
        if (binds(requirements[i].role, checked_))
            visit(i, requirements[i], outcome(i));
    }
}

unsigned Verdicts::count(Outcome wanted) const
{
    unsigned n = 0;
    for_each([&](std::size_t, const Requirement &, Outcome outcome) { n += outcome == wanted; });
    return n;
}

std::vector<std::string_view> Verdicts::numbers(Outcome wanted) const
{
    std::vector<std::string_view> all;
    for_each([&](std::size_t, const Requirement &requirement, Outcome outcome) {
        if (outcome == wanted)
            all.push_back(requirement.number);
    });
    return all;
}

void Verdicts::print(std::FILE *to) const
{
    for_each([&](std::size_t i, const Requirement &requirement, Outcome outcome) {
        fmt::print(to, "{}  {:<5} {}\n", name(outcome), requirement.number, requirement.sentence);
        if (outcome == Outcome::skip)
            fmt::print(to, "            skipped: {}\n", why_skipped(i));
        if (outcome != Outcome::fail)
            return;
        for (const Finding &f : verdicts_[i].findings)
            fmt::print(to, "            {}: {}; expected {}\n", f.where, f.seen, f.expected);
        if (verdicts_[i].failures > verdicts_[i].findings.size())
            fmt::print(to, "            {} times in all\n", verdicts_[i].failures);
    });
    fmt::print(to, "{}: {} passed, {} failed, {} skipped\n", name(checked_), count(Outcome::pass), count(Outcome::fail),
               count(Outcome::skip));
}

std::string Verdicts::json() const
{
    nlohmann::ordered_json rows = nlohmann::ordered_json::array();
    for_each([&](std::size_t i, const Requirement &requirement, Outcome outcome) {
        nlohmann::ordered_json row{{"number", requirement.number},
                                   {"binds", name(requirement.role)},
                                   {"sentence", requirement.sentence},
                                   {"outcome", name(outcome)}};
        if (outcome == Outcome::skip)
            row["why"] = why_skipped(i);
        for (const Finding &f : verdicts_[i].findings)
            row["findings"].push_back({{"where", f.where}, {"seen", f.seen}, {"expected", f.expected}});
        rows.push_back(std::move(row));
    });
    const nlohmann::ordered_json all{{"role", name(checked_)},
                                     {"pass", count(Outcome::pass)},
                                     {"fail", count(Outcome::fail)},
                                     {"skip", count(Outcome::skip)},
                                     {"requirements", std::move(rows)}};
    // Bytes of a peer may be among the findings, and need not be UTF-8.
    return all.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

} // namespace dirtyring::check
