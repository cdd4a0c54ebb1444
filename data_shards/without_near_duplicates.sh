#!/usr/bin/env bash
# Any source → shard set without files that are the same or look the same. What was left out: DST.keep.txt.dropped.tsv
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 SRC DST [OPTION …]" >&2
  exit 2
fi
src=$1 dst=$2
shift 2
[ -e "$dst.keep.txt" ] || esvit-scale shards duplicates "$src" --out "$dst.keep.txt" --near
esvit-scale shards create "$src" "$dst" --keep "$dst.keep.txt" "$@"
