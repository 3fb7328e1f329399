// The source VMM: sets up the guest, copies it while it is written, stops it, and copies the rest.
#pragma once

#include "client/migrate/link.hpp"
#include "client/migrate/shared.hpp"

namespace dirtyring::migrate {

// `link` stays open behind a failure: its end would have the destination complain first.
void run_source(Shared &shared, const ring::Fd &link);

} // namespace dirtyring::migrate
