"""Four labelled image sets for learning.py: clothes and stamps from Debian packages, patches of photographs and digits.

| set | where it comes from | training images | test images |
|---|---|---|---|
| fashion | Debian's dataset-fashion-mnist, unpacked (`dpkg -x`) | the first 7,000 | the first 3,000 of the test file |
| fashion-all | the same | 60,000 (50,000 for the validation half) | the whole test file, 10,000 |
| stamps | Debian's tuxpaint-stamps-default, unpacked | topics with 20 pictures or more, 6 in 10 subjects | 2 in 10 subjects |
| demo | the photographs of the demo | patches of one half of each | patches of the other half |
| digits | scikit-learn's digits | the first 1,000 | the last 397 |

    python benchmarks/learning_sets.py NAME [--source FOLDER] [--half test] --out shards

writes the training images and one half of the others as shard sets, OUT/NAME-train and OUT/NAME-HALF.

A setting is chosen on the *validation* half and measured once on the *test* half; the two have no image in common. For
stamps, variants of one drawing (same name but for a number) are on one side. Digits and patches are smoke tests.
"""

import argparse
import gzip
import hashlib
import io
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from esvit_scale.data import samples, shard_writer
from esvit_scale.data.shard_file import Sample

NAMES = ("fashion", "fashion-all", "stamps", "demo", "digits")
FASHION = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
TOPIC_AT_LEAST = 20  # pictures
STAMP_SIDE = 64  # pixels: stamps are reduced to squares of this size
SAMPLES_PER_SHARD = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--source", type=Path, help="folder in which the set's Debian package was unpacked")
    parser.add_argument("--half", choices=("validation", "test"), default="test", help="the other images to write")
    parser.add_argument("--out", type=Path, default=Path("shards"), help="folder for the sets (default: shards)")
    options = parser.parse_args()
    print(*shards(options.name, options.half, options.source, options.out), sep="\n")


class Halves(NamedTuple):
    """The images to train on, with those to measure on."""

    train: list[Sample]
    held_out: list[Sample]
    classes: list[str]


def shards(name: str, half: str, source: Path | None, folder: Path, most: int | None = None) -> tuple[Path, Path]:
    """Write the training images and one half of the others as shard sets; return the two folders.

    Args:
        half: "validation" or "test".
        source: the folder in which the Debian package was unpacked, for fashion and stamps.
        folder: where the sets are kept; sets that are there already are not written again.
        most: the largest number of training images, and of others; for trying the script out.

    Raises:
        SystemExit: the source or the half is missing.
    """
    part = "" if most is None else f"-{most}"
    # The larger set of clothes has so few others that its validation half is taken from the training images.
    training = f"{name}-train-{half}" if name == "fashion-all" else f"{name}-train"
    sets = (folder / f"{training}{part}", folder / f"{name}-{half}{part}")
    if not all((path / "manifest.json").is_file() for path in sets):
        halves = read(name, half, source)
        for path, found in zip(sets, (halves.train, halves.held_out), strict=True):
            shard_writer.write_samples(found[:most], path, halves.classes, SAMPLES_PER_SHARD, path.name)
    return sets


def read(name: str, half: str, source: Path | None) -> Halves:
    """Return the set's training images, and those of its validation or test half."""
    if name in ("fashion", "fashion-all", "stamps") and source is None:
        raise SystemExit(f"learning.py: --source: the set {name} needs the folder in which its package was unpacked")
    if name == "demo":
        if half == "validation":
            raise SystemExit("learning.py: --half: the demo's patches have a test half alone; they are a smoke test")
        train, test = samples.demo_samples()
        return Halves(train, test, list(samples.CLASSES))
    if name == "digits":
        return _digits(half)
    assert source is not None
    return _stamps(half, source) if name == "stamps" else _fashion(half, source, name == "fashion-all")


def _fashion(half: str, source: Path, every: bool) -> Halves:
    def part(file: str, rows: slice) -> list[Sample]:
        pixels = np.frombuffer(_unzipped(source, f"{file}-images-idx3-ubyte.gz"), np.uint8, offset=16)
        labels = np.frombuffer(_unzipped(source, f"{file}-labels-idx1-ubyte.gz"), np.uint8, offset=8)
        images = pixels.reshape(-1, 28, 28)[rows]
        return [
            _sample(f"{file}/{i:05d}", int(label), image)
            for i, (image, label) in enumerate(zip(images, labels[rows], strict=True))
        ]

    if every:
        cut = 50_000 if half == "validation" else 60_000
        held_out = part("train", slice(cut, 60_000)) if half == "validation" else part("t10k", slice(0, 10_000))
        return Halves(part("train", slice(0, cut)), held_out, FASHION)
    held_out = part("train", slice(7000, 10000)) if half == "validation" else part("t10k", slice(0, 3000))
    return Halves(part("train", slice(0, 7000)), held_out, FASHION)


def _unzipped(source: Path, name: str) -> bytes:
    found = sorted(source.rglob(name))
    if not found:
        raise SystemExit(f"learning.py: --source: {source} holds no {name}; unpack dataset-fashion-mnist there")
    return gzip.decompress(found[0].read_bytes())


def _digits(half: str) -> Halves:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * 15.9375).astype(np.uint8)
    every = [
        _sample(f"{i:05d}", int(label), image) for i, (image, label) in enumerate(zip(pixels, labels, strict=True))
    ]
    return Halves(every[:1000], every[1000:1400] if half == "validation" else every[1400:], [str(i) for i in range(10)])


def _stamps(half: str, source: Path) -> Halves:
    roots = sorted(path for path in source.rglob("stamps") if path.is_dir())
    if not roots:
        raise SystemExit(
            f"learning.py: --source: {source} holds no folder stamps; unpack tuxpaint-stamps-default there"
        )
    files = sorted(roots[0].rglob("*.png"))
    topics = {path: "/".join(path.relative_to(roots[0]).parts[:2]) for path in files}
    counts = Counter(topics.values())
    classes = sorted(topic for topic, count in counts.items() if count >= TOPIC_AT_LEAST)
    wanted = (8, 9) if half == "test" else (6, 7)
    train: list[Sample] = []
    held_out: list[Sample] = []
    for path in files:
        if topics[path] in classes:
            tenth = tenth_of(topics[path], path.stem)
            to = train if tenth < 6 else held_out if tenth in wanted else None
            if to is not None:
                to.append(_sample(path.relative_to(roots[0]).as_posix(), classes.index(topics[path]), square(path)))
    # Interleaved by hash, so that --most and a shard hold every topic.
    train.sort(key=lambda sample: _digest(sample.key))
    held_out.sort(key=lambda sample: _digest(sample.key))
    return Halves(train, held_out, classes)


def subject(stem: str) -> str:
    """Return what a stamp shows, without the number that tells its variants apart: `frog-1` and `frog` are one subject."""
    return re.sub(r"[-_ ]?\d+$", "", stem.lower()) or stem.lower()


def tenth_of(topic: str, stem: str) -> int:
    """Return the tenth of the subjects, 0 to 9, to which a stamp belongs: a hash of topic and subject."""
    return _digest(f"{topic}/{subject(stem)}") % 10


def square(path: Path) -> Any:
    """Return a picture on a white square of STAMP_SIDE pixels, uint8 [S, S, 3], as large as it fits."""
    with Image.open(path) as image:
        picture = image.convert("RGBA")
    picture.thumbnail((STAMP_SIDE, STAMP_SIDE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (STAMP_SIDE, STAMP_SIDE), "white")
    canvas.alpha_composite(picture, ((STAMP_SIDE - picture.width) // 2, (STAMP_SIDE - picture.height) // 2))
    return np.asarray(canvas.convert("RGB"))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _sample(key: str, label: int, pixels: Any) -> Sample:
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    return Sample(key.removesuffix(".png"), label, "png", png.getvalue())


if __name__ == "__main__":
    main()
