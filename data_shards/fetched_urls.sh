#!/usr/bin/env bash
# Write downloaded images that a CSV or TSV names as a shard set with captions.
# TABLE needs the columns file (path below IMAGES) and caption; for other names add --image-column NAME --caption NAME.
# Rows whose file is missing or broken go to quarantine.jsonl. With classes in a column: add --label COLUMN.
set -euo pipefail

if [ $# -lt 3 ]; then
  echo "usage: $0 TABLE IMAGES DST [OPTION …]" >&2
  exit 2
fi
table=$1 images=$2 dst=$3
shift 3
esvit-scale shards create "$table" "$dst" --root "$images" --image-column file --caption caption --min-side 32 "$@"
