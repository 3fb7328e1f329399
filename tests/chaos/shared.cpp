#include "tests/chaos/shared.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <sys/eventfd.h>
#include <sys/random.h>

namespace dirtyring::chaos {
namespace {

ring::Region memory(std::uint64_t size)
{
    ring::Region region;
    if (const int error = region.make("guest-memory", size, ring::Pages::present); error < 0)
        throw migrate::Failure(fmt::format("guest memory: {}", std::strerror(-error)));
    return region;
}

} // namespace

Guest::Guest(unsigned number, const Layout &l, unsigned devices)
    : index(number), layout(l), source(memory(l.memory())), destination(l.memory()), journal(l.pages(), devices),
      states(1), device(devices), state(states[0]), bell(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK))
{
    if (::getrandom(state.secret, sizeof state.secret, 0) != sizeof state.secret)
        throw migrate::system_failure("getrandom");
}

Shared::Shared(const Options &o, std::string socket) : options(o), socket_path(std::move(socket))
{
    for (unsigned i = 0; i < o.guests; ++i)
        guests.emplace_back(i, layouts[o.kinds[i % o.kinds.size()]], o.devices);
}

void Shared::print_events(std::size_t last) const
{
    const std::uint64_t count = event_count_[0].load(std::memory_order_relaxed);
    for (std::uint64_t i = count - std::min<std::uint64_t>({count, last, events_.size()}); i < count; ++i) {
        const Event &event = events_[i % events_.size()];
        fmt::print(stderr, "  {:10.3f} ms  {}\n", static_cast<double>(event.ns - began_) / 1e6, event.text);
    }
}

void Shared::condemn(const std::exception &failure) const
{
    Verdict &verdict = verdict_[0];
    if (verdict.taken.exchange(1, std::memory_order_relaxed) != 0)
        return;
    verdict.finding = dynamic_cast<const Lost *>(&failure) != nullptr   ? Finding::loss
                      : dynamic_cast<const Hang *>(&failure) != nullptr ? Finding::hang
                                                                        : Finding::nothing;
    std::strncpy(verdict.sentence, failure.what(), sizeof verdict.sentence - 1);
    verdict.whole.store(1, std::memory_order_release); // pairs with the judge's look
}

} // namespace dirtyring::chaos
