"""The stream: the same global batch at any world size and worker count, exact resume, substitution, failures."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from esvit_scale.data import manifest as manifests
from esvit_scale.data import photometric
from esvit_scale.data import reader as readers
from esvit_scale.data.loader import LoaderAssignment
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.order import Order
from esvit_scale.data.shard_stream import ShardSamples
from esvit_scale.data.shard_writer import Sample, create, write_samples
from esvit_scale.data.stream import Batch, batches, centre_crop, evaluation_batches, steps_per_epoch
from esvit_scale.errors import RestartCanHelp, UserError
from tests.data.conftest import config_with, encoded, picture


def whole(parts: list[Batch]) -> Batch:
    """The global batch of all ranks' parts."""
    assert len({p.batch_index for p in parts}) == 1
    return Batch(
        [torch.cat(c, 1) for c in zip(*(p.crops for p in parts), strict=True)],
        photometric.concatenate([p.photometric for p in parts], 1),
        torch.cat([p.positions for p in parts]),
        [k for p in parts for k in p.keys],
        torch.cat([p.labels for p in parts]),
        [b for p in parts for b in p.bad],
        parts[0].batch_index,
    )


def stream(manifest: Manifest, start: int, stop: int, world: int = 1, **config: Any) -> list[Batch]:
    ranks = [list(batches(config_with(**config), manifest, r, world, start, stop)) for r in range(world)]
    return [whole(list(parts)) for parts in zip(*ranks, strict=True)]


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    assert [x.batch_index for x in a] == [x.batch_index for x in b]
    for x, y in zip(a, b, strict=True):
        assert (x.keys, x.bad) == (y.keys, y.bad)
        tensors = [(*z.crops, *z.photometric, z.positions, z.labels) for z in (x, y)]
        assert all(torch.equal(s, t) for s, t in zip(*tensors, strict=True))


def test_batches_have_expected_shapes_and_contents(shard_set: Manifest) -> None:
    config = config_with()
    assert steps_per_epoch(config, shard_set) == 6
    (batch,) = batches(config, shard_set, 0, 1, 3, 4)
    assert [tuple(c.shape) for c in batch.crops] == [(2, 8, 3, 12, 12), (2, 8, 3, 8, 8), (1, 8, 3, 6, 6)]
    assert all(c.dtype == torch.uint8 for c in batch.crops)
    assert batch.photometric.order.shape == (5, 8)
    assert batch.positions.tolist() == list(range(8))
    assert batch.labels.tolist() == [int(key[1]) for key in batch.keys]
    assert (batch.photometric.radius[0] > 0).all()
    assert batch.bad == []
    assert batch.batch_index == 3
    assert len(np.unique(batch.crops[0].flatten(0, 1).flatten(1), axis=0)) == 16


@pytest.mark.parametrize("slots", [2, 4, 8])
def test_the_global_batch_is_the_same_at_any_world_size(shard_set: Manifest, slots: int) -> None:
    reference = stream(shard_set, 0, 13, slots=slots)
    for world in (w for w in (2, 4, 8) if slots % w == 0):
        assert_equal(stream(shard_set, 0, 13, world, slots=slots), reference)


@pytest.mark.parametrize(("world", "slots"), [(4, 2), (8, 2), (8, 1)])
def test_ranks_and_workers_share_slots(shard_set: Manifest, world: int, slots: int) -> None:
    """More ranks than slots, and more workers than images of a rank's batch, which take turns: the same batches."""
    reference = stream(shard_set, 3, 14, slots=slots)
    ranks = [list(batches(config_with(slots=slots), shard_set, rank, world, 3, 14)) for rank in range(world)]
    ranks[-1] = list(batches(config_with(slots=slots, workers=3), shard_set, world - 1, world, 3, 14))
    assert_equal([whole(list(parts)) for parts in zip(*ranks, strict=True)], reference)
    made = [set(batch.worker_rates) for batch in ranks[-1]]
    if world == 8:  # one image of each batch
        assert made == [{batch % 3} for batch in range(11)]
    else:
        assert made == [{0, 1}, {2, 0}, {1, 2}] * 3 + [{0, 1}, {2, 0}]


def test_processes_that_share_a_slot_read_every_image_once(
    shard_set: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch of one slot: of images the same bytes by 1 and by 4 processes, of indexes up to as many times as processes."""
    pread, read_index = os.pread, readers.read_index

    def bytes_read(workers: int) -> tuple[int, int]:
        images, indexes = [], []
        monkeypatch.setattr(os, "pread", lambda file, size, at: images.append(size) or pread(file, size, at))
        size = lambda path: manifests.index_path(path).stat().st_size  # noqa: E731
        monkeypatch.setattr(readers, "read_index", lambda path: indexes.append(size(path)) or read_index(path))
        for worker in range(workers):
            monkeypatch.setattr(LoaderAssignment, "worker", lambda self, worker=worker: (worker, workers))
            list(ShardSamples(LoaderAssignment(config_with(slots=1), 0, 1, 0, 6, 6), shard_set)())
        return sum(images), sum(indexes)

    alone, shared = bytes_read(1), bytes_read(4)
    assert shared[0] == alone[0] > 0
    assert alone[1] < shared[1] <= 4 * alone[1]


def test_slots_change_the_order(shard_set: Manifest) -> None:
    assert stream(shard_set, 0, 2, slots=2)[1].keys != stream(shard_set, 0, 2, slots=4)[1].keys


@pytest.mark.parametrize(("workers", "world"), [(1, 1), (2, 1), (3, 1), (3, 2)])
def test_loader_processes_do_not_change_batches(shard_set: Manifest, workers: int, world: int) -> None:
    """Bit for bit, over an epoch's end, whatever seeds torch gives the workers."""
    reference = stream(shard_set, 4, 9)
    torch.manual_seed(workers)
    before = torch.get_rng_state()
    assert_equal(stream(shard_set, 4, 9, world, workers=workers), reference)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_sample_comes_once_per_epoch(shard_set: Manifest) -> None:
    everything = {entry.key for s in shard_set.shards for entry in manifests.read_index(shard_set.root / s.name)}
    run = stream(shard_set, 0, 18)
    epochs = [[key for batch in run[e * 6 : e * 6 + 6] for key in batch.keys] for e in range(3)]
    for keys in epochs:
        assert len(keys) == len(set(keys)) == 48  # 53 samples, 53 mod 8 = 5 dropped
        assert set(keys) < everything
    assert len({tuple(keys) for keys in epochs}) == 3


def test_resumed_stream_equals_uninterrupted_stream(shard_set: Manifest) -> None:
    uninterrupted = stream(shard_set, 0, 15)
    for start in range(15):
        assert_equal(
            stream(shard_set, start, min(start + 3, 15), world=1 + start % 2), uninterrupted[start : start + 3]
        )
    assert stream(shard_set, 5, 5) == []


def test_crops_change_with_epoch_and_seed(shard_set: Manifest) -> None:
    def of(run: list[Batch], key: str) -> torch.Tensor:
        return next(b.crops[0][:, b.keys.index(key)] for b in run if key in b.keys)

    first, second, third = stream(shard_set, 0, 6), stream(shard_set, 6, 12), stream(shard_set, 0, 6, seed=1)
    common = set.intersection(*({k for b in run for k in b.keys} for run in (first, second, third)))
    for key in sorted(common)[:5]:
        assert not torch.equal(of(first, key), of(second, key))
        assert not torch.equal(of(first, key), of(third, key))


def test_crops_of_a_sample_do_not_depend_on_others(shard_set: Manifest, tmp_path: Path) -> None:
    """The same keys in another set, order and batch size give the same crops and parameters."""
    samples = [Sample(f"c{i % 3}/s{i:03d}", None, "png", encoded(picture(i))) for i in range(20)]
    other = write_samples(reversed(samples), tmp_path / "other", samples_per_shard=20)
    ours = {k: (b, i) for b in stream(shard_set, 0, 6) for i, k in enumerate(b.keys)}
    compared = 0
    for batch in stream(other, 0, 5, batch=4):
        for i, key in enumerate(batch.keys):
            if key in ours:
                reference, j = ours[key]
                assert all(torch.equal(c[:, i], d[:, j]) for c, d in zip(batch.crops, reference.crops, strict=True))
                fields = zip(batch.photometric, reference.photometric, strict=True)
                assert all(torch.equal(f[:, i], g[:, j]) for f, g in fields)
                compared += 1
    assert compared > 12


def damaged_copy(manifest: Manifest, root: Path) -> Manifest:
    shutil.copytree(manifest.root, root)
    return manifests.load(root)


def overwrite(manifest: Manifest, shard: int, i: int) -> str:
    path = manifest.root / manifest.shards[shard].name
    entry = manifests.read_index(path)[i]
    offset, size = entry.members["png"]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    return entry.key


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_sample_is_replaced_without_moving_others(shard_set: Manifest, tmp_path: Path, workers: int) -> None:
    broken = damaged_copy(shard_set, tmp_path / "set")
    config = config_with()
    order = Order(config.seed, 0, [s.samples for s in shard_set.shards], 8, config.slots, 2)
    position = order.position(2, 3, 0)
    shard, i = order.locate(position)
    key = overwrite(broken, shard, i)
    reference, run = stream(shard_set, 0, 6), stream(broken, 0, 6, workers=workers)
    substitute = order.locate(order.substitute(position, 0))
    expected = manifests.read_index(shard_set.root / shard_set.shards[substitute[0]].name)[substitute[1]].key
    assert run[2].keys[3] == expected
    assert reference[2].keys[3] == key
    (row,) = run[2].bad
    assert row == {
        "shard": broken.shards[shard].name,
        "key": key,
        "reason": row["reason"],
        "epoch": 0,
        "position": position,
    }
    assert "not an image" in row["reason"]
    for a, b in zip(reference, run, strict=True):
        same = [j for j in range(8) if not (a.batch_index == 2 and j == 3)]
        assert [a.keys[j] for j in same] == [b.keys[j] for j in same]
        assert all(torch.equal(c[:, same], d[:, same]) for c, d in zip(a.crops, b.crops, strict=True))
    assert_equal(stream(broken, 0, 6, world=2), run)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_shard_is_replaced_by_others(shard_set: Manifest, tmp_path: Path, damage: str) -> None:
    broken = damaged_copy(shard_set, tmp_path / "set")
    path = broken.root / broken.shards[1].name
    if damage == "truncated":
        os.truncate(path, 3000)
    else:
        path.unlink()
        manifests.index_path(path).unlink()
    run = stream(broken, 0, 6)
    assert all(len(b.keys) == 8 for b in run)
    rows = [row for b in run for row in b.bad]
    assert {row["shard"] for row in rows} == {path.name}
    assert len(rows) >= 5
    assert all("truncated" in r["reason"] or "No such file" in r["reason"] for r in rows)
    assert_equal(stream(broken, 0, 6, world=2, workers=2), run)


@pytest.mark.parametrize("workers", [0, 2])
def test_missing_storage_is_one_error_line(
    shard_set: Manifest, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "RETRY_DELAYS", (0.01, 0.1))
    broken = damaged_copy(shard_set, tmp_path / "set")
    shutil.rmtree(broken.root)
    with pytest.raises(RestartCanHelp, match=r"no longer there .*is its mount gone") as error:
        stream(broken, 0, 2, workers=workers)
    assert "\n" not in str(error.value)


def test_invalid_batch_is_an_error_with_nearest_value(shard_set: Manifest) -> None:
    def check(world: int, says: str, **config: Any) -> None:
        with pytest.raises(UserError, match=says):
            batches(config_with(**config), shard_set, 0, world, 0, 1)  # before any iteration

    check(1, r"train\.global_batch: 64 images, but the set holds 53 samples; set train\.global_batch=53", batch=64)
    check(3, r"8 does not divide over 3 ranks × train.grad_accum=1; nearest: 9")
    check(2, r"8 does not divide over 2 ranks × train.grad_accum=8; nearest: 16", accum=8)


ABANDONED = """
import os, sys, time
from pathlib import Path
from esvit_scale.data import manifest as manifests, stream
from tests.data.conftest import config_with
iterator = stream.batches(config_with(workers=2), manifests.load(Path(sys.argv[1])), 0, 1, 0, 10**6)
next(iterator)
children = open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read()
print(children, flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted; next batches", *(next(iterator).batch_index for _ in range(8)), flush=True)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_workers_ignore_signals_and_die_with_their_parent(shard_set: Manifest, sign: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ABANDONED, shard_set.root],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])},
        start_new_session=True,
        # Under `nohup make test &` SIGINT is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    children = [int(pid) for pid in process.stdout.readline().split()]
    assert len(children) >= 2
    if sign == signal.SIGINT:
        for pid in children:
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.3)
        assert all(alive(pid) for pid in children)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal's ctrl-C, workers included
    else:
        process.kill()
    out, err = process.communicate(timeout=60)
    if sign == signal.SIGINT:
        assert "interrupted; next batches 1 2 3 4 5 6 7 8" in out
        assert "Traceback" not in err, err
        assert process.returncode == 0
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in children)


# --- evaluation ------------------------------------------------------------------------------------------------------


def collect(source: Path, **options: Any) -> tuple[torch.Tensor, list[str], list[int]]:
    parts = list(evaluation_batches(source, 14, options.pop("batch", 5), **options))
    return (
        torch.cat([p.images for p in parts]),
        [k for p in parts for k in p.keys],
        [int(n) for p in parts for n in p.labels],
    )


def test_evaluation_reads_everything_in_order(shard_set: Manifest) -> None:
    images, keys, labels = collect(shard_set.root)
    assert images.shape == (53, 3, 14, 14)
    assert keys == [f"c{i % 3}/s{i:03d}" for i in range(53)]
    assert labels == [i % 3 for i in range(53)]
    for workers, world in [(2, 1), (0, 3), (3, 2)]:
        parts = [collect(shard_set.root, workers=workers, rank=r, world_size=world) for r in range(world)]
        assert torch.equal(torch.cat([p[0] for p in parts]), images)
        assert [k for p in parts for k in p[1]] == keys


def test_evaluation_reads_a_folder_with_classes(image_folder: Path, tmp_path: Path) -> None:
    images, keys, labels = collect(image_folder)
    assert keys == sorted(keys)
    assert labels == [0] * 6 + [1] * 6
    create(image_folder, tmp_path / "set")
    from_shards = collect(tmp_path / "set")
    by_key = dict(zip(from_shards[1], from_shards[0], strict=True))
    assert all(torch.equal(by_key[key.removesuffix(".png")], image) for key, image in zip(keys, images, strict=True))
    assert set(collect(image_folder / "a")[2]) == {-1}


@pytest.mark.parametrize(("width", "height"), [(40, 30), (31, 57), (16, 16), (4, 300), (13, 20)])
def test_evaluation_transform_equals_torchvision(tmp_path: Path, width: int, height: int) -> None:
    image = picture(5, width, height)
    (tmp_path / "x.png").write_bytes(encoded(image))
    transform = v2.Compose(
        [
            v2.Resize(16, v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(14),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(photometric.MEAN, photometric.STD),
        ]
    )
    level = 1.01 / 255 / min(photometric.STD)  # of 8-bit pixels: the resize rounds its weights (evaluation_crop.py)
    torch.testing.assert_close(collect(tmp_path)[0][0], torch.Tensor(transform(image)), atol=level, rtol=0)


@pytest.mark.parametrize(("width", "height"), [(65000, 8), (8, 65000), (4, 30000), (20000, 20), (1200, 30)])
def test_centre_crop_of_long_image_uses_little_memory(monkeypatch: pytest.MonkeyPatch, width: int, height: int) -> None:
    """Resized as a whole it would take up to 2.1 million x 256 pixels."""
    made: list[int] = []
    resize = Image.Image.resize

    def counted(self: Image.Image, size: tuple[int, int], *args: Any, **options: Any) -> Image.Image:
        made.append(size[0] * size[1])
        return resize(self, size, *args, **options)

    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    monkeypatch.setattr(Image.Image, "resize", counted)
    found = centre_crop(Image.fromarray(noise), 224).transpose(1, 2, 0)
    assert max(made) == 224 * 224
    # the same from the middle of it alone, which is small enough to be resized as a whole
    short, middle = min(width, height), max(width, height) // 2
    part = (
        noise[:, middle - 4 * short : middle + 4 * short]
        if width > height
        else noise[middle - 4 * short :][: 8 * short]
    )
    long = Image.fromarray(part).resize((2048, 256) if width > height else (256, 2048), Image.Resampling.BICUBIC)
    expected = np.asarray(long)[16:240, 912:1136] if width > height else np.asarray(long)[912:1136, 16:240]
    assert np.abs(found.astype(int) - expected).mean() < 0.5


def test_evaluation_counts_and_skips_bad_images(image_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a/p0.png", "a/p2.png", "b/p1.png"):
        (image_folder / name).write_bytes(b"")
    for workers in (0, 2):
        caplog.clear()
        images, keys, labels = collect(image_folder, batch=2, workers=workers)
        assert len(images) == len(keys) == len(labels) == 9
        (record,) = caplog.records
        assert "left out 3 bad images of 12 (first: a/p0.png: empty file)" in record.getMessage()


def test_unusable_evaluation_sources_are_errors(shard_set: Manifest, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        evaluation_batches(tmp_path / "nowhere", 14, 4)
    broken = damaged_copy(shard_set, tmp_path / "set")
    os.truncate(broken.root / broken.shards[0].name, 2048)
    with pytest.raises(UserError, match="truncated"):
        evaluation_batches(broken.root, 14, 4)
    (broken.root / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a finished shard set"):
        evaluation_batches(broken.root, 14, 4)
