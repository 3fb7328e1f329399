// A run: the service, its guests with their VMMs and devices, the visitor, and the judge that watches them.
#pragma once

#include "client/migrate/signals.hpp"
#include "client/migrate/temporary_directory.hpp"
#include "tests/chaos/child.hpp"
#include "tests/chaos/service.hpp"
#include "tests/chaos/shared.hpp"

#include <deque>
#include <vector>

namespace dirtyring::chaos {

class Run
{
  public:
    explicit Run(const Options &options);

    // All guests are there and sync.
    void start();
    // Devices end, then VMMs, which look at everything once more, then the service; nothing is left.
    void finish();

    // All watch what happens meanwhile: they throw when somebody failed.
    void pause(std::uint64_t ns);
    template <class Ready> bool wait_for(Ready ready, std::uint64_t limit_ns)
    {
        for (const std::uint64_t deadline = now_ns() + limit_ns; !ready(); watch()) {
            if (now_ns() > deadline)
                return false;
        }
        return true;
    }

    // Throws a Hang, with what is said then, if it does not come.
    template <class Ready, class Sentence> void expect(Ready ready, Sentence sentence)
    {
        if (!wait_for(ready, shared_.options.patience_ns()))
            throw Hang(fmt::format("a hang: {}", sentence()));
    }
    // Until each guest but `held` has had a sync that was asked for after `since`, and no change of maps from before is
    // under way.
    void expect_progress(std::uint64_t since, const Guest *held = nullptr);
    [[nodiscard]] bool goes_on(const Guest &guest, std::uint64_t since) const;

    Shared &shared() { return shared_; }
    Service &service() { return service_; }
    Child &vmm(unsigned guest) { return vmms_[guest]; }
    Child &device(unsigned guest, unsigned index) { return devices_[guest * shared_.options.devices + index]; }
    Child &visitor() { return visitor_; }

  private:
    void watch();
    void judge();
    void look_after_children();
    void expect_nothing_left();
    [[nodiscard]] std::string what_waits(std::uint64_t since, const Guest *held) const;

    migrate::Signals signals_;
    migrate::TemporaryDirectory directory_;
    Shared shared_;
    Service service_;
    Holdings of_supervisor_{}; // without guests
    Holdings of_worker_{};
    std::deque<Child> vmms_;
    std::deque<Child> devices_;
    Child visitor_;
    std::uint64_t visits_ = 0;
    std::uint64_t visited_at_ = 0; // ns, when they became more
    bool finishing_ = false;
};

} // namespace dirtyring::chaos
