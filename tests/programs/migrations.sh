#!/bin/bash
# Migrations one after the other, with all options of `dirtyring migrate` drawn at random; each must pass its judges.
# The options repeat with the seed, who is first does not. One that fails is printed so that it can be repeated, and the
# next one goes on.
# DIRTYRING_FULL=1 in the environment: until the time is up, whatever --count says.
# Exit codes: 0 all passed, 1 one failed, 2 wrong usage.
set -euo pipefail

usage()
{
    cat <<'END'
usage: migrations.sh [--seconds S] [--count N] [--seed N] [--bin DIR] [--traces DIR]
  --seconds S   begin none after so long (900)
  --count N     so many at most; 0: until the time is up (0)
  --seed N      of the options (drawn)
  --bin DIR     where dirtyring and dirtyringd are (build/dev/bin)
  --traces DIR  where the traces are (perf/traces)
END
    exit "$1"
}

root=$(readlink -f "$(dirname "$0")/../..")
seconds=900 count=0 seed=$((RANDOM % 10000)) bin=$root/build/dev/bin traces=$root/perf/traces
while [ $# -gt 0 ]; do
    case $1 in
    --help) usage 0 ;;
    --seconds | --count | --seed)
        [[ ${2-} =~ ^[0-9]{1,4}$ ]] || usage 2 >&2
        printf -v "${1#--}" %d "$((10#$2))"
        ;;
    --bin | --traces)
        [ -d "${2-}" ] || usage 2 >&2
        printf -v "${1#--}" %s "$2"
        ;;
    *) usage 2 >&2 ;;
    esac
    shift 2
done
[ -z "${DIRTYRING_FULL-}" ] || count=0
[ -x "$bin/dirtyring" ] && [ -f "$traces/guest-md5sum.trace.gz" ] || usage 2 >&2

# Draws go to $drawn: a subshell's would come again.
RANDOM=$seed
below() { drawn=$(((RANDOM * 32768 + RANDOM) % $1)); }
one_of()
{
    below $#
    drawn=${*:drawn+1:1}
}
# One time in N.
chance()
{
    below "$1"
    [ "$drawn" = 0 ]
}

# Pages of 4 KiB into $pages, on a logarithmic scale from 1 to 2^20; half of them odd.
draw_pages()
{
    below 21
    local lg2=$drawn
    pages=$((1 << lg2))
    if [ "$lg2" -gt 0 ] && [ "$lg2" -lt 20 ]; then
        below $pages
        pages=$((pages + drawn))
    fi
    if [ "$lg2" -gt 0 ] && chance 2; then
        pages=$((pages - 1 + pages % 2))
    fi
}

draw_load()
{
    draw_pages
    if chance 4; then
        pages=$((pages % 131072 + 131072)) # 512M, as the traces need, and more
        one_of guest-md5sum guest-md5sum-viommu
        options+=(--trace "$traces/$drawn.trace.gz" --loops 0)
        one_of 5 20 50
        options+=(--speed "$drawn")
    else
        one_of sequential uniform hotset
        options+=(--pattern "$drawn")
        one_of 100 1000 5000 20000 100000
        options+=(--rate "$drawn")
        ! chance 4 || options+=(--seconds 1)
    fi
    options+=(--memory $((pages * 4))K)
}

# What takes the memory across within two seconds, or all that there is.
draw_link()
{
    below 4
    if [ "$drawn" = 0 ]; then
        options+=(--bandwidth 0)
    else
        options+=(--bandwidth $((pages * 2 * (drawn + 1) + 1024))K)
    fi
    one_of 0 1 20 300
    options+=(--downtime-limit "$drawn")
    if [ "$pages" -gt 262144 ]; then
        one_of 1 2
    else
        one_of 1 2 4
    fi
    options+=(--max-rounds "$drawn")
}

draw_tables()
{
    one_of amdv1 vtdss smmuv3s2 smmuv3s1
    local format=$drawn
    options+=(--format "$format")
    case $format in
    smmuv3*)
        one_of 0 1 2
        options+=(--bbml "$drawn")
        one_of 0 4
        ;;
    vtdss) one_of 0 4 5 ;;
    *) one_of 0 4 5 6 ;;
    esac
    options+=(--levels "$drawn")
    ! chance 3 || options+=(--always-on)
    one_of 4K 2M 1G
    options+=(--leaf "$drawn")
    ! chance 2 || options+=(--all-sizes)
    if [ "$pages" -gt 131072 ]; then # else each round takes all of it across
        one_of eager lazy
    else
        one_of none eager lazy
    fi
    options+=(--split "$drawn")
}

draw_rings()
{
    one_of oa iova
    options+=(--space "$drawn")
    one_of 1 2 4 16 64
    options+=(--shards "$drawn")
    one_of 8 64 1024 4096 65536
    options+=(--ring-entries "$drawn")
    one_of 0 100 1000 10000
    options+=(--min-interval "$drawn")
    one_of 1 1 2 3 5
    options+=(--devices "$drawn")
    if chance 2; then
        one_of 10 20 50 200
        options+=(--kill-service "$drawn")
    fi
}

output=$(mktemp)
trap 'rm -f "$output"' EXIT
echo "migrations: seed $seed"
began=$SECONDS run=0 failed=0
while [ $((SECONDS - began)) -lt "$seconds" ] && { [ "$count" = 0 ] || [ $run -lt "$count" ]; }; do
    options=()
    draw_load
    draw_link
    draw_tables
    draw_rings
    run=$((run + 1))
    got=0
    timeout 120 "$bin/dirtyring" migrate "${options[@]}" >"$output" 2>&1 || got=$?
    if [ $got != 0 ] || ! grep -q ' 0 pages differ, 0 writes unreported' "$output"; then
        failed=$((failed + 1))
        echo "FAILED with exit code $got: dirtyring migrate ${options[*]}"
        tail -n 20 "$output" | sed 's/^/    /'
    fi
done
echo "migrations: $run in $((SECONDS - began)) s, $failed failed (seed $seed)"
[ $failed = 0 ]
