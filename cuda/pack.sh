#!/usr/bin/env bash
# Packs what a machine with a GPU needs for cuda/run-on-gpu.sh, and nothing of the source: the programs
# stripped, the script, and a line that says of what they were built. On this machine:
#
#     cuda/pack.sh DIR [--profile NAME]        # makes DIR, below 40 MB; the profile is release
#
# and there, where DIR was copied to: DIR/run-on-gpu.sh
set -euo pipefail

megabytes_max=40
[ $# -ge 1 ] || { echo "usage: cuda/pack.sh DIR [--profile NAME]" >&2; exit 2; }
out=$(realpath -m "$1") profile=release
shift
[ $# -eq 0 ] || { [ "$1" = --profile ] && profile=$2; } || { echo "$1: no such flag" >&2; exit 2; }
[ ! -e "$out" ] || { echo "$out is there already" >&2; exit 2; }
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.."

# Tests that are left out where they are built would be left out on the GPU as well.
unset HAT_NO_EMULATOR
made=$(cargo test --workspace --profile "$profile" --no-run --message-format=json \
    --test kernels --test cuda --test cuda_bits --bench cuda)
built() { # KIND NAME: the path of a program that cargo built
    grep -F "\"kind\":[\"$1\"]" <<<"$made" | grep -F "\"name\":\"$2\"," |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p'
}
# A program that looks for the source tree finds nothing, here as there: another path of the same length.
root=$(pwd)
nowhere=$(sed 's/[^/]/x/g' <<<"$root")
mkdir -p "$out/programs"
add() { # AS KIND NAME
    strip -o "$out/programs/$1" "$(built "$2" "$3")"
    LC_ALL=C sed -i "s#$root#$nowhere#g" "$out/programs/$1"
}
add hat-engine bin hat-engine
add kernels test kernels
add backend test cuda
add bits test cuda_bits
add bench bench cuda
tar -C "$out" -czf "$out/programs.tar.gz" programs
rm -r "$out/programs"
cp cuda/run-on-gpu.sh "$out/"
artefacts=$(sha256sum cuda/kernels/gen/manifest.json | cut -c1-16)
echo "source $(git describe --always --dirty 2>/dev/null || echo unknown), artefacts $artefacts, profile $profile" \
    >"$out/built"

bytes=$(du -bs "$out" | cut -f1)
echo "$out: $((bytes / 1000000)) MB"
[ "$bytes" -lt $((megabytes_max * 1000000)) ] || { echo "that is above $megabytes_max MB" >&2; exit 1; }
