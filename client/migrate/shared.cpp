#include "client/migrate/shared.hpp"

#include "client/migrate/failure.hpp"
#include "client/migrate/mix.hpp"
#include "client/migrate/units.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <unistd.h>
#include <utility>

namespace dirtyring::migrate {
namespace {

// Present: memory that is not there is a refusal now, and not a SIGBUS later.
ring::Region make(const char *name, std::uint64_t size)
{
    ring::Region region;
    if (const int error = region.make(name, size, ring::Pages::present); error < 0)
        throw Failure(fmt::format("{} of shared memory for the {}: {}", bytes(size), name, std::strerror(-error)));
    return region;
}

// So that a page which is never sent shows.
void fill(const ring::Region &memory)
{
    auto *words = memory.map.as<std::uint64_t>();
    for (std::uint64_t i = 0; i < memory.map.size() / sizeof *words; ++i)
        words[i] = mix(i);
}

} // namespace

void end_failed(Control &control, std::string_view sentence)
{
    std::uint32_t none = 0;
    if (control.failure.compare_exchange_strong(none, 1, std::memory_order_relaxed)) {
        const std::size_t size = std::min(sentence.size(), sizeof control.sentence - 1); // the block was zeroed
        std::memcpy(control.sentence, sentence.data(), size);
        control.failure.store(2, std::memory_order_release); // pairs with Children::epitaph
    }
    ::_exit(EXIT_FAILURE);
}

Shared::Shared(const Options &o, Plan p)
    : options(o), plan(std::move(p)), source(make("source memory", o.memory)),
      destination(make("destination memory", o.memory)),
      journal_memory(make("journal", o.pages() * sizeof(Journal::Slot))),
      control_memory(make("control block", sizeof(Control))), control(*control_memory.map.as<Control>()),
      journal({journal_memory.map.as<Journal::Slot>(), o.pages()}), source_bell(control.source_asleep),
      mapper_bell(control.mapper_asleep)
{
    for (unsigned i = 0; i < o.devices; ++i)
        device_bells.emplace_back(control.device_asleep[i]);
    fill(source);
}

} // namespace dirtyring::migrate
