#!/usr/bin/env bash
# Everything that only a GPU can show, in parts of under ten minutes, each with a time limit of its own.
#
#     bash benchmarks/gpu.sh FOLDER [PART ...]     # all parts, in this order, without any named
#
# A part writes FOLDER/PART.json and FOLDER/PART.log; one that fails or runs out of time leaves what it had measured,
# and the next goes on. $PYTHON is the interpreter that has the packages; models and runs go to $TMPDIR, which should be
# fast (/dev/shm). $LIMIT shortens every benchmark's time.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=$(mkdir -p "$1" && cd "$1" && pwd)
shift
RUNS=${TMPDIR:-/tmp}/beaver-gpu
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
mkdir -p "$RUNS"

# limited SECONDS NAME COMMAND...
limited() {
    local seconds=$1 name=$2 began=$SECONDS
    shift 2
    timeout --kill-after=10 "$seconds" "$@" >"$OUT/$name.log" 2>&1
    echo "$name: exit $? after $((SECONDS - began)) s"
    grep -vE '^\s*$' "$OUT/$name.log" | tail -n "${LINES_SHOWN:-40}"
}
bench() { # bench SECONDS NAME ARGUMENTS...
    local seconds=$1 name=$2
    shift 2
    limited "${LIMIT:-$seconds}" "$name" "$PYTHON" -m launch bench "$@" --out "$OUT/$name.json"
}

doctor() { limited 120 doctor "$PYTHON" -m launch doctor; }
gpu_test() { # gpu_test NAME ARGUMENTS...: in a process of its own, for an engine leaves the next one in it no memory
    local name=$1
    shift
    limited 200 "$name" "$PYTHON" -m pytest -q -p no:cacheprovider "$@"
}
tests() {
    gpu_test test_attention tests/models/test_attention.py
    # On a GPU a sample depends on its batch (GeneratorSpec.per_sample_seeds).
    gpu_test test_generator tests/actors/roles/test_generator.py \
        --deselect "tests/actors/roles/test_generator.py::test_a_sample_does_not_depend_on_its_batch[vllm]"
    # Without the tied model's own head, which only CPUs have.
    gpu_test test_transfer_tied tests/actors/weights/test_transfer_engine.py -k "not untied and not failed"
    gpu_test test_transfer_untied tests/actors/weights/test_transfer_engine.py -k untied
}
sync() { bench 300 sync sync; }
small_world() {
    limited 500 small_world "$PYTHON" -m launch pipeline configs/local/pipeline.yaml "workspace=$RUNS/small-world"
    cp "$RUNS/small-world/safe_ppo/evaluation.json" "$OUT/small_world.json"
    cp "$RUNS/small-world/safe_ppo/notes.log" "$OUT/small_world.notes.log"
}
chaos() {
    limited 580 chaos "$PYTHON" benchmarks/gpu_chaos.py "$RUNS/small-world" --kills 10 --steps 40 --out "$OUT/chaos.json"
    cp "$RUNS/small-world/gpu-chaos/notes.log" "$OUT/chaos.notes.log"
}
trainer_06B() { bench 200 trainer_06B trainer --case 0.6B; }
trainer_4B() { bench 300 trainer_4B trainer --case 4B; }
raw_vllm_05B() { bench 400 raw_vllm_05B raw-vllm --shape 0.5B; }
step_05B() { bench 400 step_05B step --shape 0.5B --repetitions 2; }
iteration_05B() { bench 450 iteration_05B iteration --shape 0.5B; }
step_7B() { bench 500 step_7B step --shape 7B --repetitions 1; }
raw_vllm_7B() { bench 400 raw_vllm_7B raw-vllm --shape 7B; }
raw_vllm_15B() { bench 400 raw_vllm_15B raw-vllm --shape 1.5B; }

if [ $# = 0 ]; then
    set -- doctor tests sync trainer_06B trainer_4B raw_vllm_05B step_05B iteration_05B step_7B raw_vllm_7B raw_vllm_15B small_world chaos
fi
for part in "$@"; do
    "$part"
done
