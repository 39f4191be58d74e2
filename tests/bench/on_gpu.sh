#!/usr/bin/env bash
# Everything that wants a GPU, what tells most first: tests/bench/on_gpu.sh [FOLDER] [PROCESSES]
#
# Logs go to FOLDER, by default build/on_gpu, results to tests/bench/results/. Each step is stopped after its seconds,
# and keeps what it has by then; one that fails stops none. `SKIP="peers racecheck"` leaves steps out. Exit code 1 if a
# step failed.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/on_gpu} processes=${2:-$(nproc)} failed=0
mkdir -p "$out"
export OMP_NUM_THREADS=1 # a process for each core
step() { # step NAME SECONDS COMMAND...
  [[ " ${SKIP:-} " == *" $1 "* ]] && return
  local start=$SECONDS
  timeout -s INT "$2" "${@:3}" >"$out/$1.log" 2>&1
  local code=$?
  [ $code = 0 ] || failed=1
  echo "$1: exit code $code, $((SECONDS - start)) s: $(tail -1 "$out/$1.log")"
}
kernels=(tests/plugins tests/validate/test_kernels.py)
sanitizers=tests/plugins/test_compute_sanitizer.py
step build 600 python -c 'from llmexport.plugins import library; print(library.build())'
# Which is the faster one decides what plugins/common/sm90a.h takes.
step clusters 300 pytest -q -m gpu -n "$processes" tests/plugins/test_clusters.py \
  tests/plugins/test_moe_experts_clusters_kernel.py
step blocks_alone 240 python tests/bench/bench_ops.py --no-peers --only MoeExperts
step in_clusters 240 env LLMEXPORT_SM90A=cluster python tests/bench/bench_ops.py --no-peers --only MoeExperts
step turns 300 pytest -q -m gpu -n "$processes" tests/plugins/test_sink_attention_sm90a_kernel.py
step prefill 300 python tests/bench/bench_prefill.py
step tests 900 pytest -q -m gpu -n "$processes" "${kernels[@]}" --ignore "$sanitizers"
step times 600 python tests/bench/bench_ops.py --no-peers
step wgmma 300 env LLMEXPORT_SM90A=1 python tests/bench/bench_ops.py --no-peers --only MoeExperts
step sanitizers 900 pytest -q -m gpu "$sanitizers"
step peers 1200 python tests/bench/bench_ops.py
step engines 900 pytest -q -m gpu tests/validate/test_engine_gpu.py
exit $failed
