"""2,000 mutated files and tars: a batch, or a named reason; never a crash, a hang, or a loss that nobody tells of."""

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esvit_scale.data import manifest as manifests
from esvit_scale.data.decode import BadImage
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.reader import ShardReader
from esvit_scale.data.shard_table import Shard, ShardTable
from esvit_scale.data.shard_writer import Sample, write_samples
from esvit_scale.data.tar_stream import TarSamples
from esvit_scale.data.worker_batch import decode_for_crops
from tests.data.conftest import config_with, encoded, picture

FILES, TARS, SAMPLES = 1400, 300, 6  # every tar is read in two ways


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    """Bytes changed, a stretch cut out, doubled or zeroed, or the end lost."""
    out = bytearray(data)
    kind = rng.integers(5)
    at, length = int(rng.integers(len(out))), int(rng.integers(1, 600))
    if kind == 0:
        for place in rng.integers(0, len(out), rng.integers(1, 12)):
            out[place] = rng.integers(256)
    elif kind == 1:
        del out[at : at + length]
    elif kind == 2:
        out[at:at] = out[at : at + length]
    elif kind == 3:
        out[at : at + length] = bytes(min(length, len(out) - at))
    else:
        del out[at:]
    return bytes(out)


def originals() -> list[bytes]:
    image = picture(0, 60, 45)
    options = [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {}), ("TIFF", {})]
    files = [encoded(image, kind, **more) for kind, more in options]
    files += [encoded(image.convert("CMYK"), "JPEG"), encoded(image.convert("P")), encoded(image.convert("LA"))]
    exif = turned()
    return [*files, encoded(image, "JPEG", exif=exif), encoded(image, "BMP"), encoded(image, "PPM")]


def turned() -> bytes:

    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


def test_mutated_image_files_decode_or_raise_bad_image() -> None:
    rng, config, files = np.random.default_rng(0), config_with(), originals()
    reasons, slowest = [], 0.0
    for i in range(FILES):
        data, began = mutated(rng, files[i % len(files)]), time.process_time()
        try:
            crops, reductions, pyramid = decode_for_crops(config, 0, str(i), data)
            for crop, reduction, size in zip(crops, reductions, config.crop_sizes, strict=True):
                pyramid.cut(crop.box, reduction, crop.flip, np.empty((size, size, 3), np.uint8))
        except BadImage as error:
            reasons.append(str(error))
        slowest = max(slowest, time.process_time() - began)
    assert FILES / 4 < len(reasons) < FILES
    assert all(text and "\n" not in text for text in reasons)
    assert slowest < 2


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A tar and its index."""
    samples = [Sample(f"s{i}", i, "png", encoded(picture(i, 12, 9))) for i in range(SAMPLES)]
    written = write_samples(samples, tmp_path_factory.mktemp("set") / "set", (), SAMPLES)
    path = written.root / written.shards[0].name
    return path.read_bytes(), manifests.index_path(path).read_bytes()


def read_all(root: Path, name: str) -> tuple[int, int]:
    """Good and bad samples of an indexed shard."""
    reader, good = ShardReader(Manifest(root, ShardTable([Shard(name, SAMPLES, 0, "")]))), 0
    bad = 0
    for i in range(SAMPLES):
        try:
            entry = reader.entry(0, i)
            decode_for_crops(config_with(), 0, entry.key, reader.image(0, entry))
            reader.label(0, entry)
            good += 1
        except BadImage:
            bad += 1
    reader.close()
    return good, bad


def test_mutated_shards_give_samples_or_expected_errors(tmp_path: Path, tar: tuple[bytes, bytes]) -> None:
    rng, (data, index) = np.random.default_rng(1), tar
    name = "shard-000000.tar"
    (tmp_path / manifests.MANIFEST).write_text("{}")
    lost = 0
    for i in range(TARS):
        (tmp_path / name).write_bytes(mutated(rng, data))
        side_car = manifests.index_path(tmp_path / name)
        if i % 3 == 0:  # the headers are read instead
            side_car.unlink(missing_ok=True)
        else:
            side_car.write_bytes(mutated(rng, index) if i % 3 == 1 else index)
        assert sum(read_all(tmp_path, name)) == SAMPLES
        told: list[dict[str, object]] = []
        came = [raw for raw in TarSamples().of([str(tmp_path / name)], 0, told) if raw.image]
        assert len(came) >= SAMPLES or told, i
        lost += len(came) < SAMPLES
    assert lost > TARS / 10
