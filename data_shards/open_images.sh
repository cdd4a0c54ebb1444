#!/usr/bin/env bash
# Write Open Images as a shard set without classes (its images have several labels), shrunk to a short side of 512.
# SRC: the folder of images, in subfolders (train_0/ … train_f/) or flat. 9 million images, 1 MB each before shrinking.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 SRC DST [OPTION …]" >&2
  exit 2
fi
src=$1 dst=$2
shift 2
esvit-scale shards create "$src" "$dst" --from folder --label none --short-side 512 "$@"
