#!/usr/bin/env bash
# Runs every kernel test, a split answer against the whole model's, and the bench on GPU 0, and writes
# a line to cuda/HARDWARE.md. Needs a driver and the built programs, and no compiler:
#
#     cargo test -p hat-cuda --test kernels --no-run        # prints the path of KERNELS
#     cargo build --release -p hat-engine
#     cargo bench -p hat-benches --bench cuda --no-run      # prints the path of BENCH
#     cuda/run-on-gpu.sh KERNELS target/release/hat-engine BENCH [data sheet's dense f16 TFLOP/s]
#
# The second answer is on the default model's bundle, which `hat-engine pull` makes.
set -euo pipefail
kernels=$(realpath "${1:?the test program of the kernels}")
engine=$(realpath "${2:?hat-engine}")
bench=$(realpath "${3:?the bench}")
tflops=${4:-}
cd "$(dirname "${BASH_SOURCE[0]}")"

log=$(mktemp)
trap 'rm -f "$log"' EXIT
verdict=passed
skip=(--skip on_driver --skip sanitizer --skip artefacts)
HAT_TEST_GPU=0 "$kernels" "${skip[@]}" 2>&1 | tee "$log" || verdict=FAILED

memcheck="compute-sanitizer is not here"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
        if HAT_TEST_GPU=0 compute-sanitizer --tool "$tool" --error-exitcode 9 "$kernels" \
            --test-threads 1 "${skip[@]}"; then
            memcheck="$tool clean"
        else
            memcheck="$tool FAILED"
            verdict=FAILED
            break
        fi
    done
fi

# Losslessness within CUDA: token ids and logits of device and cloud, and of the whole model.
answer() {
    "$engine" generate --processor cuda --json --ignore-eos --max-tokens 64 "$@" \
        -p "Write a short story about a lighthouse keeper." | tail -n 1 |
        grep -o '"logits_blake3":[^,}]*'
}
lossless=FAILED
if split=$(answer) && whole=$(answer --whole) && [ -n "$split" ] && [ "$split" = "$whole" ]; then
    lossless="split = whole"
else
    verdict=FAILED
fi

gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader -i 0 || echo unknown)
hash=$(sha256sum kernels/gen/manifest.json | cut -c1-16)
{
    echo
    echo '| Date | GPU, driver | Artefacts | Tests | Sanitizer |'
    echo '|---|---|---|---|---|'
    echo "| $(date -u +%F) | $gpu | $hash | $(grep -c '\.\.\. ok' "$log") tests $verdict, $lossless | $memcheck |"
    echo
    echo '```'
    "$bench" --gpu 0 ${tflops:+--tflops "$tflops"}
    echo '```'
} | tee -a HARDWARE.md
[ "$verdict" = passed ]
