// A part of the run that the judge starts, stops, kills, and starts again; by its pid, and none outlives the judge.
#pragma once

#include "client/migrate/signals.hpp"
#include "tests/chaos/shared.hpp"

#include <functional>
#include <string>
#include <sys/types.h>

namespace dirtyring::chaos {

class Child
{
  public:
    // `body` gets a seed that is another in each life.
    Child(Shared &shared, const migrate::Signals &signals, std::string name, std::function<void(std::uint64_t)> body)
        : shared_(shared), signals_(signals), name_(std::move(name)), body_(std::move(body))
    {
    }
    Child(const Child &) = delete;
    Child &operator=(const Child &) = delete;
    ~Child() { kill(); }

    void start();

    // Nothing happens to one that does not live.
    void kill();
    void stop() const { signal(SIGSTOP); }
    void go_on() const { signal(SIGCONT); }

    // Reaps it if it has ended, and throws a Failure if it was not to: but for exit code 0, and, with may_die, SIGKILL.
    bool ended(bool may_die = false);
    // It has been stopped.
    [[nodiscard]] bool stopped() const;

    [[nodiscard]] pid_t pid() const { return pid_; }
    [[nodiscard]] const std::string &name() const { return name_; }

  private:
    void signal(int number) const
    {
        if (pid_ != 0)
            ::kill(pid_, number);
    }

    Shared &shared_;
    const migrate::Signals &signals_;
    const std::string name_;
    std::function<void(std::uint64_t)> body_;
    pid_t pid_ = 0; // 0: it does not live
    std::uint64_t lives_ = 0;
};

// A fork that dies with its parent, undisturbed by the parent's signals. 0 in the child.
pid_t fork_part(const std::string &name, const migrate::Signals &signals);

} // namespace dirtyring::chaos
