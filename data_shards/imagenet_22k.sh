#!/usr/bin/env bash
# Write ImageNet-22K (or -21K, or ILSVRC2012_img_train.tar unpacked once) as a shard set.
# SRC: the folder of n*.tar files, one per class; they are not unpacked. The tar's name is the class.
# About 14 million images, 1.3 TB; shrinking them to a short side of 256 (add: --short-side 256) needs a fifth of that.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 SRC DST [OPTION …]" >&2
  exit 2
fi
src=$1 dst=$2
shift 2
esvit-scale shards create "$src" "$dst" --from tars --label archive "$@"
