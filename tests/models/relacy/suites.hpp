// All suites; each is the function of its name.
#pragma once

#include "tests/models/relacy/suite.hpp"

namespace dirtyring::model {

Suite section();
Suite tag();
Suite leaving();
Suite summary();
Suite sync();
Suite doorbell();
Suite pin_bell();
Suite kick();
Suite call();
Suite table();
Suite tracking();
Suite ring();
Suite header();
Suite pin_unmap();
Suite pin_sync();
Suite slot();
Suite closing();

} // namespace dirtyring::model
