"""A resumed run accepts the data that it was trained on, wherever it is, and no other data."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esvit_scale import cli
from esvit_scale.data import identity as identities
from esvit_scale.data import manifest as manifests
from tests import tiny

OPTIONS: dict[str, Any] = {"train__steps": 4, "train__checkpoint_every": 2}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a shard set and a run of 4 steps that looks killed after step 2."""
    folder = tmp_path_factory.mktemp("identity")
    config = tiny.config(folder / "run", tiny.shards(folder / "shards"), **OPTIONS)
    assert cli.main(["pretrain", str(tiny.write_config(folder / "c.yaml", config))]) == 0
    shutil.copytree(folder / "run", folder / "straight")
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000004")
    (folder / "run" / "summary.json").unlink()
    return folder


@pytest.fixture
def place(stopped: Path, tmp_path: Path) -> Path:
    """Copy that folder; the run's config still names the original shards."""
    shutil.copytree(stopped, tmp_path / "copy")
    return tmp_path / "copy"


def resume(place: Path, data: Path) -> int:
    config = tiny.config(place / "run", data, **OPTIONS)
    return cli.main(["pretrain", str(tiny.write_config(place / "c.yaml", config))])


def edit_manifest(root: Path, edit: Callable[[list[dict[str, Any]]], Any]) -> None:
    content = json.loads((root / "manifest.json").read_text())
    edit(content["shards"])
    (root / "manifest.json").write_text(json.dumps(content))


def other(root: Path) -> None:
    shutil.rmtree(root)
    tiny.shards(root, samples=35)


def larger(root: Path) -> None:
    shutil.rmtree(root)
    tiny.shards(root, samples=60)


def same_size(root: Path) -> None:
    """Replace a shard's content by that of another shard, in the manifest, too."""
    edit_manifest(root, lambda shards: shards[0].update(sha256=shards[1]["sha256"]))


def flipped(root: Path) -> None:
    """Change a byte of a shard, but not the manifest."""
    shard = sorted(root.glob("*.tar"))[2]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other, "was trained on 4 shards, 36 samples (sha256"),
        (larger, "holds 6 shards, 60 samples (sha256"),
        (lambda root: edit_manifest(root, lambda shards: shards.reverse()), "holds 4 shards, 36 samples (sha256"),
        (same_size, "holds 4 shards, 36 samples (sha256"),
        (flipped, "and is not what manifest.json says (sha256"),
    ],
    ids=["other", "larger", "reordered", "another shard", "another file"],
)
def test_other_data_is_refused_and_both_sets_are_named(
    place: Path, change: Callable[[Path], Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(place / "shards")
    before = (place / "run" / "metrics.jsonl").read_bytes()
    assert resume(place, place / "shards") == 2
    error = capsys.readouterr().err
    assert "step-00000002" in error
    assert says in error
    assert (place / "run" / "metrics.jsonl").read_bytes() == before


def test_moved_and_renamed_data_resumes(stopped: Path, place: Path) -> None:
    moved = place / "moved"
    (place / "shards").rename(moved)
    for shard in moved.glob("*.tar"):
        shard.rename(moved / f"x{shard.name}")
        index = manifests.index_path(shard)
        text = index.read_text().replace(shard.name, f"x{shard.name}")
        index.unlink()
        manifests.index_path(moved / f"x{shard.name}").write_text(text)
    edit_manifest(moved, lambda shards: [shard.update(name="x" + shard["name"]) for shard in shards])
    assert resume(place, moved) == 0
    assert tiny.rows(place / "run") == tiny.rows(stopped / "straight")


def test_moved_data_without_recorded_identity_is_another_config(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place / "run" / "checkpoints" / "step-00000002" / "state.json"
    old = json.loads(path.read_text()) | {"format_version": 1}
    del old["data"], old["sha256"]
    path.write_text(json.dumps(old))
    assert resume(place, place / "shards") == 2
    assert "holds a run of another config (data.train:" in capsys.readouterr().err


def test_plain_tars_are_identified_by_name_and_size(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped / "shards", tmp_path / "shards")

    def of(root: Path, **data: Any) -> str:
        mix = [{"urls": f"{root}/*.tar".replace("*.tar", ""), "weight": 2}, {"urls": "pipe:cat x.tar"}]
        values = {"data__mix": mix, "data__train": "", "data__epoch_samples": 36} | data
        config = tiny.config(tmp_path / "run", root, **values)
        return identities.identity(identities.UrlSets.open(config.data))["sha256"]

    first = of(stopped / "shards")
    assert of(tmp_path / "shards") == first
    assert of(tmp_path / "shards", data__epoch_samples=35) != first
    with next((tmp_path / "shards").glob("*.tar")).open("ab") as file:
        file.write(bytes(512))
    assert of(tmp_path / "shards") != first
