"""Image data sets that the real library of Hugging Face writes, as sources."""

from pathlib import Path

import pytest

from esvit_scale import cli
from tests.data.conftest import encoded, picture
from tests.data.source_helpers import contents, parquet, write

NAMES = ["zebra", "ape"]


@pytest.mark.slow
def test_parquet_of_the_library_keeps_bytes_and_class_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (pip install datasets==5.2.0)")
    images = [encoded(picture(i)) for i in range(6)]
    (tmp_path / "repository" / "data").mkdir(parents=True)
    (tmp_path / "repository" / "README.md").write_text("# A data set")
    made = datasets.Dataset.from_dict(
        {"image": [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)], "label": [0, 1, 1, 0, 0, 1]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}),
    )
    for part in range(2):
        path = tmp_path / "repository" / "data" / f"train-{part:05d}-of-00002.parquet"
        made.shard(2, part).to_parquet(str(path))
    found = write(tmp_path / "repository", tmp_path / "set", label="label")
    assert found.classes == tuple(NAMES)
    labels = [0, 1, 1, 0, 0, 1]
    assert contents(found) == {data: (NAMES[label], None) for data, label in zip(images, labels, strict=True)}


def test_repository_with_its_files_in_data_is_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "repository" / "data").mkdir(parents=True)
    columns = {"image": [{"bytes": encoded(picture(i)), "path": None} for i in range(4)], "y": [1, 0, 1, 0]}
    parquet(tmp_path / "repository" / "data" / "train-00000-of-00001.parquet", columns, names=NAMES)
    for url, name in ((str(tmp_path / "repository"), "local"), (f"file://{tmp_path}/repository", "remote")):
        arguments = ["shards", "create", url, str(tmp_path / name), "--label", "y", "--workers", "1"]
        assert cli.main(arguments) == 0
        assert "4 samples in 1 shards, 2 classes" in capsys.readouterr().out
