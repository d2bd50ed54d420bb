#!/usr/bin/env bash
# Everything that needs several GPUs of one host: tests over NCCL, ranks.py, throughput.py, trace_ranks.py.
#
#   benchmarks/multi_gpu.sh OUT [N] [PART...]        N GPUs (default: all), parts: tests ranks throughput trace
#   DRY=1 benchmarks/multi_gpu.sh OUT 3              the same with 3 gloo processes on a CPU, at tiny sizes
#
# Every part ends within 9 minutes and keeps what it has in OUT: run it again for the rest. FORCE=1 measures anew.
# Settings: PYTHON (which one; else the machine's python3 if its torch sees the GPUs, else .venv), PEERS (wheels or a
# folder of wheels that are put on the path, such as ring-flash-attn's), SEQPAR_ATTN_LIBRARY, SEQPAR_ATTN_COMMIT,
# LIMIT (seconds a part may take, 540), TOTAL (seconds for all parts), RANKS_ARGS, THROUGHPUT_ARGS, TRACE_ARGS (options).
set -uo pipefail
out=${1:?usage: benchmarks/multi_gpu.sh OUT [N] [PART...]}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
DRY=${DRY:-} FORCE=${FORCE:-} LIMIT=${LIMIT:-540} TOTAL=${TOTAL:-1000000} SECONDS=0

# NVLink multicast that a program leaves behind can take a host's GPUs out of service.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

sees_gpu='import sys, torch; sys.exit(not torch.cuda.is_available())'
if [ -n "${PYTHON:-}" ]; then python=$PYTHON
elif [ -n "$DRY" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python
elif [ -n "$DRY" ] || python3 -c "$sees_gpu" 2>/dev/null; then python=python3
elif command -v nvidia-smi >/dev/null; then make venv && python=.venv/bin/python
else python=python3; fi
if [ -n "$DRY" ]; then
    gpus=${2:-2}
    export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
else
    "$python" -c "$sees_gpu" || { echo "expected NVIDIA GPUs that torch sees, found none (DRY=1 needs none)" >&2; exit 2; }
    gpus=${2:-$("$python" -c 'import torch; print(torch.cuda.device_count())')}
fi
[[ $gpus =~ ^[0-9]+$ ]] || { echo "expected a number of GPUs, got '$gpus'" >&2; exit 2; }
shift $(($# < 2 ? $# : 2))
[ $# -gt 0 ] || set -- tests ranks throughput trace

if [ -n "${PEERS:-}" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    for wheel in $(if [ -d "$PEERS" ]; then ls "$PEERS"/*.whl; else echo "$PEERS"; fi); do
        "$python" -m zipfile -e "$wheel" "$site"
    done
    export PYTHONPATH="$PYTHONPATH:$site"
fi
# The library of csrc is compiled once where there is nvcc; without it "auto" takes Triton's kernels.
[ -n "$DRY" ] || "$python" -c 'from seqpar_attn import kernels; x = kernels.get("cuda"); x.prepare(); print("csrc:", x.unavailable() or "ready")'

options=(--out "$out" --gpus "$gpus" ${DRY:+--dry-run} ${FORCE:+--force})
bounded() { timeout -k 15 "$limit" "$@"; }

tests() {
    local name="$out/${DRY:+dry-}tests-$gpus" what=(tests/test_attention_nccl_gpu.py tests/test_symmetric_gpu.py tests/test_ulysses_gpu.py -m gpu)
    if [ -e "$name.txt" ] && [ -z "$FORCE" ]; then echo "there already: $(tail -n 1 "$name.txt")"; return 0; fi
    # On a CPU those are skipped, after their modules were imported; gloo has a test of its own.
    [ -z "$DRY" ] || what=(tests/test_attention_nccl_gpu.py tests/test_ulysses_gpu.py tests/test_attention_gloo.py -k "gpu or mesh_dimension")
    bounded "$python" -m pytest -q --durations=5 "${what[@]}" 2>&1 | tee "$name.failed.txt"
    local status=${PIPESTATUS[0]}
    [ "$status" -ne 0 ] || mv "$name.failed.txt" "$name.txt"
    return "$status"
}
ranks() { bounded "$python" benchmarks/ranks.py "${options[@]}" ${RANKS_ARGS:-}; }
throughput() { bounded "$python" benchmarks/throughput.py "${options[@]}" --deadline $((limit - 20)) ${THROUGHPUT_ARGS:-}; }
trace() {
    local transport status=0
    for transport in p2p symmetric; do
        bounded "$python" benchmarks/trace_ranks.py "${options[@]}" --transport $transport ${TRACE_ARGS:-} || status=$?
    done
    return $status
}

failed=()
for part in "$@"; do
    case $part in tests | ranks | throughput | trace) ;; *) echo "expected tests, ranks, throughput or trace, got '$part'" >&2; exit 2 ;; esac
    echo "== $part, $gpus ranks, $(date -u +%T)"
    begin=$SECONDS
    left=$((TOTAL - SECONDS))
    if [ $left -lt 60 ] && [ -z "$DRY" ]; then failed+=("$part: not started, $left s are left of $TOTAL; run again"); continue; fi
    limit=$((left < LIMIT ? left : LIMIT))
    "$part"
    status=$?
    [ $status -eq 0 ] || failed+=("$part: $([ $status -eq 124 ] && echo "not done within $limit s, run again" || echo "status $status")")
    echo "== $part: status $status after $((SECONDS - begin)) s"
done
ls -l "$out"
[ ${#failed[@]} -eq 0 ] || { printf '%s\n' "${failed[@]}" >&2; exit 1; }
