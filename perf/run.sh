#!/bin/bash
# Builds release, takes all figures, writes perf/REPORT.md and perf/plots/. The output ends with the table.
set -euo pipefail

usage()
{
    echo "usage: perf/run.sh [--quick] [--json FILE]    --quick: fewer turns, within 10 minutes" >&2
    exit 2
}
effort=full
json=
while [ $# -gt 0 ]; do
    case $1 in
    --quick) effort=quick ;;
    --json)
        [ $# -ge 2 ] || usage
        json=$(realpath -m -- "$2")
        shift
        ;;
    *) usage ;;
    esac
    shift
done
cd "$(dirname "$0")/.."

. tests/packages.sh
echo "== build: release"
cmake --preset release >/dev/null
cmake --build --preset release --target figures --parallel "$(nproc)" -- --quiet

results=$(mktemp -d)
trap 'rm -r "$results"' EXIT
programs=(scan ring device pagemap kvm_ring latency stop_copy maps memory walkers calls)
files=()
for program in "${programs[@]}"; do
    echo "== $program"
    options=(--json "$results/$program.json")
    [ $effort = full ] || options+=(--quick)
    "build/release/bin/perf_$program" "${options[@]}"
    files+=("$results/$program.json")
done
echo "== soak"
seconds=120
[ $effort = full ] || seconds=20
build/release/bin/soak --seconds $seconds --json "$results/soak.json"
files+=("$results/soak.json")

commit=$(git rev-parse --short HEAD)
[ -z "$(git status --porcelain --untracked-files=no -- . ':!perf/REPORT.md' ':!perf/plots')" ] || commit+=" and changes"
mkdir -p perf/plots
echo "== report"
build/release/bin/perf_report --effort $effort --commit "$commit" --report perf/REPORT.md --notes perf/notes.md \
    --plots perf/plots ${json:+--json "$json"} "${files[@]}"
