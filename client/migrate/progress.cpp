#include "client/migrate/progress.hpp"

#include "client/migrate/clock.hpp"
#include "client/migrate/units.hpp"

#include <algorithm>
#include <cstdio>
#include <string>
#include <sys/ioctl.h>
#include <unistd.h>

namespace dirtyring::migrate {
namespace {

constexpr std::uint64_t second_ns = 1'000'000'000;

// A line that is longer would wrap, and \r would not get back to its start.
std::size_t columns()
{
    winsize size{};
    return ::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80u;
}

std::string bar(double part)
{
    constexpr unsigned width = 12;
    const auto full = static_cast<unsigned>(std::clamp(part, 0.0, 1.0) * width);
    return std::string(full, '#') + std::string(width - full, '.');
}

} // namespace

Progress::Progress(const Control &control, const Options &options)
    : control_(control), options_(options), terminal_(::isatty(STDOUT_FILENO) == 1), line_ns_(now_ns()),
      measured_ns_(line_ns_), measured_remaining_(static_cast<double>(options.memory))
{
}

Progress::~Progress()
{
    if (bar_shown_)
        fmt::print("\r\033[K");
    std::fflush(stdout);
}

void Progress::tick()
{
    if (phase(control_) < Phase::running)
        return;
    measure();
    show_rounds();
    const std::uint64_t now = now_ns();
    if (terminal_ || now - line_ns_ >= second_ns) {
        line_ns_ = now;
        show_state();
    }
    std::fflush(stdout);
}

// Rates of the last half second or so.
void Progress::measure()
{
    const std::uint64_t now = now_ns();
    if (now - measured_ns_ < second_ns / 2)
        return;
    const double seconds = static_cast<double>(now - measured_ns_) / second_ns;
    const auto reported = static_cast<double>(load(control_.pages_reported) * page_size);
    const auto remaining = static_cast<double>(load(control_.pages_remaining) * page_size);
    dirty_rate_ = (reported - measured_reported_) / seconds;
    gain_ = (measured_remaining_ - remaining) / seconds;
    measured_ns_ = now;
    measured_reported_ = reported;
    measured_remaining_ = remaining;
}

void Progress::show_rounds()
{
    const std::uint32_t done = control_.rounds_done.load(std::memory_order_acquire); // pairs with Source::copy_round
    for (; rounds_shown_ < done; ++rounds_shown_) {
        const Round &round = control_.rounds[rounds_shown_];
        fmt::print("{}round {}: sent {} in {}, meanwhile {} reported\n", bar_shown_ ? "\r\033[K" : "",
                   rounds_shown_ + 1, bytes(round.pages * page_size), duration(static_cast<double>(round.us) / 1000),
                   bytes(round.reported * page_size));
        bar_shown_ = false;
    }
}

void Progress::show_state()
{
    const auto remaining = static_cast<double>(load(control_.pages_remaining) * page_size);
    const auto link_rate = static_cast<double>(load(control_.link_rate));
    // What is written before it was sent for the first time costs nothing, so link rate less dirty rate would be too
    // little.
    const std::string eta = gain_ > 0 ? duration(remaining / gain_ * 1000) : "unknown";
    const std::string copied = bytes(load(control_.pages_copied) * page_size);
    const std::string rates = fmt::format("dirty {}/s, link {}/s, ETA {}", bytes(dirty_rate_), bytes(link_rate), eta);
    const std::string what =
        phase(control_) < Phase::stopping ? fmt::format("round {}", rounds_shown_ + 1) : "guest stopped";
    const std::string state = fmt::format("{}: copied {}, remaining {}, {}", what, copied, bytes(remaining), rates);
    if (terminal_) {
        const double part = 1 - remaining / static_cast<double>(options_.memory);
        fmt::print("\r\033[K{}", fmt::format("[{}] {}", bar(part), state).substr(0, columns() - 1));
        bar_shown_ = true;
    } else {
        fmt::print("{}\n", state);
    }
}

} // namespace dirtyring::migrate
