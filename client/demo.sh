#!/bin/bash
# Four live migrations while devices write: two recorded guests, without and with a vIOMMU, a synthetic hot set, and a
# recorded guest again while the service is killed every 100 ms.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/packages.sh

echo "building…"
cmake --preset release >/dev/null
cmake --build --preset release --parallel "$(nproc)" --target dirtyringd dirtyring_tool -- --quiet

migrate()
{
    echo
    echo "\$ dirtyring migrate $*"
    build/release/bin/dirtyring migrate "$@"
}
migrate --memory 512M --trace perf/traces/guest-md5sum.trace.gz --speed 10 --loops 0 --bandwidth 300M \
    --downtime-limit 20
migrate --memory 512M --trace perf/traces/guest-md5sum-viommu.trace.gz --speed 10 --loops 0 \
    --bandwidth 300M --downtime-limit 20 --format smmuv3s1
migrate --memory 256M --pattern hotset --devices 2 --rate 20000 --seconds 3 --bandwidth 200M \
    --downtime-limit 20 --format vtdss --leaf 1G --split eager
migrate --memory 512M --trace perf/traces/guest-md5sum-viommu.trace.gz --speed 3 --loops 0 \
    --bandwidth 150M --downtime-limit 50 --kill-service 100 --format smmuv3s2
