#!/usr/bin/env bash
# Runs every kernel test on GPU 0 and says what for cuda/HARDWARE.md. Needs a driver and the built
# test program (`cargo test -p hat-cuda --test kernels --no-run` prints its path), and no compiler:
#
#     cuda/run-on-gpu.sh path/to/kernels-0123456789abcdef
set -euo pipefail
program=$(realpath "${1:?the test program}")
cd "$(dirname "${BASH_SOURCE[0]}")"

log=$(mktemp)
trap 'rm -f "$log"' EXIT
verdict=passed
HAT_TEST_GPU=0 "$program" --skip on_driver --skip sanitizer --skip artefacts 2>&1 | tee "$log" ||
    verdict=FAILED

memcheck="compute-sanitizer is not here"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
        if HAT_TEST_GPU=0 compute-sanitizer --tool "$tool" --error-exitcode 9 "$program" \
            --test-threads 1 --skip on_driver --skip sanitizer --skip artefacts; then
            memcheck="$tool clean"
        else
            memcheck="$tool FAILED"
            verdict=FAILED
            break
        fi
    done
fi

echo
echo "For cuda/HARDWARE.md:"
echo "| $(date -u +%F) | $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader -i 0 ||
    echo unknown) | $(sha256sum kernels/gen/manifest.json | cut -c1-16) | $(grep -c '\.\.\. ok' "$log") tests $verdict | $memcheck |"
[ "$verdict" = passed ]
