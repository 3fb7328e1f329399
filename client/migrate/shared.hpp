// What the parent makes before it forks and every part inherits: memories, journal, control block, bells.
#pragma once

#include "client/migrate/bell.hpp"
#include "client/migrate/control.hpp"
#include "client/migrate/journal.hpp"
#include "client/migrate/options.hpp"
#include "client/migrate/plan.hpp"
#include "ring/region.hpp"

#include <string_view>
#include <vector>

namespace dirtyring::migrate {

// Leaves the sentence of a failed part for the parent to print (the first one counts) and ends the process, without
// unwinding: its other thread may be at work.
[[noreturn]] void end_failed(Control &control, std::string_view sentence);

// Anonymous memory of all processes; it is gone with the last of them.
struct Shared {
    Shared(const Options &options, Plan plan);

    const Options options;
    const Plan plan;

    ring::Region source;
    ring::Region destination;
    ring::Region journal_memory;
    ring::Region control_memory;
    Control &control;
    Journal journal;

    Bell source_bell;
    Bell mapper_bell;
    std::vector<Bell> device_bells;

    std::string socket_path; // of the service

    void ring_devices() const
    {
        for (const Bell &bell : device_bells)
            bell.ring();
    }
};

} // namespace dirtyring::migrate
