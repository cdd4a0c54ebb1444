"""`esvit-scale shards …` from the command line: what it prints, leaves and refuses."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esvit_scale import cli
from esvit_scale.commands import option_types
from esvit_scale.data import manifest as manifests

ROOT = Path(__file__).parents[1]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng()
    for i in range(20):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def test_create_verify_stats_and_show_work_on_one_set(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> str:
        assert cli.main(["shards", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    out = tmp_path / "set"
    create = ("create", images, out, "--samples-per-shard", 6, "--workers", 1)
    assert "part 1 of 2 is written" in run(*create, "--shard-range", "1/2")
    run(*create, "--shard-range", "2/2")
    assert run("merge", out) == f"{out}: 20 samples in 4 shards, 2 classes\n"
    assert run("verify", out, "--workers", 1) == f"{out}: every shard agrees with the manifest\n"
    assert "20 in 4 shards" in run("stats", out, "--plot", tmp_path / "plot.png", "--workers", 1)
    assert json.loads(run("stats", out, "--json", "--workers", 1))["class_counts"] == {"a": 10, "b": 10}
    run("show", out, "--out", tmp_path / "sheet.png", "--count", 5)
    run("show", out, "--out", tmp_path / "sheet.html")
    for name in ("plot.png", "sheet.png"):
        assert Image.open(io.BytesIO((tmp_path / name).read_bytes())).size[0] > 300
    assert (tmp_path / "sheet.html").read_text().count("<img ") == 20
    run("split", out, tmp_path / "halves", "--val-fraction", "0.5", "--workers", 1)
    halves = [manifests.load(tmp_path / "halves" / name) for name in ("train", "val")]
    assert sum(half.samples for half in halves) == 20
    assert {half.classes for half in halves} == {("a", "b")}
    (out / "shard-000001.tar").write_bytes(b"damaged")
    assert cli.main(["shards", "verify", str(out), "--workers", "1"]) == 2
    assert "shard-000001.tar: truncated" in capsys.readouterr().err
    said = run("verify", out, "--repair", images, "--workers", 1)
    assert "shard-000001.tar: written again" in said
    assert "every shard agrees with the manifest" in said
    assert "keeps 20 of 20" in run("duplicates", images, "--out", tmp_path / "k", "--near", 0, "--workers", 1)


MISTAKES = {
    "create . s3:/b/set": "s3:/b/set: did you mean s3://b/set? A path of this name is ./s3:/b/set",
    "create . S3://b/set": "did you mean s3://b/set?",
    "verify gs:b/set": "did you mean gs://b/set?",
    "duplicates . --out s3://b/keep.txt": "s3://b/keep.txt: not an address but a path is needed",
    "create a b --shard-range 0/4": "expected I/N with 1 ≤ I ≤ N (the first of four parts is 1/4), got '0/4'",
    "create a b --shard-range 5/4": "expected I/N",
    "create a b --bytes-per-shard 5X": "expected a size such as 500M or 2G, got '5X'",
    "create a b --bytes-per-shard 5M --samples-per-shard 3": "not allowed with",
    "create a b --val-fraction 1": "expected a fraction between 0 and 1",
    "create a b --quality 101": "expected a quality of 1..100",
    "create a b --format tiff": "unknown format 'tiff'; known: jpeg, jpg, keep, png, webp",
    "create a b --from foldr": "--from foldr: unknown kind of source; did you mean 'folder'?",
    "create a.csv b": "a.csv: no such folder",
    "duplicates a --out k --near 8": "expected 0..7 bits, got '8'",
    "show a --out x.gif": "--out x.gif: must end in .png or .html",
    "show a --out x.png": "a: no such shard folder",
    "stats a": "a: no such shard folder",
    "split a b --val-fraction 0.5": "a: no such shard folder",
    "merge a": "a: no parts of a shard set in it",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_user_error_is_one_line(arguments: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(["shards", *arguments.split()])
    except SystemExit as stop:  # argparse
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2
    assert said.count("\n") == 1, said
    assert MISTAKES[arguments] in said
    assert list(tmp_path.iterdir()) == []


def test_size_suffixes_are_parsed() -> None:
    assert [option_types.size(t) for t in ("7", "500M", "2g", "1.5GB", "3kB")] == [
        7,
        500_000_000,
        2 * 10**9,
        1_500_000_000,
        3000,
    ]


def test_help_lists_every_kind_of_source(capsys: pytest.CaptureFixture[str]) -> None:
    from esvit_scale.data.sources import KINDS

    with pytest.raises(SystemExit):
        cli.main(["shards", "create", "--help"])
    said = capsys.readouterr().out
    assert [kind for kind in KINDS if kind not in said] == []


@pytest.mark.slow
def test_list_of_a_million_lines_stays_within_memory() -> None:
    command = [sys.executable, "benchmarks/shards.py", "--images", "20", "--workers", "1", "--repeats", "1", "--json"]
    done = subprocess.run([*command, "--lines", "1000000"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["list"]["peak_mb"] < 130
