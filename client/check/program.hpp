// The service that is checked, when the kit starts it: on a socket in a directory of its own, and gone at the end.
#pragma once

#include "client/check/subject.hpp"
#include "client/migrate/temporary_directory.hpp"

#include <optional>
#include <string>

namespace dirtyring::check {

class Program
{
  public:
    // Returns when it listens. Throws migrate::Failure if it cannot be started or does not listen.
    explicit Program(const std::string &command);
    Program(const Program &) = delete;
    Program &operator=(const Program &) = delete;
    ~Program() { stop(); }

    [[nodiscard]] const std::string &socket() const { return socket_; }

    // How it ended, if it has.
    [[nodiscard]] std::optional<std::string> end() { return subject_.end(); }

    // Asks it to end, and kills it if it does not.
    void stop();

  private:
    migrate::TemporaryDirectory directory_;
    std::string socket_;
    Subject subject_;
};

} // namespace dirtyring::check
