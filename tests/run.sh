#!/bin/bash
# Builds and tests everything: with gcc, with clang, under the sanitizers. The whole suite comes last, so the output
# ends with its summary.
set -euo pipefail
cd "$(dirname "$0")/.."

usage()
{
    cat >&2 <<EOT
usage: tests/run.sh [--full [PART]]
  --full        soaks at their full length, whole programs 100 times, 1,000 kills, an hour of the search
  --full PART   of that only chaos, migrations, models or search
EOT
    exit 2
}
part=
case $#:${1-} in
0:) ;;
1:--full | 2:--full) export DIRTYRING_FULL=1 part=${2-} ;;
*) usage ;;
esac
case $part in
'' | chaos | migrations | models | search) ;;
*) usage ;;
esac

. tests/packages.sh
jobs=$(nproc)

step()
{
    echo "== $*"
}

# build PRESET [OPTION...]
build()
{
    step "build: $*"
    cmake --preset "$1" >/dev/null
    cmake --build --preset "$@" --parallel "$jobs" -- --quiet
}

step "format"
git ls-files -z -co --exclude-standard '*.h' '*.hpp' '*.c' '*.cpp' | xargs -0 clang-format --dry-run -Werror

# Tests within one process run under the sanitizers, those with one thread not under TSan. With --full all of them run
# everywhere; under TSan those with one thread do so at their usual length, as its shadow of memory that comes and goes
# only grows. TSan is gcc's and AddressSanitizer clang's; gcc's opinion of tests with one thread is asked with --full.
others=(--target others)
not_others=(--label-exclude '^inprocess$' --exclude-regex _NOT_BUILT)
inprocess=(--target inprocess)
[ -z "${DIRTYRING_FULL-}" ] || { others=() not_others=() inprocess+=(inprocess_one_thread); }

if [ -n "$part" ]; then
    build dev
    step "test: dev, $part"
    ctest --preset dev --tests-regex "^$part" --parallel "$jobs"
    exit
fi

build dev "${others[@]}"
build clang "${others[@]}"

# TSan of gcc 12 does not start where the kernel randomises more than 28 bits of addresses.
fixed_addresses=()
! setarch -R true 2>/dev/null || fixed_addresses=(setarch -R)
for preset in tsan asan-ubsan; do
    build $preset "${inprocess[@]}"
    step "test: $preset"
    "${fixed_addresses[@]}" ctest --preset $preset --label-exclude one_thread --parallel "$jobs"
done

if [ -n "${DIRTYRING_FULL-}" ]; then
    step "test: tsan, one thread"
    env -u DIRTYRING_FULL "${fixed_addresses[@]}" ctest --preset tsan --label-regex one_thread --parallel "$jobs"

    step "test: dev, programs, 100 times, many at once, as they wait most of the time; build/dev/repeated.log"
    DIRTYRING_REPEATED=1 ctest --preset dev --label-regex processes --repeat until-fail:100 --parallel $((8 * jobs)) \
        --quiet --output-log "$PWD/build/dev/repeated.log" ||
        { grep -E 'Failed|Timeout|tests failed' build/dev/repeated.log; exit 1; }
    tail -n 12 build/dev/repeated.log | grep -E 'tests passed|Total'
fi

step "test: dev"
ctest --preset dev "${not_others[@]}" --parallel $((2 * jobs))
