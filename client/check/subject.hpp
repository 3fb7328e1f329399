// A program that the kit starts: held still to be looked at, and gone at the end with all that it started.
#pragma once

#include "ring/region.hpp"

#include <optional>
#include <string>
#include <sys/types.h>
#include <utility>
#include <vector>

namespace dirtyring::check {

// What stands for what in a command line.
using Placeholders = std::vector<std::pair<std::string, std::string>>;

// Beside this program, or else on PATH.
std::string beside_us(const std::string &program);

class Subject
{
  public:
    Subject() = default;
    Subject(const Subject &) = delete;
    Subject &operator=(const Subject &) = delete;
    ~Subject() { kill(); }

    // Words of the command are separated by spaces, and hold placeholders. Throws migrate::BadInput without any, and
    // migrate::Failure if it cannot be started.
    void start(const std::string &command, const Placeholders &placeholders);

    // All of its threads and children. False: it has ended.
    bool hold_still();
    [[nodiscard]] bool still() const { return still_; }
    void go_on();

    [[nodiscard]] bool ended();
    // How, if it has: "ended with exit code 1", and the last line that it said.
    [[nodiscard]] std::optional<std::string> end();
    // The same, or that it goes on.
    [[nodiscard]] std::string state();
    // It touched or did what no program may; one that aborts has stopped by itself.
    [[nodiscard]] bool crashed();
    [[nodiscard]] bool succeeded();

    void ask_to_end(); // SIGTERM
    void kill();

  private:
    // False: it has ended.
    bool look(int options);
    [[nodiscard]] std::string last_line() const;

    ring::Fd said_;
    pid_t pid_ = -1;
    bool still_ = false;
    std::optional<int> status_;
};

} // namespace dirtyring::check
