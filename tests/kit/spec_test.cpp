// ring/SPEC.md says what the headers say, and the conformance kit asks for what SPEC.md asks for.
#include "client/check/requirements.hpp"
#include "iommu/layout.h"
#include "ring/control.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace dirtyring::test {
namespace {

using check::Requirement;
using check::Role;

std::vector<std::string> lines_of_spec()
{
    std::ifstream file(SPEC_PATH);
    std::vector<std::string> lines;
    for (std::string line; std::getline(file, line);)
        lines.push_back(line);
    EXPECT_FALSE(lines.empty()) << SPEC_PATH;
    return lines;
}

struct Sentence {
    std::string number;
    std::string text;
};

// The paragraphs and list items outside of fences, each on one line; and the lines within fences.
struct Spec {
    Spec()
    {
        bool fenced = false;
        bool goes_on = false;
        for (const std::string &line : lines_of_spec()) {
            const std::size_t at = line.find_first_not_of(' ');
            if (at != std::string::npos && line.compare(at, 3, "```") == 0) {
                fenced = !fenced;
                goes_on = false;
            } else if (fenced) {
                in_fences.push_back(line);
            } else if (at == std::string::npos || line[0] == '#' || line[0] == '|') {
                goes_on = false;
                paragraphs.push_back(line);
            } else {
                if (goes_on && line.compare(0, 2, "- ") != 0)
                    paragraphs.back() += ' ' + line.substr(at);
                else
                    paragraphs.push_back(line);
                goes_on = true;
            }
        }
        static const std::regex numbered(R"(- \[([A-Z]-\d+)\] (.*))");
        for (const std::string &paragraph : paragraphs) {
            std::smatch match;
            if (std::regex_match(paragraph, match, numbered))
                sentences.push_back({match[1], match[2]});
        }
    }

    std::vector<std::string> paragraphs;
    std::vector<std::string> in_fences;
    std::vector<Sentence> sentences;
};

std::ptrdiff_t count(const std::string &text, const std::string &pattern)
{
    const std::regex regex(pattern);
    return std::distance(std::sregex_iterator(text.begin(), text.end(), regex), {});
}

TEST(Spec, NumbersEverySentenceThatHasAMust)
{
    const Spec spec;
    EXPECT_GT(spec.sentences.size(), 80u);
    for (const std::string &paragraph : spec.paragraphs) {
        if (paragraph.rfind("MUST, MUST NOT,", 0) == 0)
            continue; // which explains the words
        EXPECT_EQ(count(paragraph, R"(\bMUST\b)"), paragraph.rfind("- [", 0) == 0 ? 1 : 0) << paragraph;
    }
    for (const Sentence &s : spec.sentences) {
        EXPECT_EQ(s.text.back(), '.') << s.number;
        EXPECT_EQ(count(s.text, R"(\. )"), 0) << s.number << " is more than one sentence";
    }
}

TEST(Spec, NumbersAscendInEachAreaWithoutGaps)
{
    std::map<char, int> last;
    for (const Sentence &s : Spec().sentences)
        EXPECT_EQ(std::stoi(s.number.substr(2)), ++last[s.number[0]]) << s.number;
}

TEST(Spec, SaysWhomEachSentenceBinds)
{
    const std::map<Role, std::string> names{{Role::sender, "A sender"},     {Role::client, "A client"},
                                            {Role::service, "The service"}, {Role::front_end, "A front-end"},
                                            {Role::consumer, "A consumer"}, {Role::device, "A device"}};
    for (const Requirement &r : check::requirements)
        EXPECT_THAT(std::string(r.sentence), testing::StartsWith(names.at(r.role) + " MUST ")) << r.number;
}

TEST(Spec, IsWhatTheKitChecks)
{
    const Spec spec;
    std::vector<std::string> theirs;
    std::vector<std::string> ours;
    for (const Sentence &s : spec.sentences)
        theirs.push_back(s.number + ' ' + s.text);
    for (const Requirement &r : check::requirements)
        ours.push_back(std::string(r.number) + ' ' + std::string(r.sentence));
    EXPECT_THAT(ours, testing::ElementsAreArray(theirs));
}

// Each example says an entry and what it means; both directions are tried.
TEST(Spec, ExamplesAreEntries)
{
    static const std::regex run(R"((0x[0-9a-f]{16})  run     (0x[0-9a-f]+) \+(0x[0-9a-f]+))");
    static const std::regex marker(R"((0x[0-9a-f]{16})  marker  (sync|epoch|all-dirty|end) (\d+))");
    const std::map<std::string, enum dr_marker> kinds {
        {"sync", DR_MARKER_SYNC},
        {"epoch", DR_MARKER_EPOCH},
        {"all-dirty", DR_MARKER_ALL_DIRTY},
        {"end", DR_MARKER_END}
    };
    int runs = 0;
    std::set<std::string> markers;
    for (const std::string &line : Spec().in_fences) {
        if (line.rfind("0x", 0) != 0)
            continue;
        SCOPED_TRACE(line);
        std::smatch m;
        const std::uint64_t entry = std::stoull(line, nullptr, 16);
        if (std::regex_match(line, m, run)) {
            ++runs;
            const std::uint64_t start = std::stoull(m[2], nullptr, 16);
            const std::uint64_t length = std::stoull(m[3], nullptr, 16);
            EXPECT_FALSE(dr_is_marker(entry));
            EXPECT_EQ(dr_run_address(entry), start);
            EXPECT_EQ(dr_run_length(entry), length);
            const bool large = (entry >> 11 & 1) != 0;
            const std::uint64_t unit = std::uint64_t{DR_PAGE} << (large ? DR_LARGE_UNIT_LG2 : 0);
            EXPECT_EQ(dr_run(start >> DR_PAGE_LG2, large, static_cast<std::uint32_t>(length / unit)), entry);
        } else if (std::regex_match(line, m, marker)) {
            markers.insert(m[2]);
            EXPECT_TRUE(dr_is_marker(entry));
            EXPECT_EQ(dr_marker_kind(entry), static_cast<std::uint32_t>(kinds.at(m[2])));
            EXPECT_EQ(dr_marker_payload(entry), std::stoull(m[3]));
            EXPECT_EQ(dr_marker(kinds.at(m[2]), std::stoull(m[3])), entry);
        } else {
            ADD_FAILURE() << "neither a run nor a marker";
        }
    }
    EXPECT_GE(runs, 4);
    EXPECT_EQ(markers.size(), kinds.size());
}

TEST(Spec, ConstantsAreThoseOfTheHeaders)
{
#define CONSTANT(name)                            \
    {                                             \
#name, static_cast < std::uint64_t>(name) \
    }
    const std::map<std::string, std::uint64_t> constants{
        CONSTANT(DR_PROTOCOL_VERSION),
        CONSTANT(DR_MESSAGE_MAX),
        CONSTANT(DR_MESSAGE_FDS_MAX),
        CONSTANT(DR_COMMAND_CAPACITY_MIN),
        CONSTANT(DR_COMMAND_CAPACITY_MAX),
        CONSTANT(DR_TOKEN_BYTES),
        CONSTANT(DR_PAYLOAD_BITS),
        CONSTANT(DR_MARKER_SLOTS),
        CONSTANT(DR_RING_MAGIC),
        CONSTANT(DR_RING_VERSION),
        CONSTANT(DR_DISARMED),
        CONSTANT(DR_TRANSLATION_MAGIC),
        CONSTANT(DR_TRANSLATION_VERSION),
        CONSTANT(DR_REGION_LG2),
        CONSTANT(DR_DEVICE_PINS_MAX),
        CONSTANT(DR_ASLEEP_PINS),
    };
#undef CONSTANT
    static const std::regex quoted(R"(`(DR_\w+)` = (0x[0-9a-f]+|\d+))");
    std::set<std::string> seen;
    for (const std::string &p : Spec().paragraphs) {
        for (std::sregex_iterator m(p.begin(), p.end(), quoted), end; m != end; ++m) {
            const std::string name = (*m)[1];
            ASSERT_TRUE(constants.contains(name)) << name << " is not in this test";
            EXPECT_EQ(std::stoull((*m)[2], nullptr, 0), constants.at(name)) << name;
            seen.insert(name);
        }
    }
    EXPECT_EQ(seen.size(), constants.size());
}

} // namespace
} // namespace dirtyring::test
