#!/bin/bash
# check_needed.sh LIBRARY [SANITIZERS]: fails if the library links anything but libc. 77: skipped.
set -euo pipefail

if [ -n "${2-}" ]; then
    echo "skipped: under $2 the library links the sanitizers' runtimes"
    exit 77
fi
needed=$(readelf -d "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')
! grep -vE '^(libc\.so\.6|ld-linux.*)$' <<<"$needed"
