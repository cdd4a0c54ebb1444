"""The baselines that every evaluation takes in the place of a checkpoint: raw pixels and the untrained trunk."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from esvit_scale import cli
from esvit_scale.errors import UserError
from esvit_scale.evaluate import baselines, knn
from esvit_scale.evaluate.feature_cache import trunk_digest
from esvit_scale.evaluate.features import load_frozen_trunk, raw_pixels
from esvit_scale.evaluate.knn import with_class_names
from esvit_scale.evaluate.pixels import small_pixels
from esvit_scale.train import run_dir
from tests import tiny


def test_knn_and_linear_take_raw_pixels(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = photos / "train", photos / "test"
    common = ["--checkpoint", "pixels", "--train", str(train), "--test", str(test), "--workers", "0", "--out"]
    assert cli.main(["evaluate", "knn", *common, str(tmp_path), "--k", "5"]) == 0
    result = json.loads((tmp_path / "knn.json").read_text())
    sets = [with_class_names(raw_pixels(source, 32, workers=0), source) for source in (train, test)]
    assert result["results"] == json.loads(json.dumps(knn.evaluate(*sets, ks=[5])["results"]))
    assert (result["name"], result["step"], result["feature_dim"]) == ("raw pixels, 32 × 32", None, 3 * 32**2)
    assert "raw pixels, 32 × 32" in capsys.readouterr().out
    probes = ["--protocol", "official", "logistic", "--epochs", "2"]
    assert cli.main(["evaluate", "linear", *common, str(tmp_path), *probes]) == 0
    assert json.loads((tmp_path / "linear.json").read_text())["results"].keys() == {"official", "logistic"}


def test_untrained_trunk_is_the_one_with_which_the_run_starts(checkpoint: Path, tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "run", tmp_path)
    expected = trunk_digest(load_frozen_trunk(checkpoint).trunk)  # made by initialize(network, seed 0)
    (tmp_path / "run").mkdir()
    run_dir.record_start(tmp_path / "run", config)
    for named in (tiny.write_config(tmp_path / "c.yaml", config), tmp_path / "run"):
        found = load_frozen_trunk(Path(f"untrained:{named}"))
        assert trunk_digest(found.trunk) == expected
        assert (found.size, found.step, found.name) == (32, 0, "untrained tiny")
    other = tiny.write_config(tmp_path / "d.yaml", tiny.config(tmp_path / "run", tmp_path, seed=1))
    assert trunk_digest(load_frozen_trunk(Path(f"untrained:{other}")).trunk) != expected
    assert load_frozen_trunk(Path("untrained:demo")).size == 64


def test_pixels_are_averaged_over_areas() -> None:
    images = torch.rand(2, 3, 64, 64)
    expected = images.view(2, 3, 32, 2, 32, 2).mean((3, 5)).flatten(1)
    np.testing.assert_allclose(small_pixels(images), expected, rtol=1e-6, atol=1e-7)  # a sum of 4 in fp32
    assert torch.equal(small_pixels(images[..., :16, :16]), images[..., :16, :16].flatten(1))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("untrained:", "needs a preset, a YAML file or a run dir"),
        ("untrained:swin_tt", "did you mean"),
        ("pixels:0", "a side of 1 to 1024"),
        ("pixels:big", "a side of 1 to 1024"),
    ],
)
def test_wrong_names_are_explained(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_frozen_trunk(Path(name))


def test_a_path_can_have_the_name_of_a_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parse = cli.build_parser().parse_args
    rest = ["--train", "t", "--test", "v", "--out", "o"]
    assert baselines.is_baseline(str(parse(["evaluate", "knn", "--checkpoint", "pixels", *rest]).checkpoint))
    assert parse(["evaluate", "knn", "--checkpoint", "./pixels", *rest]).checkpoint == tmp_path / "pixels"
    assert parse(["evaluate", "knn", "--checkpoint", "runs/x", *rest]).checkpoint == Path("runs/x")


def test_evaluations_of_tokens_refuse_pixels(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = next((photos / "test").rglob("*.png"))
    for command in (["correspondence", "--data"], ["attention"]):
        arguments = [*command, str(image), "--checkpoint", "pixels", "--out", str(tmp_path)]
        assert cli.main(["evaluate", *arguments]) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_mistyped_baseline_is_told_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="or a baseline: pixels or untrained:CONFIG"):
        load_frozen_trunk(tmp_path / "pixel")
