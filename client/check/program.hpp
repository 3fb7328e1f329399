// The program that is checked, when the kit starts it: on a socket in a directory of its own, and gone at the end.
#pragma once

#include "client/migrate/temporary_directory.hpp"
#include "ring/region.hpp"

#include <chrono>
#include <optional>
#include <string>
#include <sys/types.h>
#include <vector>

namespace dirtyring::check {

// Words of a command line, at spaces. {socket} becomes `socket`.
std::vector<std::string> words_of(const std::string &command, const std::string &socket);

// Beside this program, or else on PATH.
std::string beside_us(const std::string &program);

class Program
{
  public:
    // Throws migrate::Failure if it cannot be started.
    explicit Program(const std::string &command);
    Program(const Program &) = delete;
    Program &operator=(const Program &) = delete;
    ~Program() { stop(); }

    [[nodiscard]] const std::string &socket() const { return socket_; }

    // How it ended, if it has: "ended with exit code 1", and the last line that it said.
    [[nodiscard]] std::optional<std::string> end();

    // Asks it to end, and kills it if it does not.
    void stop();

  private:
    [[nodiscard]] bool ended();
    [[nodiscard]] std::string last_line() const;

    migrate::TemporaryDirectory directory_;
    std::string socket_;
    ring::Fd said_;
    pid_t pid_ = -1;
    std::optional<int> status_;
};

} // namespace dirtyring::check
