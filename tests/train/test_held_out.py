"""Whether a start says that the images on which k-NN is measured are those that the run trains on."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.evaluate import overlap
from esvit_scale.train import held_out, pretraining
from tests import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("data") / "shards")


def config(data: Path, labelled: Path, **changes: Any) -> Config:
    return tiny.config(data.parent / "run", data, data__held_out=str(labelled), train__knn_every=2, **changes)


def test_training_set_as_held_out_set_is_refused_at_the_first_start(data: Path) -> None:
    same = data.parent / "." / data.name
    with pytest.raises(UserError, match=r"data\.held_out: .*: is the training set.*--val-fraction"):
        pretraining.pretrain(config(data, same))
    assert not (data.parent / "run" / "config.yaml").exists()
    mixed = {"data__mix": [{"urls": str(data.parent / "other")}, {"urls": str(data)}], "data__train": ""}
    with pytest.raises(UserError, match="is the training set"):
        held_out.check(config(data, same, **mixed), resumed=False)
    url = {"data__train": "s3://bucket/set/", "data__held_out": "s3://bucket/set"}
    with pytest.raises(UserError, match="is the training set"):
        held_out.check(tiny.config(data, data, **url), resumed=False)


def test_run_that_began_with_its_training_set_goes_on_with_a_warning(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held_out.check(config(data, data), resumed=True)
    assert "is the training set, so k-NN would measure memory" in caplog.text


def test_held_out_images_that_are_trained_on_are_counted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mostly = tiny.shards(tmp_path / "mostly", samples=40, first=12)  # 24 of the 36 training images, and 16 others
    held_out.check(config(data, mostly), resumed=False)
    assert f"data.held_out: {mostly}: 24 of 40 images have the same bytes as one of {data}, for example" in caplog.text
    caplog.clear()
    monkeypatch.setattr(held_out, "LOOKED_THROUGH", 10)  # of 36 training images
    monkeypatch.setattr(overlap, "BLOCK", 5)
    held_out.check(config(data, shutil.copytree(data, tmp_path / "copy")), resumed=False)
    assert "10 of 36 images have the same bytes" in caplog.text


def test_finished_run_says_on_which_images_it_was_measured(data: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "knn_top1": 0.5, "knn_images": 40, "knn_held_out": "photos"}\n'
    )
    said = held_out.other_images(config(data, Path("shards/val")), tmp_path)
    assert said == "its k-NN accuracies are of photos, not of data.held_out=shards/val"
    assert not held_out.other_images(config(data, Path("photos").absolute()), tmp_path)
    assert not held_out.other_images(config(data, Path("photos")), tmp_path / "no rows")


def test_other_images_and_sets_that_cannot_be_read_pass(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held_out.check(config(data, tiny.shards(tmp_path / "others", first=100)), resumed=False)
    held_out.check(config(data, tmp_path / "nothing"), resumed=False)
    held_out.check(config(data, tmp_path, data__train="/data/{0..9}.tar", data__epoch_samples=9), resumed=False)
    assert not caplog.records
