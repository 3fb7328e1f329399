// What each check works with: where its verdicts go, how to reach the program that is checked, and how long it may
// take.
#pragma once

#include "client/check/verdicts.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

namespace dirtyring::check {

using namespace std::chrono_literals;

// A check cannot go on: what it found is recorded already.
struct Broken : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Nobody listens at the socket any more.
struct Gone : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Of a check as a whole. A wait that begins just before it still has half of it to itself, so that only a hang counts
// as one.
class Deadline
{
  public:
    using Clock = std::chrono::steady_clock;

    explicit Deadline(std::chrono::milliseconds patience) : Deadline(patience, Clock::now() + patience) {}

    [[nodiscard]] bool over() const { return Clock::now() >= at_; }
    [[nodiscard]] std::chrono::milliseconds patience() const { return patience_; }
    [[nodiscard]] int ms_left() const
    {
        const auto left = std::chrono::ceil<std::chrono::milliseconds>(at_ - Clock::now()).count();
        return left > 0 ? static_cast<int>(left) : 0;
    }
    // For one wait. Where none may begin any more the check ends, and nobody is to blame.
    [[nodiscard]] Deadline of_a_wait() const
    {
        if (over())
            throw Broken("its time was over");
        return {patience_, std::max(at_, Clock::now() + patience_ / 2)};
    }

  private:
    Deadline(std::chrono::milliseconds patience, Clock::time_point at) : patience_(patience), at_(at) {}

    std::chrono::milliseconds patience_;
    Clock::time_point at_;
};

struct Context {
    Verdicts &verdicts;
    std::string socket;
    std::string check; // its name
    Deadline deadline;

    // Whether it holds; that it did is recorded too.
    bool expect(bool holds, Rule rule, const std::string &where, std::string seen, std::string expected)
    {
        if (holds)
            verdicts.pass(rule);
        else
            verdicts.fail(rule, {fmt::format("{}: {}", check, where), std::move(seen), std::move(expected)});
        return holds;
    }

    // The same, and without it the check makes no sense.
    void need(bool holds, Rule rule, const std::string &where, std::string seen, std::string expected)
    {
        if (!expect(holds, rule, where, std::move(seen), std::move(expected)))
            throw Broken(where);
    }

    // False: it hangs.
    template <class Condition> [[nodiscard]] bool comes_true(Condition condition) const
    {
        if (condition())
            return true;
        for (const Deadline wait = deadline.of_a_wait(); !wait.over();) {
            std::this_thread::sleep_for(200us);
            if (condition())
                return true;
        }
        return false;
    }

    // Comes true only of a program that breaks a rule; one that keeps it costs this much time.
    template <class Condition> [[nodiscard]] bool stays_false(Condition condition) const
    {
        const auto until = Deadline::Clock::now() + look;
        while (Deadline::Clock::now() < until) {
            if (condition())
                return false;
            std::this_thread::sleep_for(1ms);
        }
        return !condition();
    }

    // Long enough for a service to do what it is about to do. Nothing is concluded from it.
    void pause() const { std::this_thread::sleep_for(look); }

    [[nodiscard]] std::string nothing() const
    {
        return fmt::format("nothing within {} ms", deadline.patience().count());
    }

    static constexpr std::chrono::milliseconds look{100};
};

// What a check does, and the rules it can speak of.
struct Check {
    const char *name;
    void (*run)(Context &);
    std::vector<Rule> rules;
};

} // namespace dirtyring::check
