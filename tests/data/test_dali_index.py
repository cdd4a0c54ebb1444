"""Indexes in DALI's format, compared with one that is made from the tars' headers by DALI's rules, and with its reader."""

import importlib
import tarfile
from pathlib import Path

import pytest

from esvit_scale import cli
from tests.data.conftest import encoded, picture
from tests.data.source_helpers import as_tars


def by_dalis_rules(tar: Path) -> str:
    """The index that wds2idx makes: a line for each run of regular files whose names agree up to the first dot."""
    lines: list[tuple[str, list[str]]] = []
    with tarfile.open(tar) as archive:
        for member in archive:
            folder, slash, base = member.name.rpartition("/")
            stem, _, ext = base.partition(".")
            key = f"{folder}{slash}{stem}"
            if not member.isreg() or not stem:
                continue
            if not lines or lines[-1][0] != key:
                lines.append((key, []))
            lines[-1][1].append(f"{ext} {member.offset_data} {member.size} {member.name}")
    return f"v1.2 {len(lines)}\n" + "".join(" ".join(members) + "\n" for _, members in lines)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A set whose samples have a class and a caption."""
    images = {f"{kind}/{i}.png": encoded(picture(i + 10 * (kind == "b"))) for kind in "ab" for i in range(4)}
    where, _ = as_tars(images, tmp_path)
    assert cli.main(["shards", "create", str(where), str(tmp_path / "set"), "--samples-per-shard", "3"]) == 0
    return tmp_path / "set"


def test_index_is_the_one_that_dali_makes(labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["shards", "index", str(labelled), "--format", "dali"]) == 0
    assert "3 indexes for DALI" in capsys.readouterr().out
    tars = sorted(labelled.glob("*.tar"))
    assert len(tars) == 3
    assert all(tar.with_suffix(".idx").read_text() == by_dalis_rules(tar) for tar in tars)
    assert cli.main(["shards", "index", str(labelled), "--format", "dali", "--out", str(tmp_path / "idx")]) == 0
    assert sorted(path.name for path in (tmp_path / "idx").iterdir()) == [tar.with_suffix(".idx").name for tar in tars]
    assert cli.main(["shards", "verify", str(labelled)]) == 0
    capsys.readouterr()
    assert cli.main(["shards", "index", str(labelled), "--out", str(tmp_path / "idx")]) == 2
    assert "--out: only with --format dali" in capsys.readouterr().err


@pytest.mark.slow
def test_dali_reads_the_set(labelled: Path) -> None:
    dali = pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (pip install nvidia-dali-cuda120)")
    fn = importlib.import_module("nvidia.dali.fn")

    assert cli.main(["shards", "index", str(labelled), "--format", "dali"]) == 0
    tars = sorted(map(str, labelled.glob("*.tar")))

    @dali.pipeline_def(batch_size=8, num_threads=1, device_id=None)
    def pipeline():  # type: ignore[no-untyped-def]
        return fn.readers.webdataset(paths=tars, index_paths=[tar[:-3] + "idx" for tar in tars], ext=["png", "cls"])

    built = pipeline()
    built.build()
    images, labels = built.run()
    with tarfile.open(tars[0]) as archive:
        first = next(member for member in archive if member.name.endswith(".png"))
        assert bytes(images.at(0)) == archive.extractfile(first).read()  # type: ignore[union-attr]
    assert len(labels) == 8
