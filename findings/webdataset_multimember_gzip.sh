#!/usr/bin/env bash
# webdataset 1.0.2 on Python's tarfile: of a .tar.gz that consists of several gzip members only the first one is read.
#
# Expected: a shard that gunzip and `tar -xzf` unpack completely is read completely, or there is an error. RFC 1952 lets a
# gzip file hold several members; bgzip and other parallel compressors write them, and so does joining two .tar.gz with cat.
# Observed: webdataset opens shards as tarfile streams (mode "r|*"), whose decompressor stops after the first member.
# If this is between two blocks of the tar, the shard ends there without an error, whatever ignore_zeros is. In mode "r:*"
# the same file is read completely. The same holds for bzip2, which pbzip2 writes as one stream for every 900 kB.
#
# Output: gunzip 4 files; tarfile "r:*" 4, "r|*" 2; webdataset ['s0', 's1'], no error; bzip2 "r:*" 4, "r|*" 2.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check webdataset==1.0.2 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import bz2
import gzip
import io
import tarfile

import webdataset

out = io.BytesIO()
with tarfile.open(fileobj=out, mode="w") as tar:
    for i in range(4):
        info = tarfile.TarInfo(f"s{i}.txt")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
whole = out.getvalue()  # header and one block for each file
for name, compress in (("shard.tar.gz", gzip.compress), ("shard.tar.bz2", bz2.compress)):
    with open(name, "wb") as file:
        file.write(compress(whole[:2048]) + compress(whole[2048:]))


def names(path, mode):
    with tarfile.open(path, mode=mode) as tar:
        return tar.getnames()


unpacked = len(tarfile.open(fileobj=io.BytesIO(gzip.open("shard.tar.gz").read())).getnames())
keys = [sample["__key__"] for sample in webdataset.WebDataset("shard.tar.gz", shardshuffle=False)]
counts = [len(names(f"shard.tar.{ext}", mode)) for ext in ("gz", "bz2") for mode in ("r:*", "r|*")]
print(f'gunzip {unpacked} files; tarfile "r:*" {counts[0]}, "r|*" {counts[1]}; webdataset {keys}, no error; ', end="")
print(f'bzip2 "r:*" {counts[2]}, "r|*" {counts[3]}.')
assert (unpacked, counts, keys) == (4, [4, 2, 4, 2], ["s0", "s1"])
PY
