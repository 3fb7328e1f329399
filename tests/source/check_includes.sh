#!/bin/bash
# check_includes.sh DIR: fails, naming file:line, on an #include below DIR that the folders' rules forbid.
# check_includes.sh --self-test: fails if that would let a violation pass.
set -euo pipefail

# folder: a pattern (ERE) of what may not be included in it
rules='
iommu            (ring|service|client|tests)/
ring             (iommu|service|client|tests)/
client           (service|tests|boost)/|rte_
service          (client|tests)/
service/engine   service/(walkers|commands|guests|control|keeper)/
service/walkers  service/(commands|guests|control|keeper)/
service/commands service/(guests|control|keeper)/
service/guests   service/control/
service/keeper   iommu/|service/(engine|walkers|commands|guests|control)/
perf             tests/
'

check()
{
    local folder forbidden bad=0
    while read -r folder forbidden; do
        [ -d "$1/$folder" ] || continue
        # An include may be relative: any number of ../ stands before the folder's name.
        if grep -rnE --include='*.h' --include='*.hpp' --include='*.c' --include='*.cpp' \
            "^[[:space:]]*#[[:space:]]*include[[:space:]]*[<\"](\.\.?/)*($forbidden)" "$1/$folder"; then
            bad=1
        fi
    done <<<"${rules:1:-1}"
    return $bad
}

self_test()
{
    local folder text failed=0
    dir=$(mktemp -d)
    trap 'rm -r "$dir"' EXIT
    while read -r folder text; do
        mkdir -p "$dir/$folder/sub"
        printf '#pragma once\n%s\n' "$text" >"$dir/$folder/sub/a.hpp"
        case $text in
        *allowed) check "$dir" >/dev/null || { echo "red on: $folder: $text"; failed=1; } ;;
        *) [[ $(check "$dir") == "$dir/$folder/sub/a.hpp:2:"* ]] || { echo "green on: $folder: $text"; failed=1; } ;;
        esac
        rm "$dir/$folder/sub/a.hpp"
    done <<'END'
iommu   #include "ring/layout.h"
iommu   # include <client/dirtyring.h>
iommu   #include "../../service/engine/shard.hpp"
ring      #include "iommu/layout.h"
ring    #include "tests/fixture.hpp"
client  #include <rte_ring.h>
client  #include <boost/lockfree/queue.hpp>
client  #include "service/engine/shard.hpp"
service #include "tests/fixture.hpp"
service/engine   #include "service/walkers/walker.hpp"
service/walkers  #include "service/commands/commands.hpp"
service/commands #include "service/guests/guest.hpp"
service/guests   #include "service/control/control.hpp"
service/keeper   #include "service/control/options.hpp"
service/control  #include "service/keeper/supervisor.hpp" // allowed
perf    #include "tests/fixture.hpp"
iommu   #include "iommu/layout.h" // allowed
ring    // #include "iommu/layout.h" allowed
client  #include "iommu/layout.h" // allowed
service #include <rte_lcore.h> // allowed
END
    return $failed
}

case $#:${1-} in
1:--self-test) self_test ;;
1:*) check "$1" ;;
*) echo "usage: check_includes.sh DIR | --self-test" >&2; exit 2 ;;
esac
