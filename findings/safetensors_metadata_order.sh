#!/usr/bin/env bash
# safetensors 0.8.0: saving the same tensors with the same metadata gives a different file every time.
#
# Expected: the format is a length, a JSON header and raw bytes, made to be simple and safe, so equal content means equal
# bytes. Registries, caches and reproducible exports compare such files by their SHA-256.
# Observed: with two or more metadata entries their order in the header is that of a hash map with a random seed, and
# differs within one process. Without metadata, or with a single entry, files are equal.
#
# Output: 10 saves with 8 entries: 10 different files; with one entry: 1 file.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.2.6
"$work/venv/bin/python" - "$work" <<'PY'
import hashlib
import pathlib
import sys

import numpy
from safetensors.numpy import save_file

path = pathlib.Path(sys.argv[1], "weights.safetensors")
tensors = {"weight": numpy.arange(4, dtype=numpy.float32)}


def different_files(entries):
    metadata = {f"key{i}": str(i) for i in range(entries)}
    digests = set()
    for _ in range(10):
        save_file(tensors, path, metadata=metadata)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    return len(digests)


several, one = different_files(8), different_files(1)
print(f"10 saves with 8 metadata entries: {several} different files; with one entry: {one}")
assert one == 1
assert several > 1, "the order is stable now: the behaviour has changed"
PY
