#!/usr/bin/env bash
# pyarrow 26.0.1: ParquetFile(path, buffer_size=N) does not bound memory; the whole column chunk of a row group is held.
#
# Expected: with a buffer size given ("enable read buffering when deserializing individual column chunks") and small
# batches, iter_batches needs memory for some pages only, however large the row group is.
# Observed: `pre_buffer`, which is on by default, reads the whole column chunk first, and buffer_size then changes
# nothing. It has an effect only together with pre_buffer=False.
#
# Output (peak MB of Arrow's memory, a column of 105 MB in one row group, batches of 8 rows):
#   neither 107 · buffer_size=1 MB 107 · and pre_buffer=False 5
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1
cat > "$work/peak.py" <<'PY'
import sys

import pyarrow
import pyarrow.parquet

file = pyarrow.parquet.ParquetFile(sys.argv[1], **eval(sys.argv[2]))
for _ in file.iter_batches(8, use_threads=False):
    pass
print(pyarrow.default_memory_pool().max_memory() // 10**6)
PY
"$work/venv/bin/python" - "$work/x.parquet" <<'PY'
import os
import sys

import pyarrow
import pyarrow.parquet

column = pyarrow.array([os.urandom(105_000) for _ in range(1000)])
table = pyarrow.table({"image": column})
pyarrow.parquet.write_table(table, sys.argv[1], use_dictionary=False, write_batch_size=8, compression="none")
PY
peak() { ARROW_DEFAULT_MEMORY_POOL=system "$work/venv/bin/python" "$work/peak.py" "$work/x.parquet" "$1"; }
neither=$(peak "{}") buffer=$(peak "{'buffer_size': 1 << 20}") both=$(peak "{'buffer_size': 1 << 20, 'pre_buffer': False}")
echo "neither $neither · buffer_size=1 MB $buffer · and pre_buffer=False $both"
[ "$buffer" -gt 90 ] && [ "$both" -lt 30 ]
