#!/usr/bin/env bash
# What a GPU has to show, in the order of its worth and within a budget. Needs a driver, and of this tree
# only the folder that cuda/pack.sh made: no compiler, network or source.
#
#     DIR/run-on-gpu.sh [--gpu N] [--budget SECONDS] [--out FOLDER] [--parts "NAME .."] [--tokens N] [-- ARGUMENTS OF THE BENCH]
#
# After each part FOLDER/HARDWARE.md (FOLDER is DIR/out unless said otherwise) says what it showed, so a run
# that is cut short leaves what it had; the whole text of a part is in FOLDER/PART.log, the bench's numbers in
# FOLDER/bench-lines.json, the cost file for hat-sim in FOLDER/bench-cost.json. Each part has a share of the
# budget (480 s) as its limit. A part that fails or is cut stops no other, and the status is then 1.
# shellcheck disable=SC2086,SC2046 # lists of words
set -u

gpu=0 budget=480 out='' tokens=64 parts="doctor kernels ptx lossless bench sanitizers rest"
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    [ $# -ge 2 ] || { echo "$1 wants a value" >&2; exit 2; }
    case $1 in
    --gpu) gpu=$2 ;;
    --budget) budget=$2 ;;
    --out) out=$2 ;;
    --parts) parts=$2 ;;
    --tokens) tokens=$2 ;;
    *) echo "$1: no such flag; see the top of this script" >&2; exit 2 ;;
    esac
    shift 2
done
[ $# -eq 0 ] || shift
bench_arguments="$*"
home=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
[ -f "$home/programs.tar.gz" ] || { echo "no programs in $home: cuda/pack.sh makes a folder with them" >&2; exit 2; }
mkdir -p "${out:=$home/out}" || exit 2
out=$(realpath "$out") work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tar -C "$work" -xzf "$home/programs.tar.gz" || exit 2
programs=$work/programs bundles=$work/bundles
# What the driver's compiler makes of PTX is kept between processes, and no earlier run's is taken.
export CUDA_CACHE_PATH=$work/compiled TMPDIR=$work HAT_CACHE_DIR=$work/cache RUST_BACKTRACE=0
export gpu tokens out programs bundles bench_arguments

# Left out by name: what makes a driver of its own or compiles kernels, and what reads the source.
left_out="on_driver sanitizer emulated artefacts mutants rehearsal"
# Small ones of each family of kernels, for tools that make everything a hundred times slower.
few="attention::a_row_sees_its_window_alone attention::compact_moves_rows_in_order
    attention::rope_append_rotates_and_puts_rows_to_their_slots choice::top_k_is_a_sort
    choice::top_k_says_which_rows_are_not_finite floats::rounding_is_to_the_nearest_and_to_infinity
    fragments::copies_arrive_where_they_are_sent_and_zeros_where_nothing_is
    gemv::gemv_and_linear_add_their_bias_and_their_result norm::rms_norm_means_what_it_says
    rows::embed_gives_the_tables_numbers"
export left_out few

# Name, driver, clocks now and at most, error correction, memory.
state() {
    ! command -v nvidia-smi >/dev/null || nvidia-smi --format=csv,noheader -i "$gpu" \
        --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,ecc.mode.current,memory.total
}

models() {
    [ -d "$bundles" ] ||
        HAT_TEST_BUNDLES=$bundles "$programs/backend" bundles::bundles_for_a_gpu --exact --quiet
}

doctor() {
    state
    models || return 1
    "$programs/hat-engine" doctor --processor "cuda:$gpu" --bundle "$bundles/q4_1"
}

# The tests of kernels and backend; the backend's of one thread, for they hold whole models.
kernels() {
    local status=0
    export HAT_TEST_GPU=$gpu
    "$programs/kernels" $(printf -- '--skip %s ' $left_out) || status=1
    echo "left out by name ($left_out): $("$programs/kernels" --list | grep -cE "(${left_out// /|}).*: test$")"
    "$programs/backend" --test-threads 1 || status=1
    "$programs/bits" --test-threads 1 || status=1
    return $status
}
# One test comes first: after it the driver has what it made of the PTX.
ptx() {
    export HAT_CUDA_FORM=ptx
    HAT_TEST_GPU=$gpu "$programs/kernels" norm::rms_norm_means_what_it_says --exact --quiet || return 1
    kernels
}

# Token ids and logits of the split engine, drafted in every way, and of the whole model.
answer() {
    "$programs/hat-engine" generate --raw --processor "cuda:$gpu" --wire int8 --json --ignore-eos --max-tokens "$tokens" \
        -p "Write a short story about a lighthouse keeper. Write a short story." "$@" | tail -n 1
}
field() { grep -o "\"$1\":[^]}]*[]}\"]" <<<"$2" | head -n 1; }
lossless() {
    local same=0 all=0 bundle sampled mode whole split
    models || return 1
    for bundle in q4_1 q8_0 f16 q6_k q4_0; do
        for sampled in "" "--temperature 0.8 --seed 7"; do
            whole=$(field logits_blake3 "$(answer --whole --bundle "$bundles/$bundle" $sampled)")
            for mode in tree $([ $bundle != q4_1 ] || echo off lookup chain stream); do
                split=$(field logits_blake3 "$(answer --draft "$mode" --bundle "$bundles/$bundle" $sampled)")
                all=$((all + 1))
                if [ -n "$whole" ] && [ "$whole" = "$split" ]; then same=$((same + 1)); else
                    echo "$bundle, --draft $mode $sampled: ${split:-no answer}; the whole model: ${whole:-no answer}"
                fi
            done
        done
    done
    echo "$same of $all split answers are the whole model's to the bit"
    [ "$same" = "$all" ]
}

bench() {
    "$programs/bench" --gpu "$gpu" --quick --models 7b --layers 8 --json "$out/bench-lines.json" \
        --cost-file "$out/bench-cost.json" $bench_arguments || return 1
    state
}

sanitizers() {
    local status=0 tool PATH=$PATH:/usr/local/cuda/bin
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not here"; return 0; }
    for tool in memcheck racecheck initcheck synccheck; do
        if HAT_TEST_GPU=$gpu compute-sanitizer --tool $tool --error-exitcode 9 "$programs/kernels" --exact \
            --test-threads 1 $few; then
            echo "$tool: clean"
        else
            echo "$tool: FAILED" && status=1
        fi
    done
    return $status
}

# Rows from GPU to GPU where there are two, and the whole bench, as far as it comes.
rest() {
    local status=0
    if [ "$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')" -gt 1 ]; then
        "$programs/kernels" on_driver::peers::one_gpu_fetches_from_another_on_gpus --exact --ignored --nocapture || status=1
    fi
    "$programs/bench" --gpu "$gpu" --weights q4_1,q8_0 --json "$out/bench-lines.json" $bench_arguments || status=1
    return $status
}
export -f state models answer field doctor kernels ptx lossless bench sanitizers rest

page=$out/HARDWARE.md
{
    echo
    echo "## $(date -u '+%F %H:%M') UTC"
    echo
    cat "$home/built"
} >>"$page"
failed=0 running=''
trap '[ -z "$running" ] || kill "$running"; exit 130' INT TERM

# NAME SHARE PATTERN: runs a part within so many percent of the budget; of what it says, lines with the
# pattern go to the page; where it fails the last of them, below the first panics.
part() {
    local name=$1 limit=$((budget * $2 / 100)) left=$((budget - SECONDS)) begin=$SECONDS log=$out/$1.log status=0 verdict
    [[ " $parts " == *" $name "* ]] || return 0
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 1 ]; then
        verdict="NOT BEGUN, the budget is spent" status=1
        : >"$log"
    else
        timeout -k 5 "$limit" bash -uo pipefail -c "$name" >"$log" 2>&1 &
        running=$!
        wait "$running" || status=$?
        case $name,$status in
        *,0) verdict=passed ;;
        rest,124) verdict="as far as it came" status=0 ;;
        *,124 | *,137) verdict="CUT at its limit" ;;
        *) verdict="FAILED ($status)" ;;
        esac
    fi
    [ "$status" = 0 ] || failed=$((failed + 1))
    {
        echo
        echo "### $name: $verdict, $((SECONDS - begin)) of $limit s"
        echo
        case $verdict in
        FAILED*) grep -A 1 -m 5 'panicked at' "$log" && echo ..; grep -E "$3" "$log" | tail -n 20 ;;
        *) grep -E "$3" "$log" ;;
        esac | cut -c 1-1000 | sed 's/^/    /'
    } >>"$page"
    echo "$name: $verdict, $((SECONDS - begin)) of $limit s"
}

part doctor 6 .
part kernels 15 '^(test result|left out)'
part ptx 20 '^(test result|left out)'
part lossless 15 .
part bench 25 .
part sanitizers 12 '^(compute-sanitizer|memcheck|racecheck|initcheck|synccheck)'
part rest 100 .
echo "$page: $failed parts without success in $SECONDS s"
[ "$failed" = 0 ]
