"""The cache on disk: what makes an entry, what is kept, and what interrupted or parallel writers leave."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from esvit_scale.data import shard_writer
from esvit_scale.errors import UserError
from esvit_scale.evaluate import feature_cache
from esvit_scale.evaluate.feature_cache import FeatureBatch, FeatureSet, load_or_compute, source_digest, trunk_digest
from esvit_scale.evaluate.features import extract, last_blocks
from esvit_scale.models.initialize import initialize
from esvit_scale.models.resnet import ResNet
from esvit_scale.models.swin import Swin
from esvit_scale.models.vit import ViT
from tests import launcher, tiny

SOURCE = Path("photos")


def rows(n: int = 7, width: int = 3) -> Iterator[FeatureBatch]:
    for start in range(0, n, 3):
        at = torch.arange(start, min(start + 3, n))
        yield FeatureBatch(at[:, None] + torch.zeros(width), [f"é{i}" for i in at.tolist()], at % 2, at + 1)


def stored(cache: Path, **key: object) -> FeatureSet:
    return load_or_compute(cache, key, SOURCE, 9, rows)


def test_cached_features_are_not_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def never() -> Iterator[FeatureBatch]:
        raise AssertionError("computed again")

    first = stored(tmp_path, size=1)
    again = load_or_compute(tmp_path, {"size": 1}, SOURCE, 9, never)
    for found in (first, again):
        assert torch.equal(found.features, torch.arange(7.0)[:, None].expand(-1, 3))
        assert found.keys == [f"é{i}" for i in range(7)]
        assert found.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
        assert found.numbers is not None
        assert found.numbers.tolist() == list(range(1, 8))
        assert found.left_out == 2
    assert [r.getMessage() for r in caplog.records] == [
        "photos: 2 of 9 images could not be read when its features were computed"
    ]
    with pytest.raises(AssertionError):
        load_or_compute(tmp_path, {"size": 2}, SOURCE, 9, never)
    assert len(list(tmp_path.iterdir())) == 1  # nothing is left of what failed


def test_cached_arrays_load_without_pickle(tmp_path: Path) -> None:
    stored(tmp_path)
    (folder,) = tmp_path.iterdir()
    assert np.load(folder / "features.npy", allow_pickle=False).shape == (7, 3)
    assert json.loads((folder / "about.json").read_text())["source"] == "photos"
    assert sorted(p.name for p in folder.iterdir()) == [
        *("about.json", "features.npy", "keys.jsonl", "labels.npy", "numbers.npy")
    ]


def test_changes_to_loaded_features_are_not_written(tmp_path: Path) -> None:
    stored(tmp_path).features.fill_(5)
    assert stored(tmp_path).features[0, 0] == 0


def test_first_of_two_writers_wins(tmp_path: Path) -> None:
    def slower() -> Iterator[FeatureBatch]:
        program = "from tests.evaluate.test_feature_cache import *; stored(Path(sys.argv[1]))"
        assert launcher.fork("-c", program, tmp_path).wait(60) == 0
        yield FeatureBatch(torch.full((1, 3), 99.0), ["late"], torch.zeros(1), torch.zeros(1))

    found = load_or_compute(tmp_path, {}, SOURCE, 9, slower)
    assert found.keys[0] == "é0"
    assert len(list(tmp_path.iterdir())) == 1


def test_leftovers_of_dead_writers_are_removed(tmp_path: Path) -> None:
    stored(tmp_path)
    (folder,) = tmp_path.iterdir()
    feature_cache.shutil.rmtree(folder)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    alive = os.getppid()
    for pid in (gone.pid, alive):
        (tmp_path / f".{folder.name}.{socket.gethostname()}.{pid}.partial").mkdir()
    stored(tmp_path)
    assert sorted(p.name.split(".")[-2] if p.name.startswith(".") else p.name for p in tmp_path.iterdir()) == sorted(
        [str(alive), folder.name]
    )


def test_source_without_readable_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="photos: holds no readable image"):
        load_or_compute(tmp_path, {}, SOURCE, 9, lambda: iter(()))
    assert list(tmp_path.iterdir()) == []


def test_trunk_digest_depends_on_weights_and_geometry() -> None:
    def swin(**changes: object) -> Swin:
        torch.manual_seed(0)
        return Swin(**({"embed_dim": 8, "depths": (1, 2), "heads": (1, 2), "window": 4, "size": 32} | changes))  # type: ignore[arg-type]

    same, other = swin(), swin()
    assert trunk_digest(same.train()) == trunk_digest(other.eval())
    with torch.no_grad():
        other.norm.bias[0] += 1e-6
    digests = {trunk_digest(t) for t in (same, other, swin(heads=(2, 4)), swin(depths=(2, 2)), swin(size=64))}
    assert len(digests) == 5


def test_source_digest_depends_on_content(tmp_path: Path) -> None:
    one, two = tiny.shards(tmp_path / "one", 12), tiny.shards(tmp_path / "two", 12)
    assert source_digest(one) == source_digest(two)
    assert source_digest(tiny.shards(tmp_path / "three", 13)) != source_digest(one)
    folder = tmp_path / "folder" / "a"
    folder.mkdir(parents=True)
    (folder / "1.png").write_bytes(b"1")
    before = source_digest(folder.parent)
    (folder / "1.png").write_bytes(b"12")
    after = source_digest(folder.parent)
    (folder / "1.png").rename(folder / "2.png")
    assert len({before, after, source_digest(folder.parent)}) == 3


def test_block_features_are_the_last_four_pooled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trunk = Swin(8, (1, 2, 2), (1, 2, 4), window=4, size=32)
    images = torch.randn(5, 3, 32, 32)
    found = last_blocks(trunk, images)
    maps = trunk.last_blocks([images], 4)
    assert [m.tokens.shape[1] for m in maps] == [16, 16, 32, 32]
    mean = torch.cat([torch.stack([t.mean(0) for t in m.tokens.chunk(5)]) for m in maps], 1)
    most = torch.cat([torch.stack([t.amax(0) for t in m.tokens.chunk(5)]) for m in maps], 1)
    assert torch.allclose(found, torch.stack([mean, most], 1), atol=1e-6)
    assert torch.allclose(found[:, 0, -32:], trunk([images]).view, atol=1e-6)
    with pytest.raises(UserError, match="Flatten does not give its blocks"):
        last_blocks(nn.Flatten(), images)


def test_extraction_skips_unreadable_images_and_keeps_numbers(tmp_path: Path) -> None:
    samples = [shard_writer.Sample(f"s{i}", 0, "png", b"broken") for i in range(2)]
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for i, data in enumerate([tiny_png(i) for i in range(4)] + [s.data for s in samples]):
        (folder / f"{(i * 5) % 6}.png").write_bytes(data)  # the broken ones are 2 and 1
    trunk = Swin(8, (1, 1), (1, 2), window=4, size=32)
    found = extract(trunk, folder.parent, 32, workers=0, device="cpu", cache=tmp_path / "cache")
    assert found.left_out == 2
    assert found.numbers is not None
    assert [f"a/{n}.png" for n in found.numbers.tolist()] == found.keys == ["a/0.png", "a/3.png", "a/4.png", "a/5.png"]


def test_half_precision_is_stored_or_overflow_refused(tmp_path: Path) -> None:
    class Constant(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, crops: list[torch.Tensor]) -> object:
            return type("", (), {"view": torch.full((len(crops[0]), 2), self.value)})

    shards = tiny.shards(tmp_path / "shards", 3)
    found = extract(Constant(0.1), shards, 32, workers=0, device="cpu", stored="fp16", cache=tmp_path / "cache")
    assert found.features.dtype == torch.float16
    with pytest.raises(UserError, match="1e\\+05 is beyond fp16"):
        extract(Constant(1e5), shards, 32, workers=0, device="cpu", stored="fp16", cache=tmp_path / "cache")


def tiny_png(i: int) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (40, 36), (20 * i, 50, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def test_class_token_is_the_block_feature_of_a_vit() -> None:
    torch.manual_seed(0)
    trunk = ViT(16, 5, 2)
    initialize(trunk, 0)
    images = torch.randn(3, 3, 32, 32)
    found, maps = last_blocks(trunk, images), trunk.last_blocks([images], 4)
    assert torch.equal(found[:, 0], torch.cat([m.view for m in maps], 1))
    assert torch.allclose(found[:, 0, -16:], trunk([images]).view, atol=1e-6)
    assert torch.equal(found[:, 1, -16:], maps[-1].tokens.view(3, 4, 16).amax(1))


def test_trunk_digest_depends_on_running_statistics() -> None:
    trunk = ResNet(4, (1, 1))
    before = trunk_digest(trunk)
    trunk.train()([torch.randn(4, 3, 32, 32)])
    assert trunk_digest(trunk) != before
