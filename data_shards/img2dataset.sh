#!/usr/bin/env bash
# Write the output of img2dataset (LAION, COYO, DataComp, … in output_format webdataset or files) as a shard set with
# captions and metadata. Parts that img2dataset has not finished are left out and named.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 SRC DST [OPTION …]" >&2
  exit 2
fi
src=$1 dst=$2
shift 2
esvit-scale shards create "$src" "$dst" --from img2dataset --min-side 64 "$@"
