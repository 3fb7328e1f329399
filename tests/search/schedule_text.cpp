#include "tests/search/choices.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <sstream>

namespace dirtyring::search {

std::string to_text(const Schedule &schedule)
{
    std::string text = fmt::format("{}\n", fmt::join(schedule.attributes, " "));
    for (const Schedule::Step &step : schedule.steps)
        text += fmt::format("{}\n", fmt::join(step, " "));
    return text;
}

// Commas and braces count as spaces, and what follows // for nothing: so the text of a test can be read, too.
Schedule from_text(const std::string &text)
{
    Schedule schedule;
    std::istringstream lines(text);
    bool first = true;
    for (std::string line; std::getline(lines, line);) {
        line = line.substr(0, line.find("//"));
        for (char &c : line)
            c = c >= '0' && c <= '9' ? c : ' ';
        Schedule::Step step;
        std::istringstream words(line);
        for (std::uint32_t n = 0; words >> n;)
            step.push_back(n);
        if (std::exchange(first, false))
            schedule.attributes = step;
        else if (!step.empty())
            schedule.steps.push_back(step);
    }
    return schedule;
}

} // namespace dirtyring::search
