#!/usr/bin/env bash
# Write WebVision 1.0 as the sets DST/google, DST/flickr and DST/val, by its own lists of `path class` lines.
# SRC: the folder with info/, google/, flickr/ and val_images_256/. Duplicates and small images of the crawled sets are left out.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 SRC DST [OPTION …]" >&2
  exit 2
fi
src=$1 dst=$2
shift 2
for part in google flickr; do
  esvit-scale shards create "$src/info/train_filelist_$part.txt" "$dst/$part" --from list --label last --root "$src" \
    --drop-duplicates --min-side 64 "$@"
done
esvit-scale shards create "$src/info/val_filelist.txt" "$dst/val" --from list --label last --root "$src/val_images_256"
