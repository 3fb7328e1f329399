// A device process: replays its load through the hwpt, and keeps the journal.
#pragma once

#include "client/migrate/shared.hpp"

namespace dirtyring::migrate {

void run_device(Shared &shared, unsigned index);

} // namespace dirtyring::migrate
