#!/bin/bash
# Run one rank of a job: set its limits, caches and log, and record its failure.
ulimit -Sn "$(ulimit -Hn)" 2>/dev/null

# Compiled kernels go to the node's own disk: on a shared one, ranks wait for each other's locks.
cache=${ESVIT_LOCAL:-${TMPDIR:-/tmp}}/esvit-cache-$(id -u)
if mkdir -p "$cache" 2>/dev/null && [ -O "$cache" ]; then
  export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$cache/triton}"
  export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$cache/extensions}"
  export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}"
fi

if [ "${SLURM_PROCID:-0}" != 0 ] && [ -n "${ESVIT_RANK_LOGS:-}" ]; then
  exec >>"$ESVIT_RANK_LOGS/rank-$SLURM_PROCID.log" 2>&1
  echo "--- $(date -u +%FT%TZ) rank $SLURM_PROCID on $(hostname)"
fi

# Record how this rank fails, because srun returns one exit code for all ranks: see `blame` in job.sh.
rank=
trap 'kill -USR1 "$rank" 2>/dev/null' USR1
trap 'kill -TERM "$rank" 2>/dev/null' TERM
"$@" & rank=$!
while kill -0 "$rank" 2>/dev/null; do wait "$rank"; done
wait "$rank"; code=$?
if [ "$code" != 0 ] && [ -n "${ESVIT_RANK_LOGS:-}" ]; then
  echo "$(date +%s%N) $code rank ${SLURM_PROCID:-0} on $(hostname)" >"$ESVIT_RANK_LOGS/exit-${SLURM_PROCID:-0}"
fi
exit "$code"
