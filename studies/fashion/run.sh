#!/usr/bin/env bash
# Repeat the study: write the shards, run every cell that is not finished, collect, fit and draw.
#
#   studies/fashion/run.sh [SOURCE]          everything but the held-out run and what came after it
#   HELD_OUT=1 studies/fashion/run.sh [SOURCE]   these too
#
# SOURCE holds the files of Debian's dataset-fashion-mnist (default: /usr/share/datasets). PYTHON is the interpreter
# (default: that of `make venv`, if there is one). Stop it at any time: the same command continues from the last checkpoint. Runs are in runs/sweeps/fashion*, results in studies/fashion/results.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
here=studies/fashion
[ -x .venv/bin/python ] && venv=.venv/bin/python || venv=python
python=${PYTHON:-$venv}
"$python" -c 'import esvit_scale.data.shard_writer' 2>/dev/null \
  || { echo "run.sh: $python lacks esvit_scale or what it needs; run make venv, or give PYTHON=/path/to/python" >&2; exit 2; }

"$python" $here/study_shards.py "${1:-/usr/share/datasets}" runs/fashion/shards
sweeps="sweep seeds reuse view${HELD_OUT:+ held_out more_seeds}"
for name in $sweeps; do
  "$python" -m esvit_scale sweep submit --local $here/$name.yaml
  "$python" $here/probe.py $here/$name.yaml
done
for name in $sweeps; do
  "$python" -m esvit_scale sweep collect $here/$name.yaml --out $here/results/$name.csv
done
"$python" $here/untrained.py
"$python" $here/analyse.py
