"""Shard sets of more than images: from folders, tables and tars; verify, repair, stats; evaluation batches."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esvit_scale import cli
from esvit_scale.data import left_out, media
from esvit_scale.data import manifest as manifests
from esvit_scale.data.evaluation import evaluation_batches
from esvit_scale.data.evaluation_signals import SignalBatch, evaluation_signals
from esvit_scale.data.shard_verify import verify
from esvit_scale.data.stream import batches
from tests.data.conftest import encoded, picture
from tests.data.media_files import modal_config, modal_samples, modal_set, sound, steps, tone, video


def run(*words: Any) -> int:
    return cli.main([str(word) for word in words])


def members(root: Path) -> dict[str, set[str]]:
    manifest = manifests.load(root)
    return {
        entry.key: set(entry.members) for shard in manifest.shards for entry in manifests.read_index(root / shard.name)
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "files"
    (root / "a").mkdir(parents=True)
    (root / "b").mkdir()
    for i in range(4):
        (root / f"a/p{i}.png").write_bytes(encoded(picture(i)))
        (root / f"a/p{i}.ogg").write_bytes(sound(tone(i, 4000 + i), 16000, "OGG"))
        (root / f"a/p{i}.txt").write_text(f"image numéro {i}")
    (root / "b/only.wav").write_bytes(sound(tone(9, 500, 2), 44100))
    (root / "b/film.mp4").write_bytes(video(steps(10)))
    for n in range(12):
        (root / f"b/frames.{n:04d}.png").write_bytes(encoded(picture(n)))
    (root / "b/empty.txt").write_text("")
    (root / "b/readme.md").write_text("x")
    return root


EXPECTED = {f"a/p{i}": {"png", "ogg", "txt"} for i in range(4)} | {
    "b/only": {"wav"},
    "b/film": {"mp4"},
    "b/frames": {f"frame-{n:06d}.png" for n in range(12)},
}


def test_folder_to_set_and_back_again(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    create = ("shards", "create", folder, out, "--members", "audio,video,text", "--label", "none", "--workers", 1)
    assert run(*create) == 0
    assert members(out) == EXPECTED
    manifest = manifests.load(out)
    assert manifest.modalities == {"audio": 5, "image": 4, "text": 4, "video": 2}
    assert json.loads((out / "manifest.json").read_text())["options"]["source"]["members"] == ["audio", "video", "text"]
    assert [row["first"] for row in manifest.left_out] == ["b/empty", "b/readme.md"]
    assert verify(out) == []

    capsys.readouterr()
    assert run("shards", "stats", out) == 0
    text = capsys.readouterr().out
    assert "audio 5, image 4, text 4, video 2" in text
    assert "12 .frame-*.png" in text

    tar = out / "shard-000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:600] + bytes(50) + whole[650:])
    assert verify(out)
    assert run("shards", "verify", out, "--repair", folder) == 0
    assert tar.read_bytes() == whole
    assert run(*create) == 0, "the same set: nothing to do"

    assert run("shards", "create", out, tmp_path / "again", "--workers", 1, "--no-shuffle") == 0
    assert members(tmp_path / "again") == EXPECTED
    assert run("shards", "split", out, tmp_path / "parts", "--val-fraction", 0.4, "--workers", 1) == 0
    parts = [members(tmp_path / "parts" / name) for name in ("train", "val")]
    assert parts[0] | parts[1] == EXPECTED
    assert all(parts)


def test_a_set_without_members_is_as_ever(folder: Path, tmp_path: Path) -> None:
    assert run("shards", "create", folder / "a", tmp_path / "set", "--workers", 1) == 0
    manifest = json.loads((tmp_path / "set/manifest.json").read_text())
    assert "modalities" not in manifest
    assert not {"members", "audio_column", "video_column", "fields"} & manifest["options"]["source"].keys()
    assert all(own == {"png"} for own in members(tmp_path / "set").values())


def test_damaged_members_are_left_out_and_named(folder: Path, tmp_path: Path) -> None:
    (folder / "a/p0.ogg").write_bytes(b"no sound")
    (folder / "a/p1.png").write_bytes(b"no image")
    (folder / "a/p2.txt").write_bytes(b"\xff\xfe\xfd")
    (folder / "b/film.mp4").write_bytes(b"#EXTM3U\nfile:///etc/hostname")
    (folder / "b/frames.0005.png").write_bytes(b"")
    out = tmp_path / "set"
    assert run("shards", "create", folder, out, "--members", "audio,video,text", "--workers", 1) == 0
    changed = {"a/p0": {"png", "txt"}, "a/p1": {"ogg", "txt"}, "a/p2": {"png", "ogg"}, "b/frames": EXPECTED["b/frames"]}
    changed["b/frames"] = changed["b/frames"] - {"frame-000005.png"}
    assert members(out) == {key: value for key, value in EXPECTED.items() if key != "b/film"} | changed
    rows = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(row["file"] for row in rows) == ["a/p0 (ogg)", "a/p1 (image)", "a/p2 (txt)", "b/empty", "b/film"]
    kinds = {row["file"]: row["kind"] for row in rows}
    assert (kinds["b/empty"], kinds["b/film"]) == (left_out.EMPTY, left_out.DAMAGED)
    assert verify(out) == []


def test_table_to_set(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder / "b", folder / "film", ignore=lambda d, names: [n for n in names if not n.endswith("png")])
    table = folder / "table.csv"
    table.write_text(
        "image,speech,film,kind,caption,fr,en\n"
        "a/p0.png,a/p0.ogg,b/film.mp4,x,un,été,\n"
        "a/p1.png,,,y,,,summer\n"
        ",b/only.wav,,x,,,\n"
        ",,b,y,frames of a folder,,\n"
        ",,,x,text alone,,\n"
        "a/missing.png,a/p2.ogg,,y,,,\n"
        ",a/p3.mp3,,y,,,\n"
    )
    out = tmp_path / "set"
    columns = [
        "--audio-column",
        "speech",
        "--video-column",
        "film",
        "--caption",
        "caption",
        "--fields",
        "fr,en",
        "--label",
        "kind",
    ]
    create = ("shards", "create", table, out)
    assert run(*create, *columns, "--no-shuffle", "--workers", 1) == 0
    assert members(out) == {
        "a/p0": {"png", "ogg", "mp4", "txt", "json", "cls"},
        "a/p1": {"png", "json", "cls"},
        "b/only": {"wav", "cls"},
        "b": {*EXPECTED["b/frames"], "txt", "cls"},
        "row-6": {"txt", "cls"},
        "a/missing": {"ogg", "cls"},
    }
    assert verify(out) == []
    left = {row["why"]: row["first"] for row in manifests.load(out).left_out}
    assert left["no audio by its name (.mp3)"] == "line 8"
    assert "a/missing (image)" in (out / "quarantine.jsonl").read_text()
    capsys.readouterr()
    assert run(*create, "--audio-column", "speach") == 2
    assert "did you mean 'speech'" in capsys.readouterr().err
    assert run("shards", "create", folder, tmp_path / "no", "--members", "sound") == 2
    assert "--members sound: expected some of audio, video, text" in capsys.readouterr().err
    assert run("shards", "create", folder, tmp_path / "no", "--members", "audio", "--drop-duplicates") == 2


def test_verify_names_a_damaged_member(tmp_path: Path) -> None:
    manifest = modal_set(tmp_path / "set", modal_samples(6))
    entry = next(e for e in manifests.read_index(manifest.root / "shard-000000.tar") if "flac" in e.members)
    at, size = entry.members["flac"]
    with (manifest.root / "shard-000000.tar").open("r+b") as file:
        file.seek(at + size // 2)
        file.write(bytes(100))
    problems = verify(manifest.root)
    assert any(f"{entry.key}: .flac: " in problem for problem in problems)
    assert any("sha256" in problem for problem in problems)


def everything(found: list[SignalBatch]) -> dict[str, tuple[Any, ...]]:
    rows = {}
    for batch in found:
        for b, key in enumerate(batch.keys):
            own = {name: (s.values[b], s.lengths[b]) for name, s in batch.signals.items()}
            rows[key] = batch.images[b], batch.has_image[b], own
    return rows


def test_evaluation_takes_the_centre_of_everything_once(tmp_path: Path) -> None:
    samples = modal_samples(20)
    manifest, config = modal_set(tmp_path / "set", samples), modal_config()
    rows = everything(list(evaluation_signals(manifest.root, config, 6)))
    assert list(rows) == [sample.key for sample in samples]
    crops = {
        key: image
        for batch in evaluation_batches(manifest.root, 12, 7)
        for key, image in zip(batch.keys, batch.images, strict=True)
    }
    for sample in samples:
        image, there, own = rows[sample.key]
        assert bool(there) == bool(sample.ext)
        assert torch.equal(image, crops[sample.key]) if there else not image.any()
        kind = next((k for k in ("wav", "flac", "ogg") if k in sample.extras), None)
        if kind:
            cut, length = media.Recording(sample.extras[kind]).cut(0.5, 8000, 400)
            assert np.array_equal(own["audio"][0], cut)
            assert own["audio"][1] == length
        texts = [t.strip() for t in json.loads(sample.extras.get("json", b"{}")).values() if t]
        text = bytes((own["text"][0][: int(own["text"][1])] - 1).tolist()).decode()
        assert texts[0].startswith(text) if texts else text == ""
        assert own["video"][0].shape == (3, 4, 8, 8)
    again = everything(list(evaluation_signals(manifest.root, config, 4, workers=2)))
    assert list(again) == list(rows)
    for key, (image, _, own) in rows.items():
        assert torch.equal(image, again[key][0])
        assert all(torch.equal(a, b) for name in own for a, b in zip(own[name], again[key][2][name], strict=True))


def test_frames_alone_are_no_image(tmp_path: Path) -> None:
    samples = [sample for sample in modal_samples() if any(ext.startswith("frame-") for ext in sample.extras)]
    many = [s._replace(key=f"{s.key}-{n}", ext="", data=b"") for n in range(4) for s in samples]
    (batch,) = batches(modal_config(), modal_set(tmp_path / "set", many), 0, 1, 0, 1)
    assert not batch.has_image.any()
    assert (batch.signals["video"][1] > 0).all()
