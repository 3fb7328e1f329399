// The conformance kit against services whose engine breaks one rule each: it names the sentence that is broken.
#include "client/check/program.hpp"
#include "client/check/service_checks.hpp"
#include "iommu/rules.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

namespace dirtyring::test {
namespace {

using check::Check;
using check::Outcome;
using check::Verdicts;
using Numbers = std::vector<std::string_view>;

constexpr std::chrono::seconds patience{10};      // of `dirtyring check`
constexpr std::chrono::seconds short_patience{3}; // with one that hangs, perhaps

// What fails of these areas when the service breaks this rule.
Numbers failed(Rule rule, const std::vector<std::span<const Check>> &areas, std::chrono::seconds of_the_kit)
{
    ::setenv("DIRTYRING_BREAK", std::to_string(static_cast<int>(rule)).c_str(), 1);
    check::Program service(DIRTYRINGD_BREAKABLE_PATH " --socket-path {socket}");
    ::unsetenv("DIRTYRING_BREAK");
    Verdicts verdicts(check::Role::service);
    for (const auto &area : areas) {
        for (const Check &c : area)
            check::run(c, verdicts, service.socket(), of_the_kit, [&] { return service.end(); });
    }
    return verdicts.numbers(Outcome::fail);
}

struct Case {
    Rule rule;
    const char *name;
    std::span<const Check> (*area)();
    Numbers broken; // among others, perhaps
};

void PrintTo(const Case &c, std::ostream *os)
{
    *os << c.name;
}

class CheckRules : public testing::TestWithParam<Case>
{
};

INSTANTIATE_TEST_SUITE_P(
    Of, CheckRules,
    testing::Values(Case{Rule::no_grace, "no_grace", check::map_checks, {"M-13"}},
                    Case{Rule::publish_before_advance, "publish_before_advance", check::ring_checks, {"Q-9"}},
                    Case{Rule::no_leading_grace, "no_leading_grace", check::tracking_checks, {"M-24"}},
                    Case{Rule::unmap_without_grace, "unmap_without_grace", check::map_checks, {"M-13"}},
                    Case{Rule::unmap_waits_for_room, "unmap_waits_for_room", check::map_checks, {"M-17"}},
                    Case{Rule::epoch_at_submission, "epoch_at_submission", check::map_checks, {"M-18"}},
                    Case{Rule::unmap_passes_enable, "unmap_passes_enable", check::map_checks, {"M-30"}},
                    Case{Rule::enable_without_advance, "enable_without_advance", check::tracking_checks, {"M-22"}},
                    Case{Rule::no_full_scan_on_death, "no_full_scan_on_death", check::device_checks, {"S-11"}},
                    Case{Rule::unmap_ignores_pins, "unmap_ignores_pins", check::device_checks, {"S-12"}},
                    Case{Rule::sync_ignores_pins, "sync_ignores_pins", check::device_checks, {"S-13"}},
                    Case{Rule::death_ignores_pins, "death_ignores_pins", check::device_checks, {"S-15"}},
                    Case{Rule::no_want_kick, "no_want_kick", check::ring_checks, {"Q-12"}},
                    Case{Rule::arm_without_look, "arm_without_look", check::ring_checks, {"Q-13"}}),
    [](const auto &tested) { return std::string(tested.param.name); });

// A busy machine can hide a fault for once.
TEST_P(CheckRules, AreNamed)
{
    Numbers numbers;
    const auto named = [&] {
        return std::all_of(GetParam().broken.begin(), GetParam().broken.end(), [&](std::string_view n) {
            return std::find(numbers.begin(), numbers.end(), n) != numbers.end();
        });
    };
    for (int tries = 0; tries < 3 && !named(); ++tries)
        numbers = failed(GetParam().rule, {GetParam().area()}, short_patience);
    EXPECT_THAT(numbers, testing::IsSupersetOf(GetParam().broken));
}

TEST(CheckWithoutBrokenRule, NothingIsNamed)
{
    const Numbers numbers = failed(Rule::none,
                                   {check::ring_checks(), check::map_checks(), check::tracking_checks(),
                                    check::size_checks(), check::device_checks()},
                                   patience);
    EXPECT_THAT(numbers, testing::IsEmpty());
}

} // namespace
} // namespace dirtyring::test
