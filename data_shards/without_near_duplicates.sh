#!/usr/bin/env bash
# Write any source as a shard set without images that are the same or look alike. DST.keep.txt.dropped.tsv names those
# that were left out.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 SRC DST [OPTION …]" >&2
  exit 2
fi
src=$1 dst=$2
shift 2
[ -e "$dst.keep.txt" ] || esvit-scale shards duplicates "$src" --out "$dst.keep.txt" --near
esvit-scale shards create "$src" "$dst" --keep "$dst.keep.txt" "$@"
