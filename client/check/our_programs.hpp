// The verdicts on several programs, and which programs of ours there are beside the service.
#pragma once

#include "client/check/verdicts.hpp"

#include <chrono>
#include <optional>
#include <string>
#include <vector>

namespace dirtyring::check {

class OurPrograms
{
  public:
    void add(std::string name, Verdicts verdicts) { checked_.push_back({std::move(name), std::move(verdicts)}); }
    void skip(std::string name, std::string why) { skipped_.push_back({std::move(name), std::move(why)}); }

    [[nodiscard]] unsigned count(Outcome outcome) const;
    // Each as Verdicts does, below its name.
    void print(std::FILE *to) const;
    [[nodiscard]] std::string json() const;

  private:
    struct Checked {
        std::string program;
        Verdicts verdicts;
    };
    struct Skipped {
        std::string program;
        std::string why;
    };

    std::vector<Checked> checked_;
    std::vector<Skipped> skipped_;
};

// Of the examples; none where it is not installed beside this program. Throws std::out_of_range for other names.
std::optional<Verdicts> check_our_program(const std::string &name, std::chrono::milliseconds patience);
// All of them.
void check_our_programs(OurPrograms &all, std::chrono::milliseconds patience);

} // namespace dirtyring::check
