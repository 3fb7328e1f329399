// The processes of a migration, as their parent sees them: started, watched, ended by pid, reaped. None outlives the
// parent.
#pragma once

#include "client/migrate/control.hpp"
#include "client/migrate/signals.hpp"
#include "ring/region.hpp"

#include <functional>
#include <optional>
#include <string>
#include <sys/types.h>
#include <vector>

namespace dirtyring::migrate {

class Children
{
  public:
    Children(Control &control, const Signals &signals) : control_(control), signals_(signals) {}
    Children(const Children &) = delete;
    Children &operator=(const Children &) = delete;
    ~Children() { end(); }

    // Forks a part of the migration. What body throws is the part's failure. Only while the parent has one thread.
    void start(const std::string &name, const std::function<void()> &body);

    // Forks and executes a program that is to run until end(): its pid. What it writes to stderr is kept for its
    // epitaph.
    pid_t start_program(const std::string &path, std::vector<std::string> arguments);

    // Waits up to `timeout_ms` for something to happen. Throws Failure when a child failed or a signal asks to stop.
    void watch(int timeout_ms);

    // True while a part has not ended.
    [[nodiscard]] bool parts_running() const;

    // Ends and reaps all; returns when none is left.
    void end();

  private:
    struct Child {
        std::string name;
        pid_t pid;
        ring::Fd pidfd;
        bool program;
        ring::Fd errors; // a program's stderr
        std::string last_words;
        std::optional<int> status; // of waitpid: it has ended

        void listen(); // takes what it wrote
        void look();   // reaps it if it has ended
        [[nodiscard]] bool failed() const;
    };

    // True in the child.
    bool fork(const std::string &name, bool program, ring::Fd errors);
    std::string epitaph();

    Control &control_;
    const Signals &signals_;
    std::vector<Child> children_;
};

} // namespace dirtyring::migrate
