// What is known of each requirement: it was seen to hold, it was broken, or nothing could be seen.
#pragma once

#include "client/check/requirements.hpp"

#include <array>
#include <cstdio>
#include <string>
#include <vector>

namespace dirtyring::check {

enum class Outcome { pass, fail, skip };

struct Finding {
    std::string where;
    std::string seen;
    std::string expected;

    bool operator==(const Finding &) const = default;
};

class Verdicts
{
  public:
    // Of a program that plays `checked`.
    explicit Verdicts(Role checked) : checked_(checked) {}

    void pass(Rule rule) { at(rule).held = true; }
    void fail(Rule rule, Finding finding);
    // Stands only where nothing was seen.
    void skip(Rule rule, std::string why);

    [[nodiscard]] Outcome outcome(Rule rule) const { return outcome(rule.index()); }
    [[nodiscard]] unsigned count(Outcome outcome) const;
    // Numbers of this outcome, in the order of SPEC.md.
    [[nodiscard]] std::vector<std::string_view> numbers(Outcome outcome) const;

    // A line for each requirement that binds the program, more where it failed or was skipped, and the counts.
    void print(std::FILE *to) const;
    [[nodiscard]] std::string json() const;

  private:
    struct Verdict {
        bool held = false;
        std::vector<Finding> findings; // the first few
        unsigned failures = 0;
        std::string why_skipped;
    };

    Verdict &at(Rule rule) { return verdicts_[rule.index()]; }
    [[nodiscard]] Outcome outcome(std::size_t index) const;
    [[nodiscard]] std::string why_skipped(std::size_t index) const;
    template <class Visit> void for_each(Visit visit) const;

    Role checked_;
    std::array<Verdict, std::size(requirements)> verdicts_;
};

const char *name(Role role);

} // namespace dirtyring::check
