#include "tests/chaos/run.hpp"

#include "tests/chaos/children.hpp"

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

namespace dirtyring::chaos {
Run::Run(const Options &options)
    : shared_(options, directory_.path() + "/socket"), service_(options, directory_.path(), signals_),
      visitor_(shared_, signals_, "visitor", [this](std::uint64_t seed) { run_visitor(shared_, seed); })
{
    for (Guest &guest : shared_.guests) {
        vmms_.emplace_back(shared_, signals_, fmt::format("vmm {}", guest.index),
                           [this, &guest](std::uint64_t seed) { run_vmm(shared_, guest, seed); });
        for (unsigned i = 0; i < options.devices; ++i)
            devices_.emplace_back(shared_, signals_, fmt::format("device {}.{}", guest.index, i),
                                  [this, &guest, i](std::uint64_t seed) { run_device(shared_, guest, i, seed); });
    }
}

void Run::start()
{
    // A worker that has had a predecessor, and a guest, as all later ones: what they hold without guests is compared.
    static_cast<void>(service_.signal_worker(SIGKILL));
    service_.expect_up();
    pause(100 * ms);
    of_supervisor_ = holdings(service_.supervisor());
    of_worker_ = holdings(service_.worker());

    for (Child &vmm : vmms_)
        vmm.start();
    for (Child &device : devices_)
        device.start();
    visitor_.start();
    expect_progress(now_ns());
}

void Run::pause(std::uint64_t ns)
{
    static_cast<void>(wait_for([] { return false; }, ns));
}

void Run::watch()
{
    constexpr timespec glance{0, 1'000'000};
    pollfd signal{signals_.fd(), POLLIN, 0};
    ::ppoll(&signal, 1, &glance, nullptr);
    if (signal.revents != 0)
        throw migrate::Failure("interrupted");
    judge();
    try {
        service_.look();
        look_after_children();
    } catch (const migrate::Failure &) {
        judge(); // a child says why before it ends, and it may have come to that only now
        throw;
    }
    if (const std::uint64_t visits = shared_.visits().load(); visits != visits_ || visitor_.pid() == 0) {
        visits_ = visits;
        visited_at_ = now_ns();
    } else if (now_ns() - visited_at_ > 2 * shared_.options.patience_ns()) {
        throw Hang("a hang: the visitor comes to no end");
    }
}

// Throws what a child has found.
void Run::judge()
{
    const Verdict &verdict = shared_.verdict();
    if (verdict.taken.load() != 0) {
        while (verdict.whole.load(std::memory_order_acquire) == 0)
            ::usleep(1000);
        switch (verdict.finding) {
        case Finding::loss:
            throw Lost(verdict.sentence);
        case Finding::hang:
            throw Hang(verdict.sentence);
        case Finding::nothing:
            throw migrate::Failure(verdict.sentence);
        }
    }
}

// Who left, gave up, or died where it was told to, has a successor.
void Run::look_after_children()
{
    if (finishing_)
        return;
    for (Child &vmm : vmms_) {
        if (vmm.pid() != 0 && vmm.ended())
            vmm.start();
    }
    for (Guest &guest : shared_.guests) {
        for (unsigned i = 0; i < guest.device.size(); ++i) {
            Child &child = device(guest.index, i);
            const bool may_die = guest.device[i].dying.load() != 0;
            if (child.pid() == 0 || !child.ended(may_die))
                continue;
            guest.device[i].die_at = 0;
            guest.device[i].dying = 0;
            shared_.note("{} has ended", child.name());
            child.start();
        }
    }
    if (visitor_.pid() != 0 && visitor_.ended())
        visitor_.start();
}

bool Run::goes_on(const Guest &guest, std::uint64_t since) const
{
    const std::uint64_t change = guest.state.change_since.load();
    return guest.state.synced_since.load() > since && (change == 0 || change > since);
}

void Run::expect_progress(std::uint64_t since, const Guest *held)
{
    const auto all = [&] {
        return std::ranges::all_of(shared_.guests, [&](const Guest &g) { return &g == held || goes_on(g, since); });
    };
    expect(all, [&] { return what_waits(since, held); });
}

std::string Run::what_waits(std::uint64_t since, const Guest *held) const
{
    for (const Guest &guest : shared_.guests) {
        if (&guest == held || goes_on(guest, since))
            continue;
        const bool synced = guest.state.synced_since.load() > since;
        return fmt::format("guest {} ({}) waits for {}, and nobody disturbs it", guest.index, guest.layout.name,
                           synced ? "a change of its maps" : "a sync");
    }
    return "of a guest that went on at last";
}

void Run::finish()
{
    shared_.note("the end begins");
    expect_progress(now_ns());
    finishing_ = true;
    shared_.over() = 1;
    const auto wait_for_end = [&](Child &child) {
        expect([&] { return child.ended(); }, [&] { return child.name() + " does not end"; });
    };
    std::ranges::for_each(devices_, wait_for_end);
    wait_for_end(visitor_);
    for (Guest &guest : shared_.guests) {
        guest.state.finish = 1;
        ::eventfd_write(guest.bell.get(), 1);
    }
    for (Guest &guest : shared_.guests) {
        wait_for_end(vmm(guest.index));
        while (guest.state.done.load() == 0) { // it gave up
            vmm(guest.index).start();
            wait_for_end(vmm(guest.index));
        }
    }
    watch();
    expect_nothing_left();
    service_.end();
}

void Run::expect_nothing_left()
{
    Holdings supervisor{};
    Holdings worker{};
    const auto as_before = [&] {
        supervisor = holdings(service_.supervisor());
        worker = holdings(service_.worker());
        return supervisor.descriptors <= of_supervisor_.descriptors && worker.descriptors <= of_worker_.descriptors &&
               worker.memfds <= of_worker_.memfds && worker.mapped <= of_worker_.mapped;
    };
    if (!wait_for(as_before, shared_.options.patience_ns()))
        throw migrate::Failure(fmt::format(
            "left behind: the supervisor has {} descriptors and had {}; the worker has {}, {} of memfds, with {} "
            "mappings, and had {}, {} and {}",
            supervisor.descriptors, of_supervisor_.descriptors, worker.descriptors, worker.memfds, worker.mapped,
            of_worker_.descriptors, of_worker_.memfds, of_worker_.mapped));
    for (const auto &entry : std::filesystem::directory_iterator(directory_.path())) {
        const std::string name = entry.path().filename();
        if (name != "socket" && name != "log" && name != "plan")
            throw migrate::Failure("left behind: " + entry.path().string());
    }
    for (const auto &entry : std::filesystem::directory_iterator("/dev/shm")) {
        if (entry.path().string().find("dirtyring") != std::string::npos)
            throw migrate::Failure("left behind: " + entry.path().string());
    }
}

} // namespace dirtyring::chaos
