#!/bin/bash
# The protocol's models, checked by Spin: check.sh [--full] [--list | --trail] [NAME...]. README.md says what each one
# is.
set -euo pipefail

usage()
{
    echo "usage: ${0##*/} [--full] [--list | --trail] [NAME...]" >&2
    echo "  --full   larger bounds for what must pass (DIRTYRING_FULL=1 does the same)" >&2
    echo "  --list   names, one a line" >&2
    echo "  --trail  replay what Spin found against NAME" >&2
    [ $# -eq 0 ] || echo "${0##*/}: $*" >&2
    exit 2
}

cd "$(dirname "$(readlink -f "$0")")"
full=${DIRTYRING_FULL:-0}
action=run
names=()
while [ $# -gt 0 ]; do
    case $1 in
    --full) full=1 ;;
    --list) action=list ;;
    --trail) action=trail ;;
    -*) usage "unknown option '$1'" ;;
    *) names+=("$1") ;;
    esac
    shift
done
[ "$action" != trail ] || [ ${#names[@]} -eq 1 ] || usage "--trail takes one NAME"

# checks.txt: model, expected verdict, name, flags; what follows '|' takes the place of the flags with --full. A line
# that ends with a backslash goes on with the next: hence no -r.
declare -A model verdict flags
order=()
while read m v n f; do
    case $m in '' | '#'*) continue ;; esac
    if [ "$full" = 1 ] && [[ $f == *'|'* ]]; then f=${f#*|}; else f=${f%%|*}; fi
    order+=("$n") model[$n]=$m verdict[$n]=$v flags[$n]=$f
done <checks.txt
for n in "${names[@]}"; do
    [ -n "${model[$n]-}" ] || usage "no check is named '$n'; --list names them"
done
[ ${#names[@]} -gt 0 ] || names=("${order[@]}")
if [ "$action" = list ]; then
    printf '%s\n' "${names[@]}"
    exit 0
fi

command -v spin >/dev/null || { echo "${0##*/}: skipped: spin is not installed"; exit 77; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

# build NAME: pan, in a directory of its own. A refutation is searched in breadth, so that it is the shortest; it is
# found sooner than gcc would have optimized.
build()
{
    local how=(-O1)
    [ "$full" = 0 ] || how+=(-DCOLLAPSE)
    [ "${verdict[$1]}" = passes ] || how=(-O0 -DBFS)
    rm -rf "$dir/pan"
    mkdir "$dir/pan"
    cp ./*.pml ./*.inc "$dir/pan"
    # shellcheck disable=SC2086 # flags are words
    (cd "$dir/pan" && spin -a ${flags[$1]} "${model[$1]}.pml" >said 2>&1 &&
        gcc -w -DSAFETY -DMEMLIM=2000 "${how[@]}" -o pan pan.c >>said 2>&1) && return
    cat "$dir/pan/said" >&2
    echo "${0##*/}: $1 does not build" >&2
    return 1
}

# search: what pan says goes to $dir/pan/out
search()
{
    (cd "$dir/pan" && timeout 280 ./pan -m100000 >out 2>&1) || true
}

# what: the verdict, of the model's assertions in words
what()
{
    local error
    error=$(sed -nE 's/^pan:[0-9]+: (.*) \(at depth.*/\1/p' "$dir/pan/out" | head -n 1)
    case $error in
    *promised*) echo "refuted: a page is lost, or a pin is not over" ;;
    *need*) echo "refuted: a page is lost" ;;
    *staged* | *sync_done* | 'invalid end state') echo "refuted: a hang" ;;
    *cached_at*) echo "refuted: two sizes within one grace period" ;;
    *memory* | *recorded*) echo "refuted: memory in use is given back" ;;
    *oa* | *unmap_done*) echo "refuted: DMA reaches a page that is not its own" ;;
    ?*) echo "refuted: $error" ;;
    *)
        if grep -q 'errors: 0' "$dir/pan/out" &&
            ! grep -qE 'Search not completed|max search depth too small' "$dir/pan/out"; then
            echo passes
        else
            echo "unfinished: $(grep -m 1 'pan' "$dir/pan/out" || echo 'out of time')"
        fi
        ;;
    esac
}

number()
{
    sed -nE "s/$1/\\1/p" "$dir/pan/out" | tail -n 1
}

# check NAME: one line; false if the verdict is not the one expected
check()
{
    local found ok=ok
    if ! build "$1"; then
        echo "FAILED $1"
        return 1
    fi
    search
    found=$(what)
    [ "${found%%:*}" = "${verdict[$1]}" ] || ok=FAILED
    printf '%-6s %-6s %-30s %9s states, depth %3s, %5.1f s  %s\n' "$ok" "${model[$1]}" "$1" \
        "$(number '^ *([0-9.e+]+) states, stored.*')" "$(number '.*depth reached ([0-9]+).*')" \
        "$(number '.*elapsed time ([0-9.]+) seconds.*')" "$found"
    [ "$ok" = ok ]
}

if [ "$action" = trail ]; then
    name=${names[0]}
    build "$name" || exit 1
    search
    cd "$dir/pan"
    if [ ! -f "${model[$name]}.pml.trail" ]; then
        echo "$name: $(what); nothing to replay"
        exit 0
    fi
    # shellcheck disable=SC2086
    spin -t -p -g -l ${flags[$name]} "${model[$name]}.pml"
    exit 0
fi

failed=0
for n in "${names[@]}"; do
    check "$n" || failed=1
done
exit "$failed"
