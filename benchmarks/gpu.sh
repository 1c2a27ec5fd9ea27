#!/usr/bin/env bash
# Measurements that need a GPU, each part in under 8 minutes on a machine with nothing but
# torch >= 2.11, NumPy, Triton >= 3.6 and pytest. Nothing is downloaded.
#
#   benchmarks/gpu.sh tests       the kernels' tests, bf16 on the GPU: tests.log, tests.xml
#   benchmarks/gpu.sh loss        the head loss against its peers: head_loss.json, ..., loss.log
#   benchmarks/gpu.sh attention   attention over packs against its peers: attention.json, ..., and
#                                 measured.json, from which `auto` chooses, here and in the package
#   benchmarks/gpu.sh step        the whole step of a 3B-shaped model, official recipe to one pass
#   benchmarks/gpu.sh memory      derta plan against what is allocated, 1B to 8B: plan.log; then the
#                                 longest harmful response that fits, against derta plan
#
# Results go to $OUT, or to benchmarks/results/$DERTA_MACHINE if that is unset. All parts but `tests`
# resume: groups with records there, or in benchmarks/results, are not run again.
#
#   DERTA_MACHINE   name of the folder of results; h200 by default
#   DERTA_PEERS     folder of wheels to compare with, dependencies included; none by default.
#                   `tests` takes hypothesis from it, and skips its tests without. `tests` and
#                   `attention` take Triton from it: Hopper needs 3.7.1, other parts the torch's own
#   DERTA_COMMIT    name of the commit in the records, for a copy without its history
set -euo pipefail
cd "$(dirname "$0")/.."
part=${1:-}
machine=${DERTA_MACHINE:-h200}
kept=benchmarks/results/$machine
out=${OUT:-$kept}
peers=build/peers
mkdir -p "$out" build
export PYTHONPATH="$PWD:$PWD/kernels" PYTHONUNBUFFERED=1

# For this GPU alone, which takes a fraction of the time of all.
[ -e kernels/derta_kernels/head_loss/_native/report.json ] ||
    CUDAARCHS=native python3 -c 'from setup import build_native; build_native()' ||
    echo 'gpu.sh: the native library was not built'

bring_peers() {
    local apart wheel
    if [ -n "${DERTA_PEERS:-}" ] && [ ! -d "$peers" ]; then
        mkdir -p "$peers"
        for wheel in "$DERTA_PEERS"/*.whl; do
            if [[ $(basename "$wheel") == triton-* ]]; then continue; fi
            # Apart: pip would replace a folder that several wheels have a part of.
            apart=$(mktemp -d)
            if python3 -m pip install -q --no-index --no-deps --no-compile --target "$apart" \
                "$wheel"; then
                cp -r "$apart/." "$peers"
            else
                echo "gpu.sh: not installed: $(basename "$wheel")"
            fi
            rm -rf "$apart"
        done
    fi
}

# The Triton among the peers, in place of the machine's.
bring_triton() {
    local wheels=("${DERTA_PEERS:-}"/triton-*.whl)
    if [ -e "${wheels[0]}" ]; then
        python3 -m pip install -q --no-index --no-deps --upgrade --target build/triton "${wheels[0]}"
        export PYTHONPATH="$PYTHONPATH:$PWD/build/triton"
    fi
}

# Records that are kept, for --resume.
take_up() {
    if [ "$out" != "$kept" ] && [ -e "$kept/$1.json" ]; then
        cp -n "$kept/$1.json" "$out"
    fi
}

# One question of NAMES, against the peers.
ask() {
    local question=$1
    bring_peers
    [ "$question" != attention ] || bring_triton
    take_up "$question"
    timeout 470 python3 -m "benchmarks.$question" --device cuda --machine "$machine" --out "$out" \
        --peers "$peers" --repetitions 6 --resume --seconds 260 2>&1 | tee -a "$out/$part.log"
    if [ "$question" = attention ]; then
        python3 -m benchmarks.attention.choices benchmarks/results/*/attention.json \
            "$out/attention.json"
        cp kernels/derta_kernels/attention/measured.json "$out"
    fi
}

case $part in
tests)
    bring_peers
    bring_triton
    export PYTHONPATH="$PYTHONPATH:$peers"
    workers=()
    if python3 -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
    timeout 460 python3 -m pytest tests/kernels -q -ra --durations=10 "${workers[@]}" \
        --junitxml="$out/tests.xml" 2>&1 | tee "$out/tests.log"
    ;;
loss) ask head_loss ;;
attention) ask attention ;;
step) ask step ;;
memory)
    bring_peers
    take_up longest
    export PYTORCH_ALLOC_CONF=expandable_segments:True  # as derta train has it
    export PYTHONPATH="$PYTHONPATH:$peers"
    timeout 200 python3 -m pytest tests/derta/memory/test_memory.py tests/derta/modeling/test_offloading.py -m gpu \
        -q -ra --durations=10 2>&1 | tee "$out/plan.log" || true  # it says what differs
    timeout 270 python3 -m benchmarks.longest --device cuda --machine "$machine" --out "$out" \
        --memories 8 16 24 --resume 2>&1 | tee -a "$out/memory.log"
    ;;
*)
    sed -n 's/^#   benchmarks/usage: benchmarks/p' benchmarks/gpu.sh >&2
    exit 2
    ;;
esac
