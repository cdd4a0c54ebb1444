"""Sets written in parts, split, thinned out, re-encoded and repaired."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esvit_scale import cli
from esvit_scale.data import manifest as manifests
from esvit_scale.data import set_folder
from esvit_scale.data.evaluation import Items
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.planned_shard import load
from esvit_scale.data.reader import ShardReader
from esvit_scale.data.reencode import Reencode
from esvit_scale.data.shard_plan import Recipe
from esvit_scale.data.shard_repair import repair
from esvit_scale.data.shard_verify import verify
from esvit_scale.data.shard_writer import Part, Sample, merge, write_samples, write_source
from esvit_scale.data.sources import SourceOptions, open_source
from esvit_scale.errors import RestartCanHelp, UserError
from tests import launcher
from tests.data.conftest import encoded, picture
from tests.data.source_helpers import Capture, run_create

FEW = Recipe(samples_per_shard=3)


def write(
    where: Path, out: Path, recipe: Recipe = FEW, workers: int = 1, part: Part | None = None
) -> dict[str, Manifest]:
    return write_source(str(where), out, SourceOptions(), recipe, workers, part)


def files_of(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def keys(manifest: Manifest) -> list[str]:
    return [e.key for shard in manifest.shards for e in manifests.read_index(manifest.root / shard.name)]


def stored(manifest: Manifest) -> dict[str, bytes]:
    reader = ShardReader(manifest)
    places = [(n, reader.entry(n, i)) for n, shard in enumerate(manifest.shards) for i in range(shard.samples)]
    found = {entry.key: reader.image(n, entry) for n, entry in places}
    reader.close()
    return found


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("val", [0.0, 0.3])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_parts_merge_into_the_same_bytes(n: int, val: float, image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "a" / "bad.png").write_bytes(b"x")
    recipe = Recipe(samples_per_shard=2, val_fraction=val)
    write(image_folder, tmp_path / "whole", recipe)
    # The last part always has a shard; with more parts than shards others have none, and missing them is no lack.
    order = [*np.random.default_rng().permutation(n - 1).tolist(), n - 1]
    for i in order[:-1]:
        assert write(image_folder, tmp_path / "parts", recipe, part=Part(i + 1, n)) == {}
    if n > 1:
        with pytest.raises(UserError, match=r"shards are not written yet \(first: shard-0"):
            merge(tmp_path / "parts")
    write(image_folder, tmp_path / "parts", recipe, part=Part(order[-1] + 1, n))
    sets = merge(tmp_path / "parts")
    assert set(sets) == ({"train", "val"} if val else {""})
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    assert merge(tmp_path / "parts") == sets  # a second time: nothing to do


def exit_with(arguments: list[str]) -> None:
    sys.exit(cli.main(arguments))


def test_parts_can_be_written_at_the_same_time(image_folder: Path, tmp_path: Path) -> None:
    write(image_folder, tmp_path / "whole", Recipe(samples_per_shard=1))
    create = [
        "shards",
        "create",
        str(image_folder),
        str(tmp_path / "parts"),
        "--samples-per-shard",
        "1",
        "--workers",
        "1",
    ]
    fork = multiprocessing.get_context("fork")  # a new interpreter would only import the same modules for seconds
    children = [fork.Process(target=exit_with, args=([*create, "--shard-range", f"{i}/2"],)) for i in (1, 2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    merge(tmp_path / "parts")
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def test_merge_without_parts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no parts of a shard set in it"):
        merge(tmp_path)


def test_any_number_of_workers_gives_the_same_bytes(image_folder: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 5):
        write(image_folder, tmp_path / str(workers), workers=workers)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2") == files_of(tmp_path / "5")


KILLS_ITSELF = """
import os, signal, sys
from itertools import pairwise
from pathlib import Path
from esvit_scale import cli
from esvit_scale.data import planned_shard
decode, seen = planned_shard.decode, []
def killing(data):
    seen.append(data)
    if len(seen) == 5: os.kill(os.getpid(), signal.SIGKILL)
    return decode(data)
planned_shard.decode = killing
sys.exit(cli.main(["shards", "create", sys.argv[1], sys.argv[2], "--samples-per-shard", "3", "--workers", "2"]))
"""


def test_killed_worker_is_one_line_error_and_restart_finishes(image_folder: Path, tmp_path: Path) -> None:
    child = launcher.fork("-c", KILLS_ITSELF, image_folder, tmp_path / "set")
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 75, errors
    assert "a worker process was killed" in errors
    assert "Traceback" not in errors
    write(image_folder, tmp_path / "set")
    write(image_folder, tmp_path / "undisturbed")
    assert files_of(tmp_path / "set") == files_of(tmp_path / "undisturbed")


@pytest.mark.slow
def test_set_after_ten_random_kills_equals_undisturbed_set(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(400):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(encoded(picture(i, 200, 150), "JPEG"))
    recipe = ["--samples-per-shard", "5", "--short-side", "100", "--workers", "2"]
    command = [sys.executable, "-m", "esvit_scale", "shards", "create", tmp_path / "images"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    rng, killed = np.random.default_rng(), 0
    for _ in range(10):
        child = subprocess.Popen([*command, tmp_path / "set", *recipe], env=env, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (tmp_path / "set" / ".partial" / "plan.json").exists() and child.poll() is None:
            assert time.monotonic() < deadline
        time.sleep(float(rng.uniform(0, 0.4)))
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        if (tmp_path / "set" / "manifest.json").exists():
            break
    assert killed
    subprocess.run([*command, tmp_path / "set", *recipe], env=env, check=True)
    subprocess.run([*command, tmp_path / "undisturbed", *recipe], env=env, check=True)
    assert files_of(tmp_path / "set") == files_of(tmp_path / "undisturbed")


def test_source_that_goes_away_stops_and_can_continue(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esvit_scale.data.planned_shard.RETRY_DELAYS", (0.01, 0.01))
    [source] = open_source(str(image_folder), SourceOptions()).values()
    image_folder.rename(tmp_path / "away")
    with pytest.raises(RestartCanHelp, match=r"can no longer be read \(No such file or directory\)"):
        load(source, 0)
    (tmp_path / "away").rename(image_folder)
    assert load(source, 0).data
    (image_folder / source.name(0)).unlink()
    with pytest.raises(FileNotFoundError):
        load(source, 0)


# --- what goes in ----------------------------------------------------------------------------------------------------


def test_bytes_per_shard_bounds_each_shard(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(30):
        side = 10 + i * 3
        noise = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        (tmp_path / "images" / f"{i}.png").write_bytes(encoded(Image.fromarray(noise)))
    [manifest] = write(tmp_path / "images", tmp_path / "set", Recipe(bytes_per_shard=40_000)).values()
    reader = ShardReader(manifest)
    sizes = [
        [len(reader.image(n, reader.entry(n, i))) for i in range(s.samples)] for n, s in enumerate(manifest.shards)
    ]
    assert sum(map(len, sizes)) == 30
    assert all(sum(shard) <= 40_000 for shard in sizes)
    assert all(sum(shard) + following[0] > 40_000 for shard, following in pairwise(sizes))


def test_no_shuffle_keeps_the_source_order(image_folder: Path, tmp_path: Path) -> None:
    [manifest] = write(image_folder, tmp_path / "set", Recipe(shuffle=False)).values()
    assert keys(manifest) == sorted(keys(manifest))


def test_small_images_are_left_out(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "a" / "big.png").write_bytes(encoded(picture(1, 40, 32)))
    [manifest] = write(image_folder, tmp_path / "set", Recipe(min_side=32)).values()
    assert keys(manifest) == ["a/big"]
    rows = [json.loads(line) for line in (tmp_path / "set" / "quarantine.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert rows[0]["reason"] == "20x16 pixels: the shorter side is under --min-side 32"


def test_val_split_depends_on_seed_and_key(image_folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(val_fraction=0.3, seed=4)
    first = write(image_folder, tmp_path / "one", recipe)
    assert sorted(keys(first["train"]) + keys(first["val"])) == sorted(keys(write(image_folder, tmp_path / "all")[""]))
    (image_folder / "b" / "another.png").write_bytes(encoded(picture(77)))
    second = write(image_folder, tmp_path / "two", recipe)
    for name in ("train", "val"):  # nobody changed sides
        assert set(keys(first[name])) == set(keys(second[name])) - {"b/another"}
        assert first[name].classes == ("a", "b")
    with pytest.raises(UserError, match="none of the 13 samples falls into val; nearest"):
        write(image_folder, tmp_path / "three", Recipe(val_fraction=1e-9))


def test_val_split_has_the_asked_fraction() -> None:
    from esvit_scale.data.keys import Keys
    from esvit_scale.data.shard_plan import split

    n = 20_000
    keys_ = Keys(n, lambda i: f"k{i}.png", lambda i: f"k{i}.png")
    parts = split(keys_, np.arange(n), Recipe(val_fraction=0.05, seed=int(np.random.default_rng().integers(1 << 30))))
    assert abs(len(parts["val"]) / n - 0.05) < 5 * (0.05 * 0.95 / n) ** 0.5


def test_exact_duplicates_are_dropped_and_named(image_folder: Path, tmp_path: Path) -> None:
    shutil.copy(image_folder / "a" / "p0.png", image_folder / "b" / "copy.png")
    shutil.copy(image_folder / "a" / "p0.png", image_folder / "b" / "z.png")
    for workers in (1, 2):
        out = tmp_path / f"set{workers}"
        [manifest] = write(image_folder, out, Recipe(5, drop_duplicates=True), workers).values()
        assert manifest.samples == 12
        rows = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
        assert rows == [
            {"file": f"b/{n}.png", "reason": "the same bytes as a/p0.png", "kind": "duplicate"} for n in ("copy", "z")
        ]
    assert files_of(tmp_path / "set1") == files_of(tmp_path / "set2")
    with pytest.raises(UserError, match=r"shards duplicates .* --out keep\.txt"):
        write(image_folder, tmp_path / "part", Recipe(drop_duplicates=True), part=Part(1, 2))


def test_keep_list_selects_images(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keep.txt").write_text("# chosen\na/p0.png\nb/p1.png\nno/such.png\n")
    [manifest] = write(image_folder, tmp_path / "set", Recipe(keep=tmp_path / "keep.txt")).values()
    assert sorted(keys(manifest)) == ["a/p0", "b/p1"]
    assert "1 of its 3 lines name no sample" in capsys.readouterr().err
    (tmp_path / "keep.txt").write_text("other/x.png\n")
    with pytest.raises(UserError, match="names none of the 12 samples"):
        write(image_folder, tmp_path / "set2", Recipe(keep=tmp_path / "keep.txt"))
    with pytest.raises(UserError, match="No such file"):
        write(image_folder, tmp_path / "set2", Recipe(keep=tmp_path / "no.txt"))


# --- encoding --------------------------------------------------------------------------------------------------------


def test_re_encoding_gives_the_asked_size_quality_and_format(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    sources = {
        "big.png": encoded(picture(0, 90, 60)),
        "tall.jpg": encoded(picture(1, 50, 120), "JPEG", quality=95),
        "turned.jpg": encoded(picture(2, 90, 60), "JPEG", exif=turned),
        "small.png": encoded(picture(3, 20, 16)),
    }
    for name, data in sources.items():
        (tmp_path / "images" / name).write_bytes(data)

    def images(name: str, reencode: Reencode) -> dict[str, Image.Image]:
        [manifest] = write(tmp_path / "images", tmp_path / name, Recipe(reencode=reencode)).values()
        assert verify(tmp_path / name) == []
        return {key: Image.open(io.BytesIO(data)) for key, data in stored(manifest).items()}

    shrunk = images("short", Reencode(short_side=30))
    sizes = {key: image.size for key, image in shrunk.items()}
    assert sizes == {"big": (45, 30), "tall": (30, 72), "turned": (30, 45), "small": (20, 16)}
    assert stored(manifests.load(tmp_path / "short"))["small"] == sources["small.png"]  # small enough: its own bytes
    reference = picture(0, 90, 60).resize((45, 30), Image.Resampling.LANCZOS)
    difference = np.abs(np.asarray(shrunk["big"].convert("RGB"), float) - np.asarray(reference, float))
    assert difference.mean() < 6  # JPEG's own error
    webp = images("webp", Reencode(format="webp"))
    assert {image.format for image in webp.values()} == {"WEBP"}
    assert {e for s in manifests.read_index(tmp_path / "webp" / "shard-000000.tar") for e in s.members} == {"webp"}
    low, high = (images(f"q{q}", Reencode(quality=q, format="jpeg")) for q in (20, 95))
    assert all(image.format == "JPEG" for image in low.values())
    bytes_of = [sum(map(len, stored(manifests.load(tmp_path / name)).values())) for name in ("q20", "q95")]
    assert bytes_of[0] < bytes_of[1]
    assert set(high) == set(low)


# --- repair ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["", "val"])
def test_repair_rewrites_only_damaged_shards(split: str, image_folder: Path, tmp_path: Path) -> None:
    for i in range(12, 40):
        (image_folder / "a" / f"p{i}.png").write_bytes(encoded(picture(i)))
    recipe = Recipe(samples_per_shard=3, seed=3, val_fraction=0.5 if split else 0.0, reencode=Reencode(short_side=12))
    write(image_folder, tmp_path / "set", recipe)
    root = tmp_path / "set" / split
    before = files_of(root)
    os.truncate(root / "shard-000001.tar", 700)
    (root / "shard-000002.tar").unlink()
    data = bytearray(before["shard-000003.tar"])
    data[700] ^= 1
    (root / "shard-000003.tar").write_bytes(data)
    (root / "shard-000000.index.jsonl").write_text("nonsense")
    times = {p.name: p.stat().st_mtime_ns for p in root.iterdir()}
    with pytest.raises(UserError, match="give the source to write the tar again: --repair SRC"):
        repair(root, "")
    done = repair(root, str(image_folder), workers=2)
    assert len([line for line in done if line.endswith("written again")]) == 3
    assert files_of(root) == before
    assert verify(root) == []
    untouched = {p.name for p in root.iterdir() if p.stat().st_mtime_ns == times.get(p.name)}
    assert {"shard-000000.tar", "shard-000004.tar", "shard-000004.index.jsonl", "manifest.json"} <= untouched
    assert repair(root, str(image_folder)) == []


def test_repair_from_another_source_changes_nothing(image_folder: Path, tmp_path: Path) -> None:
    write(image_folder, tmp_path / "set")
    os.truncate(tmp_path / "set" / "shard-000001.tar", 700)
    shutil.copytree(image_folder, tmp_path / "other")
    (tmp_path / "other" / "a" / "p0.png").write_bytes(encoded(picture(1234, 30, 30)))
    before = files_of(tmp_path / "set")
    with pytest.raises(UserError, match=r"not what .* was written from"):
        repair(tmp_path / "set", str(tmp_path / "other"))
    assert files_of(tmp_path / "set") == before
    write_samples([Sample("x", None, "png", encoded(picture(0)))], tmp_path / "made")
    os.truncate(tmp_path / "made" / "shard-000000.tar", 700)
    with pytest.raises(UserError, match="does not say how it was written"):
        repair(tmp_path / "made", str(image_folder))


def test_repair_refuses_other_pixels(tmp_path: Path) -> None:
    """The same names and sizes, so that only the bytes themselves can tell."""
    (tmp_path / "images").mkdir()
    for i in range(6):
        (tmp_path / "images" / f"{i}.bmp").write_bytes(encoded(picture(i), "BMP"))
    write(tmp_path / "images", tmp_path / "set")
    os.truncate(tmp_path / "set" / "shard-000001.tar", 700)
    for i in range(6):
        (tmp_path / "images" / f"{i}.bmp").write_bytes(encoded(picture(100 + i), "BMP"))
    before = files_of(tmp_path / "set")
    with pytest.raises(UserError, match=r"shard-000001\.tar: has another sha256 when written again"):
        repair(tmp_path / "set", str(tmp_path / "images"))
    assert files_of(tmp_path / "set") == before


def test_parallel_verification_finds_the_same(image_folder: Path, tmp_path: Path) -> None:
    write(image_folder, tmp_path / "set")
    os.truncate(tmp_path / "set" / "shard-000001.tar", 700)
    shutil.copy(tmp_path / "set" / "shard-000000.tar", tmp_path / "set" / "shard-000002.tar")
    one, two = verify(tmp_path / "set", 1), verify(tmp_path / "set", 2)
    assert one == two
    assert any("this key is in the set twice" in line for line in one)


def test_records_of_another_run_are_not_mixed_in(image_folder: Path, tmp_path: Path) -> None:
    write(image_folder, tmp_path / "set", part=Part(1, 2))
    assert set_folder.records(tmp_path / "set" / ".partial")
    with pytest.raises(UserError, match=r"unfinished set of other images or options \(2 of 4 shards are written\)"):
        write(image_folder, tmp_path / "set", Recipe(samples_per_shard=3, seed=1), part=Part(2, 2))


def test_set_is_not_written_inside_another(image_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run_create(image_folder, tmp_path / "set") == 0
    for where, *more in ((tmp_path / "set", "--val-fraction", 0.5), (tmp_path / "set" / "inner",)):
        assert run_create(image_folder, where, *more) == 2
        assert "already holds another shard set" in capsys.readouterr().err
    assert run_create(image_folder, tmp_path / "two", "--val-fraction", 0.5) == 0
    assert run_create(image_folder, tmp_path / "two") == 2
    assert "already holds the sets of a split" in capsys.readouterr().err


def test_subset_has_the_same_fraction_of_every_class_whatever_the_shards(tmp_path: Path) -> None:
    """round(F · n) of each class, at least one, nested; the same keys from another division into shards."""
    images = [Sample(f"x{i:03d}", i % 2 if i < 40 else 2, "png", encoded(picture(i))) for i in range(43)]
    write_samples(images, tmp_path / "set", ("a", "b", "c"), 7, "test")
    write_samples(images[::-1], tmp_path / "other", ("a", "b", "c"), 20, "test")

    def subset(source: str, fraction: float) -> dict[str, int]:
        out = tmp_path / f"{source}-{fraction}"
        command = ["shards", "subset", str(tmp_path / source), str(out), "--fraction", str(fraction), "--workers", "1"]
        assert cli.main(command) == 0
        items = Items(manifests.load(out))
        return {key: label for key, label, _ in map(items.read, range(len(items)))}

    tenth, half = subset("set", 0.1), subset("set", 0.5)
    assert [list(tenth.values()).count(label) for label in range(3)] == [2, 2, 1]
    assert [list(half.values()).count(label) for label in range(3)] == [10, 10, 2]
    assert tenth.items() <= half.items()
    assert subset("other", 0.1) == tenth
