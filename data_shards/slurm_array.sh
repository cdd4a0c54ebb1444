#!/usr/bin/env bash
#SBATCH --job-name=shards --array=1-16 --cpus-per-task=8 --mem-per-cpu=2G --time=12:00:00 --requeue
# Write any source as one shard set by an array of jobs. Submit the array, then the merge that waits for it:
#   job=$(sbatch --parsable data_shards/slurm_array.sh SRC DST)
#   sbatch --dependency=afterok:"$job" --kill-on-invalid-dep=yes --wrap 'esvit-scale shards merge DST'
# A job that is requeued continues with the shards that it has not written.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: sbatch $0 SRC DST [OPTION …]" >&2
  exit 2
fi
src=$1 dst=$2
shift 2
esvit-scale shards create "$src" "$dst" --workers "${SLURM_CPUS_PER_TASK:-1}" \
  --shard-range "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" "$@"
