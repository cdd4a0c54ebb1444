#!/usr/bin/env bash
# safetensors 0.8.0: save_file writes a file that only its owner can read, whatever the umask and the mode of an older file.
#
# Expected: a file written by a library gets the mode of the umask (0644 with 022), as torch.save and numpy.save give it;
# overwriting a file keeps the mode it has.
# Observed: the bytes go to a temporary file with mode 0600, which then takes the place of the old one and keeps that
# mode. A backbone exported to a shared folder cannot be read by the group, also where the file could be read before.
#
# Output: umask 022; new file 0600; over an existing 0644 file 0600; numpy.save 0644.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.2.6
"$work/venv/bin/python" - "$work" <<'PY'
import os
import pathlib
import sys

import numpy
from safetensors.numpy import save_file

os.umask(0o022)
folder = pathlib.Path(sys.argv[1])
tensors = {"weight": numpy.zeros(4, dtype=numpy.float32)}
mode = lambda path: f"{path.stat().st_mode & 0o777:04o}"

new = folder / "new.safetensors"
save_file(tensors, new)
there = folder / "there.safetensors"
there.touch(mode=0o644)
before = mode(there)
save_file(tensors, there)
plain = folder / "plain.npy"
numpy.save(plain, tensors["weight"])
print(f"umask 022; new file {mode(new)}; over an existing {before} file {mode(there)}; numpy.save {mode(plain)}")
assert (before, mode(plain)) == ("0644", "0644")
assert (mode(new), mode(there)) == ("0600", "0600"), "the umask is honoured now: the behaviour has changed"
PY
