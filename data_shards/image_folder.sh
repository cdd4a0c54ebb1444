#!/usr/bin/env bash
# Image folder (class subfolders, or flat) → shard set, then a check of all of it.
# Safe to repeat: an interrupted run starts over, a finished one is left as it is.
set -euo pipefail

if [ $# -ne 2 ]; then
  echo "usage: $0 SRC DST" >&2
  exit 2
fi
esvit-scale shards create "$1" "$2"
esvit-scale shards verify "$2"
