// Finds the worker of a supervisor, which reaps the one before it only when this one has been started.
#pragma once

#include <fstream>
#include <string>
#include <sys/types.h>

namespace dirtyring::migrate {

// Of the parent's first thread; 0: none. The kernel lists children from the oldest to the newest, dead ones that are
// not reaped among them.
inline pid_t newest_child(pid_t parent)
{
    const std::string pid = std::to_string(parent);
    std::ifstream children("/proc/" + pid + "/task/" + pid + "/children");
    pid_t newest = 0;
    for (pid_t child = 0; children >> child;)
        newest = child;
    return newest;
}

} // namespace dirtyring::migrate
