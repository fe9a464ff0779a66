#!/usr/bin/env bash
# Every measurement that waits for a GPU, sized for one call of 10 minutes on an H200.
#
#   benchmarks/gpu.sh [--smoke] [--out DIR] [PART ...]
#
# Parts, in order: loss grid curve step placement vllm grid-fp32; all of them if none is named. Each has a limit
# of its own and ends no later than SECONDS_IN_ALL after the start. One that fails or runs out of time stops no
# other. As soon as a part ends, its figures are in DIR/gpu.json and its output in DIR/gpu.log; a table of all is
# the last output. Exit status: 0 if all parts are done, 1 if one is not, 2 if none can start.
#
# --smoke runs every part in seconds, with tiny models, on the CPU, and under none but the common limit, since a
# busy CPU may take long.
#
#   OUT=DIR               folder of the results, as --out; default outputs/gpu
#   PYTHON=python3        interpreter that has torch with CUDA
#   WHEELS=DIR            folder of wheels to install beside it first (benchmarks/README.md says how to fill it)
#   SECONDS_IN_ALL=560    limit of all parts together; with --smoke 3600
set -uo pipefail
SECONDS=0

stop() {
    echo "gpu.sh: $1" >&2
    exit 2
}

ALL_PARTS="loss grid curve step placement vllm grid-fp32"
smoke="" out="${OUT:-outputs/gpu}" parts=""
while [ $# -gt 0 ]; do
    case "$1" in
        --smoke) smoke="--smoke" ;;
        --out) [ $# -gt 1 ] || stop "--out needs a folder"; out="$2"; shift ;;
        *)
            case " $ALL_PARTS " in *" $1 "*) ;; *) stop "unknown part '$1'; parts: $ALL_PARTS" ;; esac
            parts="$parts $1"
            ;;
    esac
    shift
done
parts="${parts:-$ALL_PARTS}"
mkdir -p "$out" || stop "cannot create $out"
out="$(cd "$out" && pwd)"
wheels="${WHEELS:+$(cd "$WHEELS" 2>/dev/null && pwd)}" || stop "WHEELS: no folder $WHEELS"
cd "$(dirname "$0")/.." || stop "the folder of this script is gone"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

python="${PYTHON:-python3}"
command -v "$python" >/dev/null || stop "PYTHON: no interpreter $python"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ -n "$wheels" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$wheels"/*.whl \
        || stop "the wheels of $wheels cannot be installed"
    export PYTHONPATH="$work/site:$PYTHONPATH"
fi
missing="$("$python" benchmarks/gpu_results.py missing)" \
    || stop "missing packages: $missing (give wheels by WHEELS=DIR, see benchmarks/README.md)"
if [ -n "$smoke" ]; then
    export CUDA_VISIBLE_DEVICES=""
else
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
        || stop "torch finds no GPU; --smoke runs every part on a CPU"
    nvidia-smi
fi
rm -f "$out/gpu.json" "$out/gpu.log"

all="${SECONDS_IN_ALL:-560}"
[ -z "$smoke" ] || all="${SECONDS_IN_ALL:-3600}"

# run PART LIMIT SCRIPT ARGUMENT ...
run() {
    local part="$1" limit="$2" script="$3" left=$((all - SECONDS))
    shift 3
    [ -z "$smoke" ] || limit="$left"
    [[ " $parts " == *" $part "* ]] || return 0
    [ "$limit" -lt "$left" ] || limit="$left"
    local start=$SECONDS status=124
    echo "== $part, at $start s, limit $limit s" | tee -a "$out/gpu.log"
    if [ "$limit" -gt 0 ]; then
        timeout --kill-after=5 "$limit" "$python" "benchmarks/$script" $smoke "$@" \
            --out "$work/$part.json" >>"$out/gpu.log" 2>&1
        status=$?
    fi
    "$python" benchmarks/gpu_results.py add "$out/gpu.json" "$part" "$status" $((SECONDS - start)) \
        "$work/$part.json"
    [ "$status" -eq 0 ] || tail -n 5 "$out/gpu.log"
}

steps() { [ -n "$smoke" ] || echo "--steps $1"; }

run loss 60 loss.py
run grid 150 grid.py --precisions bf16 --only comparison --turns 1 $(steps 4)
run curve 90 grid.py --precisions bf16 --only curve --turns 1 $(steps 2)
run step 140 step.py --large --turns 1 $(steps 2)
run placement 70 placement.py $(steps 5)
run vllm 60 vllm_step.py $(steps 5)
run grid-fp32 150 grid.py --precisions fp32 --only comparison --turns 1 $(steps 3)

"$python" benchmarks/gpu_results.py show "$out/gpu.json" | tee -a "$out/gpu.log"
exit "${PIPESTATUS[0]}"
