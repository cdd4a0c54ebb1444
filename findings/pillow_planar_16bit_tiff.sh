#!/usr/bin/env bash
# Pillow 13.0.0 reads an uncompressed 16-bit RGB TIFF with separate planes (PlanarConfiguration 2) wrongly, without an error.
#
# Expected: a TIFF that Pillow opens as RGB has the file's colours, rounded to 8 bits; whether bands lie pixel by pixel or
# plane by plane is a matter of layout. Both layouts are baseline practice for scanners, microscopes and GIS exports.
# Observed: for 16 bits, RGB and no compression, the planes are read as if they had 8 bits a pixel: image.load()
# raises nothing, and the pixels are other bytes of the file. The same planes with deflate compression, the same picture
# with contiguous pixels, and planes of 8 bits are read correctly.
#
# Output (largest difference from the upper byte of each value):
#   16 bits: contiguous 0 · planes 251 · planes with deflate 0      8 bits: planes 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 numpy==2.2.6 tifffile==2025.5.10
"$work/venv/bin/python" - <<'PY'
import io

import numpy as np
import tifffile
from PIL import Image

values = np.random.default_rng(0).integers(0, 65536, (3, 32, 64), np.uint16)  # [band, row, column]


def difference(pixels, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="rgb", **options)
    opened = Image.open(file)
    opened.load()
    assert opened.mode == "RGB", opened.mode
    return int(np.abs(np.asarray(opened).astype(int) - (values.transpose(1, 2, 0) >> 8)).max())


found = {
    "16 bits, contiguous": difference(values.transpose(1, 2, 0), planarconfig="contig"),
    "16 bits, planes": difference(values, planarconfig="separate"),
    "16 bits, planes, deflate": difference(values, planarconfig="separate", compression="zlib"),
    "8 bits, planes": difference((values >> 8).astype(np.uint8), planarconfig="separate"),
}
for name, value in found.items():
    print(f"{name:26} {value}")
assert found.pop("16 bits, planes") > 100, "planes are read rightly now: the behaviour has changed"
assert max(found.values()) == 0, found
PY
