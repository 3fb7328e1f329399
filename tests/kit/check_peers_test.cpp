// The conformance kit as the service: of programs that are wrong in one way each it names that rule and no other, and
// our own programs are right.
#include "client/check/our_programs.hpp"
#include "client/check/played_service.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <optional>
#include <string>
#include <vector>

namespace dirtyring::test {
namespace {

using check::Outcome;
using check::Role;
using check::Verdicts;
using Numbers = std::vector<std::string_view>;
using testing::ElementsAreArray;
using testing::IsEmpty;
using testing::IsSupersetOf;

constexpr std::chrono::seconds patience{10};
constexpr std::chrono::seconds short_patience{2}; // with one that hangs

struct Case {
    Role role;
    const char *fault;
    Numbers broken;
    std::chrono::seconds of_the_kit = patience;
};

void PrintTo(const Case &c, std::ostream *os)
{
    *os << c.fault;
}

class CheckPeers : public testing::TestWithParam<Case>
{
};

// A busy machine can hide a fault for once; what is named wrongly is at once.
TEST_P(CheckPeers, AreNamed)
{
    const Case &c = GetParam();
    const bool consumes = c.role == Role::consumer;
    const std::string command = std::string(BROKEN_PEER_PATH) +
                                (consumes ? " consumer {socket} " : " device {socket} {token} {hwpt} ") + c.fault;
    Verdicts verdicts = check::check_program(c.role, command, c.of_the_kit);
    for (int tries = 1; tries < 3 && verdicts.numbers(Outcome::fail).size() < c.broken.size(); ++tries)
        verdicts = check::check_program(c.role, command, c.of_the_kit);
    EXPECT_THAT(verdicts.numbers(Outcome::fail), ElementsAreArray(c.broken));
    if (HasFailure())
        verdicts.print(stderr);
}

std::string name_of(const testing::TestParamInfo<Case> &tested)
{
    return tested.param.fault;
}

INSTANTIATE_TEST_SUITE_P(
    Consumers, CheckPeers,
    testing::Values(Case{Role::consumer, "right", {}}, Case{Role::consumer, "before_hello", {"H-1"}},
                    Case{Role::consumer, "flags", {"F-1"}}, Case{Role::consumer, "size", {"F-2"}},
                    Case{Role::consumer, "late_descriptors", {"F-3"}}, Case{Role::consumer, "exact_size", {"F-18"}},
                    Case{Role::consumer, "oa_without_feature", {"H-2"}}, Case{Role::consumer, "reserved", {"E-2"}},
                    Case{Role::consumer, "no_command_kick", {"E-3"}, short_patience},
                    Case{Role::consumer, "any_header", {"C-1"}}, Case{Role::consumer, "any_head", {"C-3"}},
                    Case{Role::consumer, "beyond_head", {"C-4"}},
                    Case{Role::consumer, "tail_back", {"C-4"}, short_patience},
                    Case{Role::consumer, "no_kick", {"C-5"}, short_patience},
                    Case{Role::consumer, "no_look", {"C-6"}, short_patience},
                    Case{Role::consumer, "copies_once", {"C-7"}, short_patience},
                    Case{Role::consumer, "copies_before_enable", {"E-6"}},
                    Case{Role::consumer, "forgets_old_map", {"E-4"}, short_patience},
                    Case{Role::consumer, "stops_at_unknown", {"C-8"}, short_patience},
                    Case{Role::consumer, "ignores_128", {"C-9"}, short_patience},
                    Case{Role::consumer, "ignores_all_dirty", {"C-10"}, short_patience},
                    Case{Role::consumer, "any_sync", {"C-11"}},
                    Case{Role::consumer, "ignores_end", {"C-12"}, short_patience}),
    name_of);

INSTANTIATE_TEST_SUITE_P(
    Devices, CheckPeers,
    testing::Values(Case{Role::device, "right", {}}, Case{Role::device, "any_header", {"D-1"}},
                    Case{Role::device, "no_section", {"D-2"}}, Case{Role::device, "stale_iotlb", {"D-4"}},
                    Case{Role::device, "spans_regions", {"D-6"}}, Case{Role::device, "tracking_once", {"D-7"}},
                    Case{Role::device, "plain_store", {"D-8"}}, Case{Role::device, "no_dirty", {"D-9"}},
                    Case{Role::device, "no_summary", {"D-10"}}, Case{Role::device, "no_table_bit", {"D-10"}},
                    Case{Role::device, "read_only", {"D-11"}}, Case{Role::device, "no_check", {"D-12"}},
                    Case{Role::device, "stays_inside", {"D-13"}, short_patience},
                    Case{Role::device, "no_bell", {"D-14"}}, Case{Role::device, "after_detach", {"D-15"}},
                    Case{Role::device, "pin_right", {}}, Case{Role::device, "pin_odd_first", {"D-16"}},
                    Case{Role::device, "pin_ignores_closed", {"D-17"}}, Case{Role::device, "pin_marks_early", {"D-18"}},
                    Case{Role::device, "pin_gives_back_early", {"D-19"}}, Case{Role::device, "pin_no_bell", {"D-20"}},
                    Case{Role::device, "marks_untracked", {"D-21"}}),
    name_of);

// A situation that no longer comes about is noticed: what must pass is named.
void expect_ours(const std::string &program, const Numbers &passes)
{
    const std::optional<Verdicts> verdicts = check::check_our_program(program, patience);
    ASSERT_TRUE(verdicts) << "not built";
    EXPECT_THAT(verdicts->numbers(Outcome::fail), IsEmpty());
    EXPECT_THAT(verdicts->numbers(Outcome::pass), IsSupersetOf(passes));
    if (testing::Test::HasFailure())
        verdicts->print(stderr);
}

TEST(CheckOurs, Vmm)
{
    expect_ours("vmm", {"F-1", "F-2", "F-3", "F-18", "H-1",  "H-2",  "C-1",  "C-2", "C-3", "C-4",
                        "C-5", "C-7", "C-8", "C-9",  "C-10", "C-11", "C-12", "E-2", "E-3", "E-6"});
}

TEST(CheckOurs, UringConsumer)
{
    expect_ours("uring_consumer", {"F-1", "F-2", "F-3", "F-18", "H-1", "H-2", "C-1", "C-2", "C-3", "C-4", "C-5", "C-8",
                                   "C-12", "E-2", "E-3"});
}

TEST(CheckOurs, Device)
{
    expect_ours("device", {"F-1", "F-2", "F-18", "H-1", "D-1", "D-2", "D-3", "D-4", "D-6", "D-7", "D-8", "D-9", "D-10",
                           "D-11", "D-12", "D-13", "D-14", "D-15", "D-21"});
}

TEST(CheckOurs, FileReader)
{
    expect_ours("file_reader", {"F-1", "F-2", "F-18", "H-1", "D-1", "D-2", "D-6", "D-10", "D-11", "D-12", "D-13",
                                "D-14", "D-15", "D-17", "D-18", "D-19", "D-20"});
}

// What our own programs do not do.
TEST(CheckPeersThat, MoveAPage)
{
    const Verdicts verdicts =
        check::check_program(Role::consumer, BROKEN_PEER_PATH " consumer {socket} right", patience);
    EXPECT_THAT(verdicts.numbers(Outcome::pass), IsSupersetOf(Numbers{"E-4"}));
}

TEST(CheckPeersThat, NeverConnect)
{
    const Verdicts verdicts = check::check_program(Role::consumer, "true", patience);
    EXPECT_THAT(verdicts.numbers(Outcome::fail), IsEmpty());
    EXPECT_THAT(verdicts.numbers(Outcome::pass), IsEmpty());
}

} // namespace
} // namespace dirtyring::test
