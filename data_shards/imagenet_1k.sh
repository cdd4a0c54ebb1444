#!/usr/bin/env bash
# Write ImageNet-1K as the sets DST/train and DST/val, with the same 1,000 classes (wnids in alphabetical order).
# SRC: a folder with train/ and val/ in class folders, or Kaggle's ILSVRC/ (Data/CLS-LOC/, LOC_val_solution.csv).
# 1,281,167 + 50,000 images, about 145 GB; the image files keep their bytes.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 SRC DST [OPTION …]" >&2
  exit 2
fi
src=$1 dst=$2
shift 2
esvit-scale shards create "$src" "$dst" --from imagenet "$@"
esvit-scale shards verify "$dst/train"
esvit-scale shards verify "$dst/val"
