// Schedules that went wrong once, as the search printed them.
#include "tests/search/replay.hpp"

namespace dirtyring::search {
namespace {

// A device died between D and the summary while ENABLE cleaned an hwpt that is always on.
TEST(Search, DeviceDiesWhileEnableCleans)
{
    replay({2, 11, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1},
           {
               {0, 42},                      // the VMM submits 14: ENABLE
               {0, 0, 5},                    // the home walker looks at commands
               {},                           // shard 0 takes a step
               {},                           // shard 0 takes a step
               {0, 41, 0, 0, 3, 0, 0, 0, 3}, // device 3 writes 0x7fe00000 and dies between D and the summary
               {0, 7},                       // shard 0 is told of device 3
           });
}

} // namespace
} // namespace dirtyring::search
