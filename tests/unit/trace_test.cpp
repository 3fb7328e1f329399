#include "client/trace.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <zlib.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <unistd.h>

namespace {

using dirtyring::TraceEvent;
using testing::HasSubstr;

constexpr const char *sample = "0 M 1ffde000 4096 2000\n"
                               "3243636 W 1ffde010 512\n"
                               "3243636 R 1ffde000 8192\n"
                               "3243700 U ffffb000 4096\n"
                               "3243701 U 0 18446744073709551615\n";

class Trace : public testing::Test
{
  protected:
    Trace() : directory_(make_directory()) {}
    ~Trace() override { std::filesystem::remove_all(directory_); }

    [[nodiscard]] std::string path(const std::string &name) const { return directory_ + "/" + name; }

    std::string plain(const std::string &text)
    {
        std::ofstream(path("trace"), std::ios::binary) << text;
        return path("trace");
    }

    std::string zipped(const std::string &text)
    {
        gzFile file = gzopen(path("trace.gz").c_str(), "wb");
        gzwrite(file, text.data(), static_cast<unsigned>(text.size()));
        gzclose(file);
        return path("trace.gz");
    }

    // The sentence about a trace that cannot be loaded.
    static std::string refusal(const std::string &path)
    {
        const auto events = dirtyring::load_trace(path);
        return events ? "no refusal" : events.error();
    }

  private:
    static std::string make_directory()
    {
        std::string name = testing::TempDir() + "/trace-XXXXXX";
        if (::mkdtemp(name.data()) == nullptr)
            throw std::runtime_error("mkdtemp");
        return name;
    }

    std::string directory_;
};

void expect_sample(const std::vector<TraceEvent> &events)
{
    ASSERT_EQ(events.size(), 5u);
    EXPECT_EQ(events[0].kind, TraceEvent::Kind::map);
    EXPECT_EQ(events[0].address, 0x1ffde000u);
    EXPECT_EQ(events[0].length, 4096u);
    EXPECT_EQ(events[0].oa, 0x2000u);
    EXPECT_EQ(events[1].kind, TraceEvent::Kind::write);
    EXPECT_EQ(events[1].time_us, 3243636u);
    EXPECT_EQ(events[1].line, 2u);
    EXPECT_TRUE(events[1].is_access());
    EXPECT_EQ(events[2].kind, TraceEvent::Kind::read);
    EXPECT_EQ(events[3].kind, TraceEvent::Kind::unmap);
    EXPECT_FALSE(events[3].is_access());
    EXPECT_EQ(events[4].length, UINT64_MAX);
}

TEST_F(Trace, PlainAndGzipReadTheSame)
{
    for (const std::string &file : {plain(sample), zipped(sample)}) {
        const auto events = dirtyring::load_trace(file);
        ASSERT_TRUE(events) << events.error();
        expect_sample(*events);
    }
}

TEST_F(Trace, StreamsEventByEvent)
{
    auto reader = dirtyring::TraceReader::open(zipped(sample));
    ASSERT_TRUE(reader) << reader.error();
    for (unsigned line = 1; line <= 5; ++line) {
        const auto event = reader->next();
        ASSERT_TRUE(event) << event.error();
        ASSERT_TRUE(*event);
        EXPECT_EQ((*event)->line, line);
    }
    const auto end = reader->next();
    ASSERT_TRUE(end);
    EXPECT_FALSE(*end);
}

TEST_F(Trace, MissingFileAndDirectoryAreNamed)
{
    EXPECT_THAT(refusal(path("none")), testing::AllOf(HasSubstr(path("none")), HasSubstr("No such file")));
    EXPECT_THAT(refusal(path(".")), testing::AllOf(HasSubstr(path(".")), HasSubstr("Is a directory")));
}

TEST_F(Trace, EmptyFileIsNoTrace)
{
    EXPECT_THAT(refusal(plain("")), HasSubstr("found no event"));
}

TEST_F(Trace, TruncatedGzipIsFoundWhereverItBreaksOff)
{
    std::string text;
    for (unsigned i = 0; i < 20'000; ++i)
        text += std::to_string(i) + " W " + std::to_string(i * 7919 % 90'000) + "000 4096\n";
    const std::string file = zipped(text);
    const auto whole = std::filesystem::file_size(file);
    for (const auto size : {whole - 1, whole - 8, whole / 2, whole / 10}) {
        std::filesystem::resize_file(file, size);
        EXPECT_THAT(refusal(file), testing::AllOf(HasSubstr(file), HasSubstr("truncated"))) << size << " of " << whole;
    }
}

TEST_F(Trace, DamagedGzipIsFound)
{
    const std::string file = zipped(std::string(sample));
    std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
    stream.seekp(-8, std::ios::end); // the checksum
    stream.put('\x55').put('\x55');
    stream.close();
    EXPECT_THAT(refusal(file), HasSubstr("damaged gzip stream"));
}

TEST_F(Trace, TruncatedPlainFileIsFound)
{
    EXPECT_THAT(refusal(plain("0 W 1000 4096\n5 W 1000 40")), testing::AllOf(HasSubstr(":2:"), HasSubstr("truncated")));
}

struct Wrong {
    const char *line;
    const char *expected;

    friend void PrintTo(const Wrong &w, std::ostream *out) { *out << '"' << w.line << '"'; }
};

class WrongLine : public Trace, public testing::WithParamInterface<Wrong>
{
};

TEST_P(WrongLine, IsNamedWithWhatWasExpected)
{
    const std::string file = plain(std::string("7 W 1000 4096\n") + GetParam().line + "\n8 W 1000 4096\n");
    EXPECT_THAT(refusal(file), testing::AllOf(HasSubstr(file + ":2: expected "), HasSubstr(GetParam().expected)));
}

INSTANTIATE_TEST_SUITE_P(
    Lines, WrongLine,
    testing::Values(Wrong{"", "TIME"}, Wrong{"# comment", "TIME"}, Wrong{"8 W 1000", "LENGTH"},
                    Wrong{"8 X 1000 4096", "W, R, M or U"}, Wrong{"8 WW 1000 4096", "W, R, M or U"},
                    Wrong{"x W 1000 4096", "time"}, Wrong{"-8 W 1000 4096", "time"},
                    Wrong{"6 W 1000 4096", "at least 7"}, Wrong{"8 W 0x1000 4096", "without 0x"},
                    Wrong{"8 W 1g00 4096", "hexadecimal"}, Wrong{"8 W 1000 1k", "length"},
                    Wrong{"8 W 1000 0", "length above 0"}, Wrong{"8 W 1000 4096 1000", "four fields"},
                    Wrong{"8 M 1000 4096", "five fields"}, Wrong{"8 M 1000 4096 1000 1", "five fields"},
                    Wrong{"8 M 1008 4096 1000", "whole pages"}, Wrong{"8 M 1000 4096 1001", "whole pages"},
                    Wrong{"8 U 1000 512", "whole pages"}, Wrong{"8 W  1000 4096", "four fields"},
                    Wrong{"8 W ffffffffffffffff 2", "within 64 bits"}, Wrong{"8 W 11111111111111111 2", "hexadecimal"},
                    Wrong{"8 M 1000 18446744073709551615 0", "within 64 bits"}));

TEST_F(Trace, AnEndlessLineIsRefused)
{
    EXPECT_THAT(refusal(plain(std::string(1 << 20, '8') + "\n")), HasSubstr(":1: expected "));
}

} // namespace
