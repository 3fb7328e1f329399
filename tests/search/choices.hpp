// A schedule as data: numbers, of which each is a choice. Drawn at random and noted, or read again; what is missing
// is 0, and 0 is always
// the simplest that can be chosen, so that a schedule can be shortened number by number.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace dirtyring::search {

struct Schedule {
    using Step = std::vector<std::uint32_t>;
    Step attributes;
    std::vector<Step> steps;
    [[nodiscard]] std::size_t numbers() const
    {
        std::size_t n = attributes.size();
        for (const Step &s : steps)
            n += s.size();
        return n;
    }
};

class Choices
{
  public:
    // At random.
    Choices(std::uint64_t seed, std::size_t steps) : random_(seed), drawing_(true), count_(steps) {}
    // As noted.
    explicit Choices(Schedule schedule) : schedule_(std::move(schedule)), count_(schedule_.steps.size()) {}

    // The next choices are those of the attributes, or of the next step. False: there is none.
    bool begin_step()
    {
        if (step_ == count_)
            return false;
        if (drawing_)
            schedule_.steps.emplace_back();
        now_ = &schedule_.steps[step_++];
        at_ = 0;
        return true;
    }

    // One of 0 to n - 1.
    std::uint64_t next(std::uint64_t n)
    {
        if (drawing_) {
            const std::uint64_t value = random_() % n;
            now_->push_back(static_cast<std::uint32_t>(value));
            return value;
        }
        return at_ < now_->size() ? (*now_)[at_++] % n : 0;
    }
    bool one_in(std::uint64_t n) { return next(n) == n - 1; }

    [[nodiscard]] const Schedule &schedule() const { return schedule_; }
    [[nodiscard]] std::size_t step() const { return step_; }

  private:
    std::mt19937_64 random_{0};
    bool drawing_ = false;
    Schedule schedule_;
    std::size_t count_;
    std::size_t step_ = 0;
    std::size_t at_ = 0;
    Schedule::Step *now_ = &schedule_.attributes;
};

// One line of numbers each: the attributes, then the steps. What is printed can be read again.
std::string to_text(const Schedule &schedule);
Schedule from_text(const std::string &text);

} // namespace dirtyring::search
