"""Batches with sound, video and text: the same at any number of ranks and loader processes, exact resume, what is missing."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esvit_scale.config import Config
from esvit_scale.data import media, signals
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.remote import working_set
from esvit_scale.data.remote.store import Store
from esvit_scale.data.shard_writer import Sample
from esvit_scale.data.stream import Batch, MicroBatch, batches, micro_batches, open_data
from esvit_scale.errors import UserError
from tests.data.conftest import config_with, encoded, picture
from tests.data.media_files import modal_config, modal_samples, modal_set, sound, soundfile, steps, tone, video


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return modal_set(tmp_path_factory.mktemp("modal") / "set")


def tensors(parts: list[Batch]) -> dict[str, torch.Tensor]:
    """Everything that the ranks' parts of a global batch hold, joined."""
    found = {f"crops{n}": torch.cat(group, 1) for n, group in enumerate(zip(*(p.crops for p in parts), strict=True))}
    found["positions"] = torch.cat([p.positions for p in parts])
    found["has_image"] = torch.cat([p.has_image for p in parts])
    for name in parts[0].signals:
        for field, part in enumerate(("values", "lengths")):
            found[f"{name} {part}"] = torch.cat([p.signals[name][field] for p in parts], 1)
    return found


def stream(manifest: Manifest, start: int, stop: int, world: int = 1, workers: int = 0, **more: Any) -> list[Any]:
    config = modal_config(workers, **more)
    ranks = [list(batches(config, manifest, rank, world, start, stop)) for rank in range(world)]
    return [([k for p in parts for k in p.keys], tensors(list(parts))) for parts in zip(*ranks, strict=True)]


def assert_same(a: list[Any], b: list[Any]) -> None:
    assert len(a) == len(b)
    for (keys, x), (others, y) in zip(a, b, strict=True):
        assert keys == others
        assert x.keys() == y.keys()
        assert [name for name in x if not torch.equal(x[name], y[name])] == []


def test_batches_are_the_same_at_any_number_of_ranks_and_workers_and_after_a_resume(mixed: Manifest) -> None:
    reference = stream(mixed, 0, 7)
    assert {len(keys) for keys, _ in reference} == {8}
    assert_same(stream(mixed, 0, 7, world=2), reference)
    assert_same(stream(mixed, 0, 7, workers=1), reference)
    assert_same(stream(mixed, 0, 7, workers=2), reference)
    assert_same(stream(mixed, 4, 7, world=2), reference[4:])
    # Another modality less changes nothing in the others, and none at all is today's batch.
    less = stream(mixed, 0, 3, video={"views": 0})
    assert less[0][1].keys() == {name for name in reference[0][1] if "video" not in name}
    assert all(torch.equal(x[k], y[k]) for (_, x), (_, y) in zip(reference, less, strict=False) for k in y)


def test_views_are_the_stretches_that_their_keys_draw(mixed: Manifest) -> None:
    config, samples = modal_config(), {sample.key: sample for sample in modal_samples()}
    for batch in batches(config, mixed, 0, 1, 0, 2):
        for b, key in enumerate(batch.keys):
            extras = samples[key].extras
            assert bool(batch.has_image[b]) == bool(samples[key].ext)
            assert bool(samples[key].ext) or not any(group[:, b].any() for group in batch.crops)
            kind = next((k for k in ("wav", "flac", "ogg") if k in extras), None)
            values, lengths = (each[:, b] for each in batch.signals["audio"])
            for v in range(2):
                if kind is None:
                    assert lengths[v] == 0
                    assert not values[v].any()
                    continue
                drawn = signals.draw(3, 0, key, "audio", v)
                cut, length = media.Recording(extras[kind]).cut(drawn.place, 8000, 400)
                gain = 10 ** (6 * (2 * drawn.loudness - 1) / 20)
                np.testing.assert_allclose(values[v], np.clip(cut * gain, -1, 1), atol=1e-7)
                assert lengths[v] == length
            values, lengths = (each[:, b] for each in batch.signals["video"])
            frames = len([name for name in extras if name.startswith("frame-")])
            there = 4 if "mp4" in extras else min(4, -(-frames // 2))
            assert lengths.tolist() == [there]
            assert values[0, :there].any() == bool(there)
            values, lengths = (each[:, b] for each in batch.signals["text"])
            texts = [t.strip() for t in json.loads(extras.get("json", b"{}")).values() if t]
            for v in range(2):
                text = bytes((values[v, : int(lengths[v])] - 1).tolist()).decode()
                assert any(t.startswith(text) for t in texts) if texts else text == ""
                assert bool(texts) == bool(lengths[v])


def test_micro_batches_have_the_signals_of_their_samples(mixed: Manifest) -> None:
    config = modal_config()
    (batch,) = batches(config, mixed, 0, 1, 1, 2)
    micros = micro_batches(config, batch, torch.device("cpu"), torch.float32)
    assert len(micros) == 2
    for n, micro in enumerate(micros):
        mine = slice(4 * n, 4 * n + 4)
        assert torch.equal(micro.has_image, batch.has_image[mine])
        shapes = {"audio": (8, 400), "video": (4, 3, 4, 8, 8), "text": (8, 12)}
        assert {name: tuple(s.values.shape) for name, s in micro.signals.items()} == shapes
        assert {name: s.values.dtype for name, s in micro.signals.items()} == {
            "audio": torch.float32,
            "video": torch.float32,
            "text": torch.int64,
        }
        for name, (values, lengths) in micro.signals.items():
            raw, counts = (each[:, mine].flatten(0, 1) for each in batch.signals[name])
            assert torch.equal(lengths, counts)
            assert not values[lengths == 0].any()
            if name != "video":
                assert torch.equal(values, raw.to(values.dtype))
                continue
            mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
            slow = ((raw.double() / 255 - mean) / std).permute(0, 4, 1, 2, 3)  # [N, 3, T, S, S]
            for row, length in enumerate(lengths.tolist()):
                torch.testing.assert_close(values[row, :, :length].double(), slow[row, :, :length], atol=1e-5, rtol=0)
                assert not values[row, :, length:].any()
        for group in micro.crops:
            there = group.unflatten(0, (-1, 4)).abs().amax((0, 2, 3, 4)) > 0
            assert torch.equal(there, micro.has_image)


def test_without_modalities_batches_have_none(shard_set: Manifest) -> None:
    config = config_with()
    (batch,) = batches(config, shard_set, 0, 1, 0, 1)
    assert (batch.signals, batch.has_image) == ({}, None)
    micro = micro_batches(config, batch, torch.device("cpu"), torch.float32)[0]
    assert (micro.signals, micro.has_image) == MicroBatch([], batch.positions)[3:]


def test_a_bad_member_is_named_and_its_sample_stays(tmp_path: Path) -> None:
    image, good = encoded(picture(1)), sound(tone(1, 4000), 8000)
    flac = sound(tone(1, 8000), 8000, "FLAC")
    samples = [
        Sample("image_only", None, "png", image, {"flac": flac[: len(flac) // 2], "txt": b"\xff"}),
        Sample("sound_only", None, "png", image[: len(image) // 2], {"wav": good}),
        Sample("nothing", None, "png", b"no image", {"wav": b"no sound", "txt": b""}),
        *(Sample(f"good{i}", None, "png", image, {"wav": good, "txt": b"text"}) for i in range(5)),
    ]
    manifest = modal_set(tmp_path / "set", samples)
    config = modal_config(text={"views": 1, "length": 8}, audio={"views": 1, "rate": 8000, "seconds": 1})
    (batch,) = batches(config, manifest, 0, 1, 0, 1)
    rows = {row["key"]: row for row in batch.bad}
    assert rows.keys() == {"image_only", "sound_only", "nothing"}
    reasons = {row["reason"].partition(":")[0] for row in batch.bad if row["key"] == "image_only"}
    assert reasons == {"audio", "text"}
    assert rows["sound_only"]["reason"].startswith("image: ")
    assert [row.get("used") for row in (rows["image_only"], rows["sound_only"], rows["nothing"])] == [True, True, None]
    assert {row["member"] for row in batch.bad if "member" in row} == {"audio", "text", "image"}
    assert "nothing" not in batch.keys
    assert len(batch.keys) == 8
    at = {key: b for b, key in enumerate(batch.keys)}
    assert batch.has_image.tolist() == [key != "sound_only" for key in batch.keys]
    assert batch.signals["audio"][1][0, [at["image_only"], at["sound_only"]]].tolist() == [0, 4000]
    assert batch.signals["text"][1][0, [at["image_only"], at["sound_only"]]].tolist() == [0, 0]


def test_a_huge_member_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [
        Sample(f"s{i}", None, "png", encoded(picture(i)), {"wav": sound(tone(i, 4000 + i), 8000)}) for i in range(8)
    ]
    manifest = modal_set(tmp_path / "set", samples)
    monkeypatch.setattr(media, "MAX_SECONDS", 4003.5 / 8000)
    (batch,) = batches(modal_config(), manifest, 0, 1, 0, 1)
    assert {row["key"] for row in batch.bad} == {"s4", "s5", "s6", "s7"}
    assert all("longer than" in row["reason"] for row in batch.bad)
    assert dict(zip(batch.keys, (batch.signals["audio"][1][0] > 0).tolist(), strict=True)) == {
        f"s{i}": i < 4 for i in range(8)
    }


def test_modality_that_no_sample_has_is_told_at_the_start(
    mixed: Manifest, shard_set: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_data(modal_config(train=str(mixed.root)))
    assert not caplog.records
    open_data(modal_config(train=str(shard_set.root)))
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "data.audio.views",
        "data.video.views",
    ]
    caplog.clear()
    silent = [Sample(f"s{i}", None, "", b"", {"wav": sound(tone(i, 100), 8000)}) for i in range(8)]
    open_data(modal_config(train=str(modal_set(tmp_path / "set", silent).root)))
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "data.video.views",
        "data.text.views",
    ]


def tar_stream(config: Config, start: int, stop: int, world: int = 1) -> list[Any]:
    ranks = [list(batches(config, open_data(config), rank, world, start, stop)) for rank in range(world)]
    return [([k for p in parts for k in p.keys], tensors(list(parts))) for parts in zip(*ranks, strict=True)]


def test_plain_tars_give_the_samples_of_the_set_and_resume(mixed: Manifest) -> None:
    """The tars of a set without its manifest: other order, but the same crops and views of every sample."""
    config = modal_config(train=str(mixed.root / "shard-*.tar"), epoch_samples=26)
    run = tar_stream(config, 0, 6)
    expected = {key: (x, b) for keys, x in stream(mixed, 0, 3) for b, key in enumerate(keys)}
    came = [key for keys, _ in run[:3] for key in keys]
    assert len(set(came)) == 24
    compared = 0
    for keys, x in run[:3]:
        for b, key in enumerate(keys):
            if key not in expected:  # one of those that this epoch of the set drops
                continue
            other, at = expected[key]
            compared += 1
            for name in x:
                mine, theirs = (t[i] if t.ndim == 1 else t[:, i] for t, i in ((x[name], b), (other[name], at)))
                assert name == "positions" or torch.equal(mine, theirs), (key, name)
    assert compared >= 22
    assert_same(tar_stream(config, 2, 6), run[2:])
    two = modal_config(2, train=str(mixed.root / "shard-*.tar"), epoch_samples=26)
    assert_same(tar_stream(two, 4, 6), tar_stream(two, 0, 6)[4:])


def made_elsewhere(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_bad_members_of_plain_tars_are_named_and_their_samples_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, good = encoded(picture(1)), sound(tone(1, 4000), 8000)
    members = [
        (f"a/good{i}.{ext}", data) for i in range(8) for ext, data in (("png", image), ("wav", good), ("cls", b"7"))
    ]
    members += [("a/x.y.png", image), ("a/silent.png", image), ("a/silent.wav", b"no sound"), ("a/silent.json", b"[]")]
    members += [("b/long.png", image), ("b/long.wav", good + bytes(4000))]
    members += [("b/frames.frame-0001.png", image), ("b/frames.frame-0000.png", image), ("b/none.pdf", b"x")]
    members += [("b/apart.png", image), ("b/lost.md", b"read by nobody"), ("b/apart.wav", good)]
    made_elsewhere(tmp_path / "0.tar", members)
    monkeypatch.setattr(media, "MAX_BYTES", len(image) + len(good) + 100)
    config = modal_config(train=str(tmp_path / "0.tar"), epoch_samples=16)
    got = list(batches(config, open_data(config), 0, 1, 0, 2))
    rows = [row for batch in got for row in batch.bad]
    reasons = {row["key"]: row for row in rows if row["key"]}
    assert {(row["key"], row["reason"].partition(":")[0]) for row in rows if row["key"]} == {
        ("a/silent", "audio"),
        ("a/silent", "text"),
        ("b/long", "audio"),
    }
    assert all(row["used"] and row["member"] in ("audio", "text") for row in reasons.values())
    assert "over the limit of" in reasons["b/long"]["reason"]
    (others,) = (row["left_out"] for row in rows if "left_out" in row)
    assert sorted(row["count"] for row in others) == [1, 2]  # what lies apart; none.pdf and lost.md
    assert any("sort the tar" in row["why"] for row in others)
    at = {key: (batch, b) for batch in got for b, key in enumerate(batch.keys)}
    assert at.keys() >= {"a/x", "a/silent", "b/long", "b/frames"}  # x.y.png is the image of a/x
    batch, b = at["b/frames"]
    assert not batch.has_image[b]
    assert batch.signals["video"][1][0, b] == 1  # of two frames, every second one
    batch, b = at["a/good0"]
    assert batch.labels[b] == 7
    assert batch.signals["audio"][1][:, b].tolist() == [400, 400]
    nothing = modal_config(train=str(tmp_path / "1.tar"), epoch_samples=16)
    made_elsewhere(tmp_path / "1.tar", [("a.pdf", b"x")])
    with pytest.raises(UserError, match=r"it holds no samples|none of this worker's 1 tars gave a sample") as error:
        next(batches(nothing, open_data(nothing), 0, 1, 0, 1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "modality"), [("soundfile", "audio"), ("av", "video")])
def test_a_missing_library_is_named(name: str, modality: str, mixed: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, name, None)
    none = {"audio": {"views": 0}, "video": {"views": 0}, "text": {"views": 0}} | {modality: {"views": 1}}
    with pytest.raises(UserError, match=rf"data\.{modality}: needs .*esvit-scale\[modalities\]"):
        open_data(modal_config(train=str(mixed.root), **none))


def test_opus_and_clip_in_one_sample(tmp_path: Path) -> None:
    """A sample of one clip and one recording, drawn once more than it has frames."""
    out = io.BytesIO()
    soundfile().write(out, tone(1, 48000), 48000, format="OGG", subtype="OPUS")
    samples = [Sample(f"s{i}", None, "", b"", {"ogg": out.getvalue(), "mp4": video(steps(2))}) for i in range(8)]
    (batch,) = batches(modal_config(), modal_set(tmp_path / "set", samples), 0, 1, 0, 1)
    assert not batch.has_image.any()
    assert batch.signals["video"][1].tolist() == [[1] * 8]
    assert (batch.signals["audio"][1] == 400).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_members_of_a_set_in_a_store_come_with_its_images(
    mixed: Manifest, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched, read = [], Store.read

    def counted(self: Store, name: str, **options: Any) -> bytes:
        fetched.append((options.get("urgent"), options.get("start")))
        return read(self, name, **options)

    monkeypatch.setattr(Store, "read", counted)
    monkeypatch.setattr(working_set, "ring_bytes", lambda *arguments: 4 << 20)  # there is no room for whole shards
    there = {"train": f"file://{mixed.root}", "cache_dir": str(tmp_path / str(workers))}
    config = modal_config(workers, **there)
    remote = [([*b.keys], tensors([b])) for b in batches(config, open_data(config), 0, 1, 0, 4)]
    assert_same(remote, stream(mixed, 0, 4))
    assert not list(tmp_path.rglob("*.tar"))
    if not workers:
        assert [start for urgent, start in fetched if urgent and start is not None] == [], "all were fetched ahead"
