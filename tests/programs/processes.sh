#!/bin/bash
# Whole programs, as their users run them: processes.sh CASE BIN TRACES, with CASE one of the functions below; --list
# names them.
set -euo pipefail

fail()
{
    echo "FAILED: $*" >&2
    exit 1
}

# A session of its own, so that what is still running at the end is ours.
[ -n "${PROCESSES_SESSION-}" ] || [ "${1-}" = --list ] || PROCESSES_SESSION=1 exec setsid --wait "$0" "$@"

# 100 times over, beside others (tests/run.sh --full): what takes long only to show more of the same is cut.
repeated=${DIRTYRING_REPEATED-}

# Everything a case writes lives in $dir; what it leaves elsewhere is a failure.
dir=$(mktemp -d)
service=
clean_up()
{
    pkill -TERM -s 0 -x 'dirtyringd?' || true
    pkill -CONT -s 0 -x 'dirtyringd?' || true
    rm -rf "$dir"
}
trap clean_up EXIT

# expect CODE SENTENCE COMMAND...: the exit code, and one line on stderr that matches the extended regular expression.
expect()
{
    local code=$1 sentence=$2 got=0
    shift 2
    "$@" >"$dir/out" 2>"$dir/err" || got=$?
    [ "$got" = "$code" ] || fail "exit code $got, expected $code, of: $* ($(cat "$dir/err"))"
    grep -qE -- "$sentence" "$dir/err" || fail "no '$sentence' on stderr of: $* ($(cat "$dir/err"))"
    no_remains "$*"
}

no_remains()
{
    local left
    left=$(find /dev/shm -name '*dirtyring*' 2>/dev/null)
    [ -z "$left" ] || fail "left in /dev/shm: $left, by: $1"
    left=$(find "$TMPDIR" -mindepth 1 2>/dev/null)
    [ -z "$left" ] || fail "left in the temporary directory: $left, by: $1"
    left=$(pgrep -s 0 -x 'dirtyringd?' | grep -vx "${service:-none}" || true)
    [ -z "$left" ] || fail "still running: $left, after: $1"
}

# value JSON KEY: a number of the closing results.
value()
{
    grep -oE "\"$2\": *[0-9.]+" "$1" | head -n 1 | grep -oE '[0-9.]+$'
}

at_least()
{
    awk -v have="$(value "$1" "$2")" -v want="$3" 'BEGIN { exit !(have >= want) }' ||
        fail "$2 is $(value "$1" "$2"), expected at least $3"
}

# judged SPACE NAME OPTION...: a migration under a trace, both judges, and cmp.
judged()
{
    local space=$1 name=$2
    shift 2
    "$bin/dirtyring" migrate --memory 512M --trace "$traces/$name.trace.gz" --loops 0 --space "$space" \
        --ram-dir "$dir" \
        --json "$dir/json" "$@"
    cmp "$dir/source.ram" "$dir/destination.ram"
    local key
    for key in differing_pages unreported_writes; do
        [ "$(value "$dir/json" $key)" = 0 ] || fail "$key is not 0"
    done
    no_remains migrate
}

# The same, in three rounds at least, and a thousand runs while devices were writing: the second round takes longer than
# a trace is quiet. Devices that a busy machine leaves without a processor for so long need no third; then once more.
trace()
{
    [ -z "$repeated" ] || { judged "$@" --speed 30 --bandwidth 1G --downtime-limit 20; return; }
    for _ in 1 2 3; do
        case $2 in
        *-viommu) judged "$@" --speed 20 --bandwidth 250M --downtime-limit 10 ;;
        *) judged "$@" --speed 10 --bandwidth 300M --downtime-limit 20 ;;
        esac
        [ "$(value "$dir/json" rounds)" -lt 3 ] || break
    done
    at_least "$dir/json" rounds 3
    at_least "$dir/json" runs_while_writing 1001
}

# The same, slowly enough for twenty workers of the service to die meanwhile.
killed()
{
    [ -z "$repeated" ] || { judged "$@" --speed 10 --bandwidth 300M --downtime-limit 50 --kill-service 100; return; }
    judged "$@" --speed 5 --bandwidth 180M --downtime-limit 50 --kill-service 100
    at_least "$dir/json" service_kills 20
    at_least "$dir/json" runs_while_writing 1001
}

migrate_oa() { trace oa guest-md5sum; }
migrate_iova() { trace iova guest-md5sum; }
migrate_viommu_oa() { trace oa guest-md5sum-viommu; }
migrate_viommu_iova() { trace iova guest-md5sum-viommu --ring-entries 1024; }
migrate_killed_oa() { killed oa guest-md5sum --devices 2; }
migrate_killed_viommu_oa() { killed oa guest-md5sum-viommu; }
migrate_killed_viommu_iova() { killed iova guest-md5sum-viommu --ring-entries 1024; }
migrate_devices_and_shards() { trace oa guest-md5sum --devices 2 --ring-entries 64; }

# The same load in page tables of each other format.
of_format()
{
    "$bin/dirtyring" migrate --memory 256M --pattern hotset --rate 20000 --seconds 1 --bandwidth 400M \
        --format "$@" --json "$dir/json"
    grep -q "\"format\": \"$1\"" "$dir/json" || fail "the results name another format"
    at_least "$dir/json" runs_while_writing 100
    no_remains "migrate --format $1"
}

migrate_vtdss() { of_format vtdss --leaf 1G --split eager; }
migrate_smmuv3s2() { of_format smmuv3s2 --space iova --leaf 2M --split lazy; }
migrate_smmuv3s1() { of_format smmuv3s1 --devices 2 --shards 2; }
# Leaves of all sizes, tables of more levels than needed, and Dirty bits from the start.
migrate_always_on()
{
    of_format amdv1 --always-on --leaf 2M --all-sizes --split lazy --levels 5 --space iova --devices 2
}
migrate_smmuv3_bbml() { of_format smmuv3s2 --bbml 1 --leaf 1G --split eager; }
# A GiB whose lowest tables come to be all there, the last of them since a worker died.
migrate_split_full_killed()
{
    local rounds=8
    [ -z "$repeated" ] || rounds=1
    "$bin/dirtyring" migrate --memory 1028M --pattern uniform --rate 5000 --bandwidth 1G --leaf 2M --split lazy \
        --max-rounds $rounds --kill-service 20 --json "$dir/json"
    at_least "$dir/json" service_kills 5
    no_remains migrate_split_full_killed
}
# Large leaves under the vIOMMU's maps, and killed.
migrate_split() { trace oa guest-md5sum-viommu --leaf 2M --split eager; }
migrate_split_killed() { killed iova guest-md5sum --leaf 1G --split lazy --format vtdss; }

migrate_synthetic()
{
    local pattern
    for pattern in sequential uniform hotset; do
        "$bin/dirtyring" migrate --memory 64M --pattern $pattern --rate 20000 --devices 2 --seconds 1 --bandwidth 100M
    done
    no_remains synthetic
}

# What tracking saves: bytes against the fallback for devices that cannot be tracked.
migrate_untracked()
{
    local load=(--memory 256M --pattern hotset --rate 5000 --seconds 1 --bandwidth 400M)
    "$bin/dirtyring" migrate "${load[@]}" --json "$dir/tracked"
    "$bin/dirtyring" migrate "${load[@]}" --json "$dir/untracked" --tracking none --no-device-tracking
    at_least "$dir/untracked" bytes_sent $((2 * 256 * 1024 * 1024))
    at_least "$dir/untracked" bytes_sent "$(value "$dir/tracked" bytes_sent)"
}

# comes WHAT COMMAND...: until it succeeds.
comes()
{
    local what=$1
    shift
    for _ in $(seq 1200); do
        ! "$@" >/dev/null 2>&1 || return 0
        sleep 0.05
    done
    fail "$what did not come"
}

start_service()
{
    "$bin/dirtyringd" --socket-path "$dir/socket" --log-level warn "$@" &
    service=$!
    # Its file is there a moment before it listens: 00010000 is __SO_ACCEPTCON.
    comes "the service's socket" grep -q " 00010000 .* $dir/socket\$" /proc/net/unix
}

stop_service()
{
    kill "$service"
    wait "$service" || fail "the service ended with $?"
    service=
    [ ! -e "$dir/socket" ] || fail "the service left its socket"
}

migrate_with_running_service()
{
    start_service --walkers 2
    local i
    for i in 1 2; do
        "$bin/dirtyring" migrate --memory 64M --pattern uniform --seconds 0.5 --shards 1 --socket-path "$dir/socket"
    done
    stop_service
}

# What a walker that stands still will report is not known to fit, so the guest is not stopped meanwhile.
migrate_beside_a_walker_that_lags()
{
    start_service
    "$bin/dirtyring" migrate --memory 512M --trace "$traces/guest-md5sum.trace.gz" --loops 0 --speed 10 \
        --bandwidth 300M \
        --downtime-limit 20 --socket-path "$dir/socket" >"$dir/out" &
    local migration=$!
    comes "the first round" grep -q '^round 1: copied' "$dir/out"
    kill -STOP "$service"
    comes "the end of the first round" grep -q '^round 1: sent' "$dir/out"
    sleep 4 # a second round, and a line each second
    ! grep '^guest stopped' "$dir/out" || fail "the guest was stopped before anybody knew what was left"
    kill -CONT "$service"
    wait "$migration" || fail "the migration ended with $?"
    stop_service
}

bad_input()
{
    local tool=("$bin/dirtyring" migrate) trace
    echo "12 W zz 8" >"$dir/wrong.trace"
    echo "12 W ffffff000 8" >"$dir/outside.trace"
    head -c 1000 "$traces/guest-md5sum.trace.gz" >"$dir/truncated.trace.gz"
    : >"$dir/empty.trace"
    expect 2 'wrong.trace:1: ' "${tool[@]}" --trace "$dir/wrong.trace"
    expect 2 'outside.trace' "${tool[@]}" --trace "$dir/outside.trace" --memory 64M
    expect 2 'truncated.trace.gz' "${tool[@]}" --trace "$dir/truncated.trace.gz"
    expect 2 'empty.trace' "${tool[@]}" --trace "$dir/empty.trace"
    expect 2 'missing.trace' "${tool[@]}" --trace "$dir/missing.trace"
    expect 2 'memory' "${tool[@]}" --memory 0
    expect 2 'memory' "${tool[@]}" --memory 100000T
    expect 2 'memory' "${tool[@]}" --memory lots
    expect 2 'pattern' "${tool[@]}" --pattern zigzag
    expect 2 'amdv1.*vtdss' "${tool[@]}" --format sv48
    expect 2 'no-such' "${tool[@]}" --no-such-option
    expect 2 'bbml' "${tool[@]}" --bbml 1 --format vtdss
    expect 2 'bbml' "${tool[@]}" --bbml 3 --format smmuv3s1
    expect 2 'always-on' "${tool[@]}" --always-on --tracking none
    expect 1 'levels is 2, expected 3 to 5' "${tool[@]}" --memory 64M --seconds 0.2 --levels 2 --format vtdss
    expect 2 'kill-service' "${tool[@]}" --kill-service 0
    expect 2 'kill-service' "${tool[@]}" --kill-service 100 --tracking none
    expect 2 'excludes' "${tool[@]}" --kill-service 100 --socket-path "$dir/socket"
    expect 2 '' "$bin/dirtyring" nonsense
    expect 1 'device [0-9]+ \(dma-0\) does not set Dirty bits.*--tracking none' \
        "${tool[@]}" --memory 64M --no-device-tracking --seconds 1
    expect 1 '"dma-0" does not set Dirty bits.*--tracking none' \
        "${tool[@]}" --memory 64M --no-device-tracking --seconds 1 --format smmuv3s2
    expect 1 'nobody-listens' "${tool[@]}" --memory 64M --socket-path "$dir/nobody-listens"
    expect 2 'wrong.trace' "${tool[@]}" --memory 64M --seconds 0.2 --ram-dir "$dir/wrong.trace/x"
    expect 2 'no-such-dir' "${tool[@]}" --memory 64M --seconds 0.2 --json "$dir/no-such-dir/json"
}

# Without permission on the socket; needs to be root to become somebody else.
no_permission()
{
    [ "$(id -u)" = 0 ] || { echo "SKIPPED: not root, so nobody else to be"; exit 77; }
    chmod 755 "$dir"
    start_service
    chmod 600 "$dir/socket"
    expect 1 'socket.*[Pp]ermission denied' setpriv --reuid=65534 --clear-groups "$bin/dirtyring" migrate --memory 64M \
        --seconds 0.2 --socket-path "$dir/socket"
    stop_service
}

two_services_one_socket()
{
    start_service
    local got=0
    "$bin/dirtyringd" --socket-path "$dir/socket" 2>"$dir/err" || got=$?
    [ $got = 1 ] && grep -q 'another service is listening' "$dir/err" ||
        fail "the second service: exit code $got, $(cat "$dir/err")"
    "$bin/dirtyring" migrate --memory 16M --pattern uniform --seconds 0.2 --socket-path "$dir/socket"
    stop_service
}

# A migration of some seconds, in a session of its own. Bash ignores interrupts in its name; it has begun when it blocks
# them itself.
start_migration()
{
    setsid "$bin/dirtyring" migrate --memory 256M --pattern uniform --bandwidth 50M "$@" >"$dir/out" 2>"$dir/err" &
    migration=$!
    comes "a migration" awk \
        '/^Name:/ { name = $2 } /^SigBlk:/ { ints = $2 ~ /[2367abef]$/ } END { exit !(name == "dirtyring" && ints) }' \
        "/proc/$migration/status"
}

ends_with_1()
{
    local got=0
    wait "$migration" || got=$?
    [ $got = 1 ] || fail "exit code $got after $1: $(cat "$dir/err")"
    [ "$(grep -c . "$dir/err")" = 1 ] || fail "expected one sentence after $1, got: $(cat "$dir/err")"
    [ -z "$(pgrep -s "$migration" || true)" ] || fail "still running after $1: $(pgrep -s "$migration" -a)"
    no_remains "$1"
}

# Ctrl-C at different moments: all processes of the run get it, as from a terminal.
interrupted()
{
    local i early=(1 3 8 20 60) late=(1 3 7)
    [ -z "$repeated" ] || { early=($((RANDOM % 70))); late=($((RANDOM % 9))); }
    for i in "${early[@]}"; do
        start_migration --ram-dir "$dir"
        sleep "$(awk "BEGIN { print $i / 50 }")"
        kill -INT -- "-$migration"
        ends_with_1 "an interrupt at $i/50 s"
    done
    for i in "${late[@]}"; do
        start_migration --kill-service 30
        sleep "$(awk "BEGIN { print 1 + $i / 100 }")"
        kill -INT -- "-$migration"
        ends_with_1 "an interrupt $i/100 s later, while workers are killed"
    done
}

# One part of a run dies: the others end, and one sentence says which.
a_part_killed()
{
    local part
    for part in dirtyringd destination source device; do
        start_migration
        sleep 0.8
        comes "$part" pgrep -P "$migration" "^$part"
        kill -KILL "$(pgrep -P "$migration" "^$part")"
        ends_with_1 "the kill of $part"
    done
}

# The four words that an example begins with: words.
said()
{
    comes "what $1 says" grep -qE '^[^ ]+ [^ ]+ [^ ]+ [^ ]+' "$1"
    read -r -a words <"$1"
}

examples()
{
    start_service
    "$bin/vmm" "$dir/socket" 100 >"$dir/vmm" &
    local vmm=$! words
    said "$dir/vmm"
    "$bin/device" "$dir/socket" "${words[1]}" "${words[3]}" 1000 1
    wait $vmm || fail "vmm ended with $?"

    "$bin/uring_consumer" "$dir/socket" 100 >"$dir/consumer" &
    vmm=$!
    said "$dir/consumer"
    "$bin/device" "$dir/socket" "${words[1]}" "${words[3]}" 1000 1
    wait $vmm || fail "uring_consumer ended with $?"
    stop_service
}

file_reader()
{
    start_service
    "$bin/vmm" "$dir/socket" 1 >"$dir/vmm" &
    local vmm=$! words
    said "$dir/vmm"
    local reader=("$bin/file_reader" "$dir/socket" "${words[1]}" "${words[3]}")
    head -c 16M /dev/urandom >"$dir/file"
    expect 2 'usage' "$bin/file_reader"
    expect 2 'usage' "$bin/file_reader" "$dir/socket" xyz "${words[3]}" 0 "$dir/file"
    local word
    for word in 0 1025 -1 lots; do
        expect 2 'usage' "${reader[@]}" 0 "$dir/file" $word
    done
    expect 2 'usage' "${reader[@]}" somewhere "$dir/file"
    expect 1 'no-such-file: No such file' "${reader[@]}" 0 "$dir/no-such-file"
    expect 1 'attach: no guest has this token' \
        "$bin/file_reader" "$dir/socket" "${words[1]//[0-9]/a}" "${words[3]}" 0 "$dir/file"
    expect 1 'pin: DMA write at iova 0x4000000: no translation' "${reader[@]}" 0x4000000 "$dir/file"
    "${reader[@]}" 0x1000 "$dir/file" >"$dir/out" || fail "file_reader ended with $?"
    grep -q '^read 16777216 bytes, at most 64 reads in flight$' "$dir/out" || fail "file_reader says: $(cat "$dir/out")"
    wait $vmm || fail "vmm ended with $?"
    stop_service
}

# The programs keep to ring/SPEC.md, however they are found.
conformance()
{
    "$bin/dirtyring" check --json "$dir/json" >"$dir/out" || fail "a MUST failed: $(grep -A3 '^fail' "$dir/out")"
    [ "$(value "$dir/json" fail)" = 0 ] || fail "the JSON says otherwise"
    no_remains check
    start_service
    "$bin/dirtyring" check service --socket-path "$dir/socket" >"$dir/out" || fail "$(grep -A3 '^fail' "$dir/out")"
    stop_service
    "$bin/dirtyring" check service --program "$bin/dirtyringd --socket-path {socket} --walkers 2" >"$dir/out" ||
        fail "$(grep -A3 '^fail' "$dir/out")"
    expect 1 'nobody-listens' "$bin/dirtyring" check service --socket-path "$dir/nobody-listens"
    expect 1 'exit code 1' "$bin/dirtyring" check service --program false
    expect 2 'excludes' "$bin/dirtyring" check service --socket-path a --program b
    expect 2 'no-such-dir' "$bin/dirtyring" check --json "$dir/no-such-dir/json"
    expect 2 'frobnicate' "$bin/dirtyring" check frobnicate
}

cases=(migrate_oa migrate_iova migrate_viommu_oa migrate_viommu_iova migrate_killed_oa migrate_killed_viommu_oa
    migrate_killed_viommu_iova migrate_split migrate_split_killed migrate_devices_and_shards migrate_vtdss
    migrate_smmuv3s2 migrate_smmuv3s1 migrate_always_on migrate_smmuv3_bbml migrate_split_full_killed
    migrate_synthetic migrate_untracked migrate_with_running_service
    migrate_beside_a_walker_that_lags bad_input no_permission two_services_one_socket interrupted a_part_killed
    examples file_reader conformance)
if [ "${1-}" = --list ]; then
    printf '%s\n' "${cases[@]}"
    exit 0
fi
[ $# = 3 ] || { echo "usage: processes.sh CASE BIN TRACES" >&2; exit 2; }
bin=$2
traces=$3
# The tool's own temporary files go where the case can see what is left.
mkdir "$dir/tmp"
export TMPDIR=$dir/tmp
"$1"
