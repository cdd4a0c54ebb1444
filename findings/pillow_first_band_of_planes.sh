#!/usr/bin/env bash
# Pillow 13.0.0 opens a TIFF of many bands in separate planes as a grey picture of its first band, without an error.
#
# Expected: Pillow refuses a satellite image of 13 bands, for which it has no mode, as it does when the same bands
# lie pixel by pixel: "cannot identify image file".
# Observed: with PlanarConfiguration 2 the file opens as mode I;16 (16 bits) or L (8 bits), image.getbands() has one
# name, load() succeeds, and twelve of thirteen bands are gone. SamplesPerPixel (tag 277) still says 13.
#
# Output:
#   pixel by pixel: UnidentifiedImageError · planes, 16 bits: I;16, equal to band 1 · planes, 8 bits: L, equal to band 1
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 numpy==2.2.6 tifffile==2025.5.10
"$work/venv/bin/python" - <<'PY'
import io

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

bands = np.random.default_rng(0).integers(0, 65536, (13, 32, 64), np.uint16)  # [band, row, column]


def opened(pixels, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="minisblack", **options)
    try:
        image = Image.open(file)
    except UnidentifiedImageError:
        return "not identified", None, None
    return image.mode, np.asarray(image), image.tag_v2[277]


mode, _, _ = opened(bands.transpose(1, 2, 0), planarconfig="contig")
print("pixel by pixel:", mode)
assert mode == "not identified", mode
for depth, stored in (("16 bits", bands), ("8 bits", (bands >> 8).astype(np.uint8))):
    mode, pixels, samples = opened(stored, planarconfig="separate", compression="zlib")
    print(f"planes, {depth}:", mode, "samples a pixel:", samples)
    assert mode in ("I;16", "L"), f"{mode}: the behaviour has changed"
    assert samples == 13 and np.array_equal(pixels, stored[0])
PY
