#!/usr/bin/env bash
# What a GPU has to show: every kernel against its meaning, the backend against the reference and the
# CPU's bits, the split answer against the whole model's, the sanitizers where they are, and the bench.
# Needs a driver and the built programs, and no compiler, network or source:
#
#     cargo test -p hat-cuda --test kernels --no-run                # prints the path of KERNELS
#     cargo test -p hat-engine --test cuda --test cuda_bits --no-run # prints the paths of BACKEND and BITS
#     cargo build --release -p hat-engine
#     cargo bench -p hat-benches --bench cuda --no-run              # prints the path of BENCH
#     cuda/run-on-gpu.sh --kernels KERNELS --backend BACKEND --bits BITS --bench BENCH \
#         --engine target/release/hat-engine [--bundle DIR] [--gpu N] [--out DIR] [--part-max SECONDS] [-- ARGUMENTS OF THE BENCH]
#
# --bundle is a model that is split already; without it, the default one, which `hat-engine pull` makes.
# What was seen is appended to cuda/HARDWARE.md or, with --out, written to DIR/hardware.md; the bench's lines
# and the cost file for hat-sim go beside it. Each part ends after --part-max seconds (600).
set -euo pipefail

gpu=0 part_max=600 bundle='' out='' kernels='' backend='' bits='' engine='' bench=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    [ $# -ge 2 ] || { echo "$1 wants a value" >&2; exit 2; }
    case $1 in
    --kernels) kernels=$(realpath "$2") ;;
    --backend) backend=$(realpath "$2") ;;
    --bits) bits=$(realpath "$2") ;;
    --engine) engine=$(realpath "$2") ;;
    --bench) bench=$(realpath "$2") ;;
    --bundle) bundle=$(realpath "$2") ;;
    --out) mkdir -p "$2" && out=$(realpath "$2") ;;
    --gpu) gpu=$2 ;;
    --part-max) part_max=$2 ;;
    *) echo "$1: no such flag; see the top of this script" >&2; exit 2 ;;
    esac
    shift 2
done
[ $# -eq 0 ] || shift
for program in "$kernels" "$backend" "$bits" "$engine" "$bench"; do
    [ -x "$program" ] || { echo "--kernels, --backend, --bits, --engine, --bench are wanted" >&2; exit 2; }
done
home=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
log=$(mktemp) notes=$(mktemp)
trap 'rm -f "$log" "$notes"' EXIT
verdict=passed

# A part: its words, its seconds, and whether it went well. What it says goes to the terminal and $log.
part() {
    local name=$1 start=$SECONDS status=0
    shift
    echo "== $name"
    timeout "$part_max" "$@" 2>&1 | tee "$log" || status=$?
    echo "== $name: $((SECONDS - start)) s, status $status"
    echo "| $name | $((SECONDS - start)) s | $([ "$status" = 0 ] && echo passed || echo "FAILED ($status)") |" >>"$notes"
    [ "$status" = 0 ] || verdict=FAILED
    return "$status"
}
passed() { awk '/^test result:/ { sum += $4 } END { print sum + 0 }' "$log"; }

# These read sources, or make a driver of their own.
skip=(--skip on_driver --skip sanitizer --skip artefacts --skip mutants)
part "doctor" "$engine" doctor || true
part "kernels" env HAT_TEST_GPU="$gpu" "$kernels" "${skip[@]}" || true
tests=$(passed)
for program in backend bits; do
    part "$program" env HAT_TEST_GPU="$gpu" "${!program}" --test-threads 1 || true
    tests=$((tests + $(passed)))
done
# Weights that stay with the host where the GPU has no memory of its own; rows from GPU to GPU where
# there are two.
real=(on_driver::in_place::weights_are_read_where_the_host_has_them_on_the_gpu)
if [ "$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)" -gt 1 ]; then
    real+=(on_driver::peers::one_gpu_fetches_from_another_on_gpus)
fi
part "host and peers" "$kernels" "${real[@]}" --exact --ignored --nocapture || true
tests=$((tests + $(passed)))
if [ "$tests" = 0 ]; then
    echo "no test has run" >&2
    verdict=FAILED
fi

sanitizer="compute-sanitizer is not here"
if command -v compute-sanitizer >/dev/null; then
    sanitizer=""
    for tool in memcheck racecheck initcheck synccheck; do
        # The shapes of the emulator's tests are small; attention's largest take long enough without.
        if part "$tool" env HAT_TEST_GPU="$gpu" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$kernels" --test-threads 1 "${skip[@]}"; then
            sanitizer+="$tool clean "
        else
            sanitizer+="$tool FAILED "
        fi
    done
fi

# Losslessness within CUDA: token ids and logits of device and cloud, and of the whole model.
answer() {
    "$engine" generate --raw --processor "cuda:$gpu" --json --ignore-eos --max-tokens 64 --wire int8 ${bundle:+--bundle "$bundle"} "$@" \
        -p "Write a short story about a lighthouse keeper." | tail -n 1
}
field() { grep -o "\"$1\":[^]}]*[]}\"]" <<<"$2" | head -n 1; }
lossless() {
    local whole split mode sampled same=0 all=0
    for sampled in "" "--temperature 0.8 --seed 7"; do
        # shellcheck disable=SC2086 # several words
        whole=$(answer --whole $sampled)
        for mode in off lookup chain tree stream; do
            all=$((all + 1))
            # shellcheck disable=SC2086
            split=$(answer --draft "$mode" $sampled) || { echo "$mode $sampled: no answer"; continue; }
            if [ -n "$(field logits_blake3 "$whole")" ] &&
                [ "$(field logits_blake3 "$whole")" = "$(field logits_blake3 "$split")" ]; then
                same=$((same + 1))
            else
                echo "$mode $sampled: other logits"
                echo "  whole $(field token_ids "$whole")"
                echo "  split $(field token_ids "$split")"
            fi
        done
    done
    echo "$same of $all split answers are the whole model's to the bit"
    [ "$same" = "$all" ]
}
export -f answer field lossless
export engine bundle gpu
part "lossless" bash -c lossless || true
same=$(tail -n 1 "$log")

cost=${out:-$home} page=${out:+$out/hardware.md}
page=${page:-$home/HARDWARE.md}
part "bench" "$bench" --gpu "$gpu" --json "$cost/bench-lines.json" --cost-file "$cost/bench-cost.json" "$@" || true

name=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader -i "$gpu" 2>/dev/null || echo unknown)
hash=$(sha256sum "$home/kernels/gen/manifest.json" 2>/dev/null | cut -c1-16 || true)
{
    echo
    echo "| Date | GPU, driver | Artefacts | Tests | Losslessness | Sanitizer |"
    echo "|---|---|---|---|---|---|"
    echo "| $(date -u +%F) | $name | ${hash:-unknown} | $tests tests, all parts $verdict | $same | $sanitizer |"
    echo
    echo "| Part | Time | |"
    echo "|---|---|---|"
    cat "$notes"
    echo
    echo '```'
    cat "$log"
    echo '```'
} >>"$page"
cat "$notes"
echo "$verdict"
[ "$verdict" = passed ]
