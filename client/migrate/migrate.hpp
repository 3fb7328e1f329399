// `dirtyring migrate`: a guest migrates live, in real processes, while its devices keep writing.
#pragma once

#include "client/migrate/options.hpp"

namespace dirtyring::migrate {

// Throws BadInput before anything has begun, Failure when a part failed or a judge is not satisfied.
void migrate(const Options &options);

} // namespace dirtyring::migrate
