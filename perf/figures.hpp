// What the programs here have in common: figures, the ways to take them, and where they go.
//
// A figure is what ours costs or yields, what a peer does for the same work, what nobody can beat on this machine (the
// limit), and the goal. Whoever is compared takes turns, on one core, warmed up; what counts are medians. Programs take
// --quick, --smoke (for an instant, so that a test can see it run) and --json FILE, and print what they find.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace dirtyring::perf {

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// ---- samples ------------------------------------------------------------------------------------------------------

using Samples = std::vector<double>;

// q in [0, 1]; of no samples 0.
double quantile(Samples samples, double q);
inline double median(Samples samples)
{
    return quantile(std::move(samples), 0.5);
}

inline std::uint64_t now_ns()
{
    return static_cast<std::uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
            .count());
}

// How many ns it took.
template <class Work> double timed(Work work)
{
    const std::uint64_t began = now_ns();
    work();
    return static_cast<double>(now_ns() - began);
}

// Does one turn and returns what counts of it.
using Way = std::function<double()>;

// Each way once, then all in turn, `turns` times: what disturbs the machine disturbs all alike.
std::vector<Samples> in_turns(unsigned turns, const std::vector<Way> &ways);

// ---- cores --------------------------------------------------------------------------------------------------------

// That this process may use, and has been started with.
unsigned cores();
// This thread runs on the n-th of them, modulo their number. A program's first thread is on 0, dirtyringd's first
// walker on the last.
void pin_to_core(unsigned n);
// To be called in a child: all of them again.
void unpin();

// ---- figures ------------------------------------------------------------------------------------------------------

// Which two are divided, turn by turn.
enum class Ratio { none, ours_to_peer, peer_to_ours, ours_to_limit, limit_to_ours };

struct Goal {
    enum class Of { nothing, ours, ratio };

    static Goal none() { return {}; }
    static Goal at_most(double value) { return {Of::ours, false, value}; }
    static Goal at_least(double value) { return {Of::ours, true, value}; }
    static Goal ratio_at_most(double value) { return {Of::ratio, false, value}; }
    static Goal ratio_at_least(double value) { return {Of::ratio, true, value}; }

    Of of = Of::nothing;
    bool least = false;
    double value = 0;
};

// Somebody whom ours is compared to.
struct Other {
    std::string name;
    Samples samples;
};

struct Figure {
    std::string name;
    std::string unit;
    Samples ours = {};
    std::optional<Other> peer = {};
    std::optional<Other> limit = {};
    Ratio ratio = Ratio::none;
    Goal goal = {};
};

// Lines over an axis.
struct Plot {
    struct Line {
        std::string name;
        std::vector<std::pair<double, double>> points;
    };
    std::string name; // of the file
    std::string title;
    std::string x;
    std::string y;
    bool logarithmic_x = true;
    bool logarithmic_y = true;
    std::vector<Line> lines = {};
};

enum class Effort { smoke, quick, full };

class Session
{
  public:
    explicit Session(Effort effort) : effort_(effort) {}

    [[nodiscard]] bool smoke() const { return effort_ == Effort::smoke; }
    // What a run of this effort takes.
    template <class T> [[nodiscard]] T pick(T smoke, T quick, T full) const
    {
        return effort_ == Effort::smoke ? smoke : effort_ == Effort::quick ? quick : full;
    }
    [[nodiscard]] unsigned turns() const { return pick(1u, 5u, 15u); }

    void add(const Figure &figure);
    // A figure that cannot be taken here.
    void skip(const std::string &name, const std::string &why);
    void add(const Plot &plot);

    // All of it, as JSON. No file: nowhere.
    void write(const std::string &file) const;

  private:
    Effort effort_;
    nlohmann::json results_ = {{"figures", nlohmann::json::array()}, {"plots", nlohmann::json::array()}};
};

// A program's main. Exit codes: 0; 1 something failed, for one a peer that found other pages; 2 wrong usage.
int run(int argc, char **argv, void (*measure)(Session &));

} // namespace dirtyring::perf
