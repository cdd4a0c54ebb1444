#!/usr/bin/env bash
# Write parquet files with images inside, as Hugging Face stores data sets (columns image and label), as a shard set.
# Needs pyarrow: pip install 'esvit-scale[parquet]'. For other columns add --image-column NAME --label NAME.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 SRC DST [OPTION …]" >&2
  exit 2
fi
src=$1 dst=$2
shift 2
esvit-scale shards create "$src" "$dst" --from parquet --image-column image --label label "$@"
