#!/bin/bash
# check_width.sh DIR: fails, naming file:line, on a line of more than 120 columns below DIR, as .editorconfig sets them.
# Rows of Markdown tables cannot be broken, and drawings are not written by hand: those may be longer.
# check_width.sh --self-test: fails if that would let one pass.
set -euo pipefail

check()
{
    ! LC_ALL=C.UTF-8 grep -rnIP --exclude-dir=build --exclude-dir=.git --exclude='*.svg' '^(?!\|).{121}' "$1"
}

self_test()
{
    dir=$(mktemp -d)
    trap 'rm -r "$dir"' EXIT
    local line
    line=$(printf 'ä%.0s' {1..120})
    printf '%s\n' "$line" "| $line |" >"$dir/a.md"
    check "$dir" >/dev/null || { echo "red on 120 columns, or on a row of a table"; return 1; }
    printf '%s!\n' "$line" >"$dir/b.md"
    [[ $(check "$dir") == "$dir/b.md:1:"* ]] || { echo "green on 121 columns"; return 1; }
}

case $#:${1-} in
1:--self-test) self_test ;;
1:*) check "$1" ;;
*) echo "usage: check_width.sh DIR | --self-test" >&2; exit 2 ;;
esac
