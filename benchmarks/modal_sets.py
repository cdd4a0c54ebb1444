"""Two sets of real data of more than images, from Debian packages, as shard sets.

| set | package | a sample | held out |
|---|---|---|---|
| stamps | tuxpaint-stamps-default | a stamp on white (PNG), its caption (.txt French; .json fields fr and en), its spoken French name; the class is its topic | a fifth of the subjects |
| sounds | sonic-pi-samples | a recording; the class is the first part of its name, if five or more have it | a fifth of every class |

    apt-get download tuxpaint-stamps-default sonic-pi-samples; for p in *.deb; do dpkg -x $p unpacked; done
    python benchmarks/modal_sets.py stamps --source unpacked --out shards    # shards/stamps-modal-train and -test
    python benchmarks/modal_sets.py speed --source unpacked                  # samples/s of one process

A *subject* of stamps is what shares a topic and a name but for a number (`frog`, `frog-1`), a French caption, or the bytes of
the picture: all of it is on one side. Stamps that exist as SVG only are samples of caption and speech without an image.
"""

import argparse
import hashlib
import io
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from learning_sets import square, subject

from esvit_scale.config import Config, validate
from esvit_scale.data import media, shard_writer, signals
from esvit_scale.data.crops import generator_of
from esvit_scale.data.keys import keys_of
from esvit_scale.data.shard_file import Sample
from esvit_scale.data.worker_batch import decode_for_crops

LANGUAGES = ("fr", "en")
CLASS_AT_LEAST = 5  # recordings
HELD_OUT = 5  # every so many subjects
SAMPLES_PER_SHARD = 200
SPEED_SECONDS = 3.0  # for which one row of the table of speeds is measured, at least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("stamps", "sounds", "speed"))
    parser.add_argument("--source", type=Path, required=True, help="folder in which the Debian package was unpacked")
    parser.add_argument("--out", type=Path, default=Path("shards"), help="folder for the sets (default: shards)")
    options = parser.parse_args()
    if options.name == "speed":
        speed(options.source)
        return
    for path, part in zip(
        shards(options.name, options.source, options.out), read(options.name, options.source)[:2], strict=True
    ):
        has = {"image": sum(bool(s.ext) for s in part)}
        has |= {ext: sum(ext in s.extras for s in part) for ext in ("ogg", "flac", "txt", "json")}
        print(path, len(part), *(f"{name} {n}" for name, n in has.items() if n))


class Halves(NamedTuple):
    """The samples to train on, those to measure on, and the classes."""

    train: list[Sample]
    held_out: list[Sample]
    classes: list[str]


def shards(name: str, source: Path, folder: Path) -> tuple[Path, Path]:
    """Write a set's two halves as shard sets, unless they are there, and return their folders."""
    sets = (folder / f"{name}-modal-train", folder / f"{name}-modal-test")
    if not all((path / "manifest.json").is_file() for path in sets):
        halves = read(name, source)
        for path, found in zip(sets, halves[:2], strict=True):
            shard_writer.write_samples(found, path, halves.classes, SAMPLES_PER_SHARD, path.name)
    return sets


def read(name: str, source: Path) -> Halves:
    """Return the halves of `stamps` or `sounds`; raise SystemExit where the package is not unpacked in `source`."""
    return stamps(_folder(source, "stamps")) if name == "stamps" else sounds(_folder(source, "samples"))


def _folder(source: Path, name: str) -> Path:
    found = sorted(path for path in source.rglob(name) if path.is_dir())
    if not found:
        raise SystemExit(f"modal_sets.py: --source: {source} holds no folder {name}; unpack the package there")
    return found[0]


# --- stamps ----------------------------------------------------------------------------------------------------------


class Stamp(NamedTuple):
    """One stamp: its place without an ending, and what there is of it."""

    stem: str  # relative to the folder of stamps
    texts: dict[str, str]  # language → caption
    picture: Path | None
    speech: Path | None

    @property
    def topic(self) -> str:
        """Return the first folder of the stamp, which is its class."""
        return self.stem.partition("/")[0]


def stamps(root: Path) -> Halves:
    """Return the stamps, divided by subjects: a fifth of these, by a hash, is held out."""
    found = [stamp for path in sorted(root.rglob("*.txt")) if (stamp := _stamp(root, path)).picture or stamp.speech]
    parts: tuple[list[Stamp], list[Stamp]] = ([], [])
    for stamp, name in zip(found, subjects(found), strict=True):
        parts[_hash(name) % HELD_OUT == 0].append(stamp)
    classes = sorted({stamp.topic for stamp in found})
    train, held_out = (
        [
            _sample(stamp, key, classes.index(stamp.topic))
            for stamp, key in zip(part, keys_of([s.stem for s in part]), strict=True)
        ]
        for part in parts
    )
    return Halves(sorted(train, key=lambda s: _hash(s.key)), sorted(held_out, key=lambda s: _hash(s.key)), classes)


def _stamp(root: Path, path: Path) -> Stamp:
    """Return the stamp of a file of captions, whose first line is English and the others `LANGUAGE.utf8=…`."""
    first, *lines = path.read_text("utf-8", "replace").splitlines() or [""]
    texts = {"en": first.strip()}
    texts |= {line[:2]: line[8:].strip() for line in lines if line[2:8] == ".utf8="}
    picture, speech = path.with_suffix(".png"), path.with_name(f"{path.stem}_desc_fr.ogg")
    return Stamp(
        path.relative_to(root).with_suffix("").as_posix(),
        {name: texts[name] for name in LANGUAGES if texts.get(name)},
        picture if picture.is_file() else None,
        speech if speech.is_file() else None,
    )


def subjects(found: list[Stamp]) -> list[str]:
    """Return each stamp's subject: the first name of all that are joined by name, French caption or picture."""
    of: dict[str, str] = {}  # a sign that a stamp shows → the name of its subject
    names = [f"{stamp.stem.rpartition('/')[0]}/{subject(stamp.stem.rpartition('/')[2])}" for stamp in found]
    joined = {name: name for name in names}

    def root_of(name: str) -> str:
        while joined[name] != name:
            name = joined[name]
        return name

    for stamp, name in zip(found, names, strict=True):
        signs = [f"text {stamp.texts.get('fr', '').lower()}"] if stamp.texts.get("fr") else []
        signs += [f"picture {hashlib.sha256(stamp.picture.read_bytes()).hexdigest()}"] if stamp.picture else []
        for sign in signs:
            one, other = sorted((root_of(name), root_of(of.setdefault(sign, name))))
            joined[other] = one
    return [root_of(name) for name in names]


def _sample(stamp: Stamp, key: str, label: int) -> Sample:
    extras = {"json": json.dumps(stamp.texts, ensure_ascii=False).encode()}
    if "fr" in stamp.texts:
        extras["txt"] = stamp.texts["fr"].encode()
    if stamp.speech:
        extras["ogg"] = stamp.speech.read_bytes()
    return Sample(key, label, "png" if stamp.picture else "", _png(stamp.picture) if stamp.picture else b"", extras)


def _png(picture: Path) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(square(picture)).save(out, "PNG")
    return out.getvalue()


# --- sounds ----------------------------------------------------------------------------------------------------------


def sounds(root: Path) -> Halves:
    """Return the recordings of classes of CLASS_AT_LEAST or more; of every class, a fifth by a hash is held out."""
    files: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(root.rglob("*.flac")):
        files[path.stem.partition("_")[0]].append(path)
    classes = sorted(name for name, found in files.items() if len(found) >= CLASS_AT_LEAST)
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for label, name in enumerate(classes):
        for place, path in enumerate(sorted(files[name], key=lambda path: _hash(path.stem))):
            sample = Sample(path.stem, label, "", b"", {"flac": path.read_bytes()})
            parts[place % HELD_OUT == 0].append(sample)
    train, held_out = (sorted(part, key=lambda s: _hash(s.key)) for part in parts)
    return Halves(train, held_out, classes)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


# --- speed -----------------------------------------------------------------------------------------------------------


def speed(source: Path) -> None:
    """Print how many samples a second one process reads of each modality, decoded, cut and resampled."""
    config = validate(
        {
            "data": {
                "global_crops": {"size": 64},
                "local_crops": [{"size": 32, "count": 4}],
                "audio": {"views": 1},
                "video": {"views": 1},
                "text": {"views": 1},
            }
        },
        "speed",
    )
    stamps_, sounds_ = read("stamps", source).train, read("sounds", source).train
    clip = _clip()
    rows: list[tuple[str, Iterator[Callable[[], Any]]]] = [
        ("image: 2 × 64 and 4 × 32 pixels of a 64-pixel PNG", _images(config, stamps_)),
        ("audio: 2 s at 16 kHz of a spoken name (Ogg, 44.1 kHz, 1 s)", _signals(config, "audio", stamps_)),
        ("audio: 2 s at 16 kHz of a recording (FLAC, 44.1 kHz, stereo)", _signals(config, "audio", sounds_)),
        ("text: a caption", _signals(config, "text", stamps_)),
        ("video: 16 frames of 32 pixels of a clip (H.264, 320x240, 300 frames)", _signals(config, "video", [clip])),
    ]
    print("| one view | samples/s, one process |\n|---|---|")
    for name, calls in rows:
        next(calls)()  # imports, filters
        best = max(_rate(calls) for _ in range(3))
        print(f"| {name} | {best:,.0f} |")


def _rate(calls: Iterator[Callable[[], Any]]) -> float:
    """Return calls per second of processor time."""
    began, count = time.process_time(), 0
    while time.process_time() - began < SPEED_SECONDS / 3:
        next(calls)()
        count += 1
    return count / (time.process_time() - began)


def _images(config: Config, found: list[Sample]) -> Iterator[Callable[[], Any]]:
    epoch = 0
    while True:
        for sample in filter(lambda s: s.ext, found):
            yield lambda s=sample, e=epoch: _cut(*decode_for_crops(config, e, s.key, s.data), config)  # type: ignore[misc]
        epoch += 1


def _cut(placed: Any, reductions: list[int], pyramid: Any, config: Config) -> None:
    for crop, reduction, size in zip(placed, reductions, config.crop_sizes, strict=True):
        pyramid.cut(crop.box, reduction, crop.flip, np.empty((size, size, 3), np.uint8))


def _signals(config: Config, modality: str, found: list[Sample]) -> Iterator[Callable[[], Any]]:
    epoch = 0
    while True:
        for sample in found:
            if signals.member_of(sample.extras, modality):
                draws = [signals.draw(0, epoch, sample.key, modality, 0)]
                yield lambda s=sample, d=draws: signals.views_of(  # type: ignore[misc]
                    config.data, modality, list(s.extras), s.extras.__getitem__, d
                )
        epoch += 1


def _clip() -> Sample:
    """Return a clip of 10 s: a smooth picture that moves."""
    av = media.video_library()
    rng, out = generator_of("clip"), io.BytesIO()
    waves = np.add.outer(np.arange(240) * rng.random() / 9, np.arange(320) * rng.random() / 9)
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for n in range(300):
            grey = (127 + 120 * np.sin(waves + n / 7)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.stack([grey] * 3, 2), format="rgb24")))
        container.mux(stream.encode())
    return Sample("clip", None, "", b"", {"mp4": out.getvalue()})


if __name__ == "__main__":
    main()
