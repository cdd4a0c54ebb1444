"""Writing and verifying shard sets: exact bytes, odd and bad images, interruption, damage."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from esvit_scale.data import left_out, set_folder
from esvit_scale.data import manifest as manifests
from esvit_scale.data.shard_writer import Sample, create, keys_of, verify, write_samples
from esvit_scale.errors import UserError
from tests import launcher
from tests.data.conftest import encoded, picture


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []  # noqa: PTH208 (hidden files too)


def test_a_set_holds_every_file_unchanged(image_folder: Path, tmp_path: Path) -> None:
    manifest = create(image_folder, tmp_path / "set", samples_per_shard=5)
    assert [s.samples for s in manifest.shards] == [5, 5, 2]
    assert manifest.samples == 12
    assert manifest.classes == ("a", "b")
    urls = [str(tmp_path / "set" / s.name) for s in manifest.shards]
    samples = {s["__key__"]: s for s in wds.WebDataset(urls, shardshuffle=False)}
    assert len(samples) == 12
    for path in image_folder.rglob("*.png"):
        sample = samples[path.relative_to(image_folder).with_suffix("").as_posix()]
        assert sample["png"] == path.read_bytes()
        assert sample["cls"] == (b"0" if path.parent.name == "a" else b"1")
    assert manifests.load(tmp_path / "set") == manifest
    assert verify(tmp_path / "set") == []


def test_file_order_is_shuffled_by_the_seed(image_folder: Path, tmp_path: Path) -> None:
    keys = {}
    for seed in (0, 1):
        manifest = create(image_folder, tmp_path / f"set{seed}", samples_per_shard=12, seed=seed)
        keys[seed] = [e.key for e in manifests.read_index(tmp_path / f"set{seed}" / manifest.shards[0].name)]
    assert keys[0] != keys[1]
    assert keys[0] != sorted(keys[0])
    assert sorted(keys[0]) == sorted(keys[1])


def test_the_same_source_gives_the_same_bytes(image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder, tmp_path / "copy")
    create(image_folder, tmp_path / "one", 5)
    time.sleep(1.1)  # past the resolution of a tar's times
    create(tmp_path / "copy", tmp_path / "two", 5)
    assert listing(tmp_path / "one") == listing(tmp_path / "two")
    for name in listing(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    (tmp_path / "src" / "deeper").mkdir(parents=True)
    (tmp_path / "src" / "top.png").write_bytes(encoded(picture(0)))
    (tmp_path / "src" / "deeper" / "in.JPG").write_bytes(encoded(picture(1), "JPEG"))
    manifest = create(tmp_path / "src", tmp_path / "set")
    assert manifest.classes == ()
    entries = manifests.read_index(tmp_path / "set" / "shard-000000.tar")
    assert sorted((e.key, *e.members) for e in entries) == [("deeper/in", "jpg"), ("top", "png")]


def test_bad_images_are_left_out_and_named(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = encoded(picture(0, 100, 100), "JPEG")
    bad = {
        "a/truncated.jpg": whole[: len(whole) // 2],
        "a/zero.png": b"",
        "a/text.jpg": b"no image at all",
        "b/tiny.png": encoded(Image.new("RGB", (1, 1))),
    }
    good = {
        "b/cmyk.jpg": encoded(picture(1).convert("CMYK"), "JPEG"),
        "b/sixteen.png": encoded(Image.fromarray(np.full((9, 9), 40000, np.uint16))),
        "b/palette.gif": encoded(picture(2).convert("P"), "GIF"),
        "b/alpha.png": encoded(picture(3).convert("RGBA")),
    }
    for name, data in {**bad, **good, "a/notes.txt": b"x", "b/.hidden.png": b"x"}.items():
        (image_folder / name).write_bytes(data)
    (image_folder / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(image_folder / "a" / "pipe.png")
    manifest = create(image_folder, tmp_path / "set", 100)
    assert manifest.samples == 12 + len(good)
    rows = [json.loads(line) for line in (tmp_path / "set" / "quarantine.jsonl").read_text().splitlines()]
    assert {row["file"] for row in rows} == {*bad, "a/gone.png", "a/pipe.png"}
    assert all(row["reason"] for row in rows)
    errors = capsys.readouterr().err.splitlines()
    for name in bad:
        assert sum(name in line for line in errors) == 1
    assert {(row["what"], row["why"]): (row["count"], row["first"]) for row in manifest.left_out} == {
        ("images", left_out.DAMAGED): (2, manifest.left_out[0]["first"]),
        ("images", left_out.EMPTY): (1, "a/zero.png"),
        ("images", left_out.TOO_SMALL): (1, "b/tiny.png"),
        ("images", left_out.DANGLING): (1, "a/gone.png"),
        ("images", left_out.SPECIAL): (1, "a/pipe.png"),
        ("files", left_out.HIDDEN): (1, "b/.hidden.png"),
        ("files", left_out.not_an_image("txt")): (1, "a/notes.txt"),
    }
    assert verify(tmp_path / "set") == []


def test_no_usable_image_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of its 1 image files.*a\.png: empty file"):
        create(tmp_path / "src", tmp_path / "set")
    assert not (tmp_path / "set").exists()
    (tmp_path / "given").mkdir()
    with pytest.raises(UserError):
        create(tmp_path / "src", tmp_path / "given")
    assert listing(tmp_path / "given") == []


def test_unusable_sources_are_errors(tmp_path: Path, image_folder: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder; did you mean .*images"):
        create(tmp_path / "imagse", tmp_path / "set")
    with pytest.raises(UserError, match="is a file, not a folder"):
        create(image_folder / "a" / "p0.png", tmp_path / "set")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image files; it holds nothing"):
        create(tmp_path / "empty", tmp_path / "set")
    (tmp_path / "empty" / "x.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"it holds 1 files: no image by its name \(\.tar\)"):
        create(tmp_path / "empty", tmp_path / "set")
    with pytest.raises(UserError, match="samples per shard: 0"):
        create(image_folder, tmp_path / "set", 0)
    assert not (tmp_path / "set").exists()


def test_unusable_destinations_are_errors(tmp_path: Path, image_folder: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "shard-000000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"holds other files \(shard-000000\.tar"):
        create(image_folder, tmp_path / "used")
    assert (tmp_path / "used" / "shard-000000.tar").read_bytes() == b"mine"
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError):
        create(image_folder, tmp_path / "file")


def test_finished_set_is_unchanged(tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = create(image_folder, tmp_path / "set", 5)
    before = {name: (tmp_path / "set" / name).stat().st_mtime_ns for name in listing(tmp_path / "set")}
    assert create(image_folder, tmp_path / "set", 5) == first
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(UserError, match="already holds another shard set"):
        create(image_folder, tmp_path / "set", 6)
    (image_folder / "a" / "new.png").write_bytes(encoded(picture(99)))
    with pytest.raises(UserError, match="already holds another shard set"):
        create(image_folder, tmp_path / "set", 5)
    assert {name: (tmp_path / "set" / name).stat().st_mtime_ns for name in listing(tmp_path / "set")} == before


SLOW = """
import sys, time
from pathlib import Path
from esvit_scale.data import planned_shard, shard_writer
from esvit_scale.data.shard_plan import Recipe
from esvit_scale.data.sources import SourceOptions
decode = planned_shard.decode
def slow(data):
    time.sleep(0.1)
    return decode(data)
planned_shard.decode = slow
workers = int(sys.argv[3])
shard_writer.write_source(sys.argv[1], Path(sys.argv[2]), SourceOptions(), Recipe(samples_per_shard=2), workers)
"""


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_writing_leaves_no_set_and_resumes(
    sign: signal.Signals,
    workers: int,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "set"
    child = launcher.fork("-c", SLOW, image_folder, target, workers)
    deadline = time.monotonic() + 60
    while not (target / ".partial" / "shard-000001.json").exists():
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with monkeypatch.context() as patch:
        patch.setattr(set_folder, "LOCK_ATTEMPTS", 1)
        with pytest.raises(UserError, match="another process is writing"):
            create(image_folder, target, 2)
    child.send_signal(sign)
    assert child.wait(30) != 0
    assert [name for name in listing(target) if not name.startswith(".")] == []
    with pytest.raises(UserError):
        manifests.load(target)
    whole = [p.with_suffix(".tar") for p in (target / ".partial").glob("shard-*.json")]
    done = {path.name: path.stat().st_mtime_ns for path in whole}
    assert 1 <= len(done) < 6
    with pytest.raises(UserError, match="holds an unfinished set of other images or options"):
        create(image_folder, target, 3)
    create(image_folder, target, 2)
    assert "shards are written; continuing with the rest" in capsys.readouterr().err
    kept = {p.name: p.stat().st_mtime_ns for p in target.glob("*.tar")}
    assert kept.items() >= done.items()  # not written again
    create(image_folder, tmp_path / "undisturbed", 2)
    assert listing(target) == listing(tmp_path / "undisturbed")
    for name in listing(target):
        assert (target / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_killed_while_moving_into_place_is_finished_by_the_next_run(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "set"
    rename = Path.rename

    def fail_at_the_second_tar(self: Path, to: Path) -> Path:
        if Path(to) == target / "shard-000001.tar":
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail_at_the_second_tar)
    with pytest.raises(KeyboardInterrupt):
        create(image_folder, target, 5)
    monkeypatch.undo()
    assert (target / "shard-000000.tar").exists()
    assert not (target / "manifest.json").exists()
    with pytest.raises(UserError, match=r"not a finished shard set"):
        manifests.load(target)
    create(image_folder, target, 5)
    assert verify(target) == []
    assert not (target / ".partial").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        create(image_folder, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_file_names_that_are_not_utf8_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "src" / os.fsdecode(b"caf\xe9")
    folder.mkdir(parents=True)
    names = [b"\xff\xfe.png", "日本.png".encode(), b"a b.png", b"new\nline.png", b"x" * 200 + b".png"]
    for i, name in enumerate(names):
        (folder / os.fsdecode(name)).write_bytes(encoded(picture(i)))
    (folder / os.fsdecode(b"bad\n\xe9.png")).write_bytes(b"")
    manifest = create(tmp_path / "src", tmp_path / "set")
    assert manifest.samples == 5
    assert manifest.classes == ("caf\\xe9",)
    assert json.loads((tmp_path / "set" / "quarantine.jsonl").read_text())["file"] == "caf\\xe9/bad\\n\\xe9.png"
    assert "bad\\n\\xe9.png: left out" in capsys.readouterr().err
    assert verify(tmp_path / "set") == []


def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def denied(path: str) -> object:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match="images/b: Permission denied"):
        create(image_folder, tmp_path / "set")


def test_leftovers_of_killed_processes_are_removed(image_folder: Path, tmp_path: Path) -> None:
    partial = tmp_path / "set" / ".partial"
    partial.mkdir(parents=True)
    for number in (1, 7):
        (partial / f".shard-{number:06d}.tar.123.partial").write_bytes(b"half")
    set_folder.clear_asides(partial, range(3))
    assert [p.name for p in partial.iterdir()] == [".shard-000007.tar.123.partial"]


def test_keys_are_unique_and_safe() -> None:
    paths = [
        "a/x.jpg",
        "a/x.png",
        "a/x.y.jpg",
        "a/x_y.jpg",
        "..b/..png.jpg",
        "日/本.jpg",
        "日/木.jpg",
        "d/" + "l" * 300 + ".png",
    ]
    keys = keys_of(paths)
    assert len(set(keys)) == len(paths)
    assert keys[0] == "a/x"
    assert keys[3] == "a/x_y"
    assert all(set(k) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-/") for k in keys)
    assert max(map(len, keys)) <= 90
    assert keys_of(paths) == keys


def test_write_samples_refuses_keys_that_could_escape(tmp_path: Path) -> None:
    for key in ["../x", "/x", "a//b", "a.b", ""]:
        with pytest.raises(ValueError, match="key"):
            write_samples([Sample(key, None, "png", encoded(picture(0)))], tmp_path / "set")
    with pytest.raises(ValueError, match="repeated"):
        write_samples([Sample("x", None, "png", b"1"), Sample("x", None, "png", b"2")], tmp_path / "set")
    with pytest.raises(UserError, match="no samples"):
        write_samples([], tmp_path / "set")
    assert not (tmp_path / "set").exists()


def damaged(set_: Path) -> str:
    problems = verify(set_)
    assert problems
    assert all("\n" not in line for line in problems)
    return "\n".join(problems)


@pytest.fixture
def fresh_set(image_folder: Path, tmp_path: Path) -> Path:
    create(image_folder, tmp_path / "set", 5)
    return tmp_path / "set"


def test_verify_sees_a_truncated_tar(fresh_set: Path) -> None:
    path = fresh_set / "shard-000001.tar"
    os.truncate(path, path.stat().st_size // 2)
    text = damaged(fresh_set)
    assert "shard-000001.tar: truncated" in text
    assert "the manifest says 5" in text
    with pytest.raises(UserError, match=r"shard-000001\.tar: truncated"):
        manifests.check_sizes(manifests.load(fresh_set))


def test_verify_sees_a_flipped_byte(fresh_set: Path) -> None:
    entry = manifests.read_index(fresh_set / "shard-000000.tar")[2]
    offset, size = entry.members["png"]
    data = bytearray((fresh_set / "shard-000000.tar").read_bytes())
    data[offset + size // 2] ^= 0xFF
    (fresh_set / "shard-000000.tar").write_bytes(data)
    text = damaged(fresh_set)
    assert "shard-000000.tar: its sha256" in text
    assert entry.key in text


def test_verify_sees_missing_extra_and_disagreeing_files(fresh_set: Path) -> None:
    (fresh_set / "shard-000002.tar").rename(fresh_set / "shard-000009.tar")
    (fresh_set / "shard-000001.index.jsonl").unlink()
    index = fresh_set / "shard-000000.index.jsonl"
    index.write_text(index.read_text().replace("[512,", "[513,"))
    text = damaged(fresh_set)
    assert "shard-000002.tar: No such file" in text
    assert "shard-000009.tar: not in the manifest" in text
    assert "shard-000001.index.jsonl: missing" in text
    assert "shard-000000.index.jsonl: does not agree" in text


def test_verify_sees_wrong_counts_and_classes(fresh_set: Path) -> None:
    path = fresh_set / "manifest.json"
    raw = json.loads(path.read_text())
    raw["shards"][0]["samples"] += 1
    raw["classes"] = ["a"]
    path.write_text(json.dumps(raw))
    text = damaged(fresh_set)
    assert "holds 5 samples; the manifest says 6" in text
    assert "label 1 is not one of 1 classes" in text
