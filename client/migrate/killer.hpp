// --kill-service: a process that kills the service's worker again and again, by SIGKILL. The supervisor starts another
// one each time, and nobody else may notice more than a pause.
#pragma once

#include "client/migrate/shared.hpp"

#include <sys/types.h>

namespace dirtyring::migrate {

// Until the migration has finished. Throws Failure when a worker dies of anything else.
void kill_workers(Shared &shared, pid_t supervisor);

} // namespace dirtyring::migrate
