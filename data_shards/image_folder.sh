#!/usr/bin/env bash
# Write a folder of images (class subfolders, or flat) as a shard set, then verify it. Further options go to `create`.
# Safe to repeat: an interrupted run continues where it stopped, a finished set is left as it is.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 SRC DST [OPTION …]" >&2
  exit 2
fi
src=$1 dst=$2
shift 2
esvit-scale shards create "$src" "$dst" --from folder "$@"
esvit-scale shards verify "$dst"
