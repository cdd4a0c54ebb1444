#!/usr/bin/env bash
# Image folder (class subfolders, or flat) → shard set, then a check of all of it. Further options go to `create`.
# Safe to repeat: an interrupted run goes on where it stopped, a finished one is left as it is.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 SRC DST [OPTION …]" >&2
  exit 2
fi
src=$1 dst=$2
shift 2
esvit-scale shards create "$src" "$dst" --from folder "$@"
esvit-scale shards verify "$dst"
