#!/usr/bin/env bash
# Hugging Face datasets 5.2.0 silently loses images of a WebDataset tar whose type does not occur among its first samples.
#
# Expected: load_dataset("webdataset") either reads a tar of .jpg and .png images, as webdataset itself does, or refuses
# it; it does refuse one where both types are among the first samples ("don't share … the same types").
# Observed: the columns come from the first five samples alone. An image of another type after them has no column:
# its row is there, with its label, and its image is None.
#
# Output (8 samples, two of them .png): the .png first: refused; the .png last: 8 rows, images None in rows 6, 7
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pillow==13.0.0
HF_HOME="$work/hf" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work" <<'PY'
import io
import sys
import tarfile

import datasets
from PIL import Image

datasets.disable_progress_bars()


def rows(name, png):
    path = f"{sys.argv[1]}/{name}.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(8):
            image = io.BytesIO()
            Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(image, "PNG" if i in png else "JPEG")
            for member, data in ((f"{i}.{'png' if i in png else 'jpg'}", image.getvalue()), (f"{i}.cls", b"1")):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return list(datasets.load_dataset("webdataset", data_files=path, split="train"))


try:
    rows("early", (0, 1))
    refused = False
except ValueError as error:
    refused = "same types" in str(error)
late = rows("late", (6, 7))
lost = [i for i, row in enumerate(late) if row["jpg"] is None]
print(f"the .png first: {'refused' if refused else 'read'}; the .png last: {len(late)} rows, images None in rows {lost}")
assert refused
assert (len(late), lost, late[7]["cls"]) == (8, [6, 7], 1)
PY
