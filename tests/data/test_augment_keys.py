"""The augmentation keys: EsViT's recipe by default, bit for bit, and each key changes what it says and nothing else."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from esvit_scale import cli
from esvit_scale.config import Config, resolve, validate
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.stream import batches, open_data
from esvit_scale.data.worker_batch import PlacedCrop, place_crops
from esvit_scale.errors import UserError
from tests.data.conftest import config_with

# sha256 of the crops below, computed before the strengths became keys: runs of older versions continue unchanged.
FINGERPRINT = "46c2eaf2df8e3263987e553d740a03ee7072ad8fb79e35b6f9abec21c0720b08"


def placed(config: Config, samples: int = 40) -> list[list[PlacedCrop]]:
    return [place_crops(config, 0, f"key {i}", 400, 300) for i in range(samples)]


def with_data(**data: Any) -> Config:
    return validate({"data": data}, "test")


def test_default_crops_are_those_of_earlier_versions() -> None:
    digest = hashlib.sha256()
    for epoch in range(3):
        for i in range(40):
            for crop in place_crops(Config(), epoch, f"key {i}", 400 + 7 * i, 300):
                digest.update(repr((crop.box, bool(crop.flip), tuple(crop.params))).encode())
                assert not crop.flip_vertical
    assert digest.hexdigest() == FINGERPRINT


@pytest.mark.parametrize("name", ["flip", "flip_vertical"])
def test_flips_happen_as_often_as_their_key_says(name: str) -> None:
    for chance in (0.0, 0.25, 1.0):
        flips = [getattr(crop, name) for crops in placed(with_data(**{name: chance}), 100) for crop in crops]
        # 1000 draws: within 4.5 standard deviations, exact at 0 and 1
        assert abs(np.mean(flips) - chance) <= 4.5 * np.sqrt(chance * (1 - chance) / len(flips))


def test_flip_leaves_everything_else_as_it_is() -> None:
    for crops, other in zip(placed(Config()), placed(with_data(flip=0, flip_vertical=1)), strict=True):
        for a, b in zip(crops, other, strict=True):
            assert a._replace(flip=False, flip_vertical=True) == b


def test_vertical_flip_turns_the_pixels_upside_down(shard_set: Manifest) -> None:
    config = config_with(train=str(shard_set.root))
    turned = config.model_copy(update={"data": config.data.model_copy(update={"flip_vertical": 1.0})})
    (plain,), (upside_down,) = (list(batches(c, open_data(c), 0, 1, 0, 1)) for c in (config, turned))
    for a, b in zip(plain.crops, upside_down.crops, strict=True):
        assert (a.flip(3) == b).all()
        assert not (a == b).all()


def test_keys_of_a_group_change_that_group_alone() -> None:
    off = {"jitter": 0, "grayscale": 0, "blur": 0, "solarize": 1}
    config = with_data(local_crops=[{"count": 2, "augment": off}, {"count": 1, "size": 64}])
    for crops, default in zip(placed(config), placed(Config()), strict=True):
        assert crops[:2] == default[:2]
        for crop in crops[2:4]:
            assert (crop.params.order, crop.params.grayscale, crop.params.radius, crop.params.solarize) == (
                *(-1, False),
                *(0.0, True),
            )
        assert crops[4] == default[4]


def test_global_crops_have_chances_of_their_own_and_strengths_in_common() -> None:
    augment = {"jitter": 1, "brightness": 0, "hue": 0.5, "blur": [0, 1], "solarize": [1, 0], "blur_radius": [0.5, 0.5]}
    crops = placed(with_data(global_crops={"augment": augment}), 100)
    assert {(c[0].params.radius, c[0].params.solarize) for c in crops} == {(0.0, True)}
    assert {(c[1].params.radius, c[1].params.solarize) for c in crops} == {(0.5, False)}
    factors = np.array([crop.params.factors for c in crops for crop in c[:2]])
    assert (factors[:, 0] == 1).all()
    assert 0.45 < factors[:, 3].max() <= 0.5  # 200 uniform draws from ±0.5: all below 0.45 has probability 3e-5
    assert -0.5 <= factors[:, 3].min() < -0.45


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.flip=2", "data.flip: must be ≤ 1.0, got 2; nearest: 1.0"),
        ("data.global_crops.augment.hue=0.7", "data.global_crops.augment.hue: must be ≤ 0.5"),
        ("data.global_crops.augment.blur=0.5", "data.global_crops.augment.blur: expected a list of two numbers"),
        ("data.local_crops.0.augment.blur_radius=[1,3]", "data.local_crops.0.augment.blur_radius.1: must be ≤ 2"),
        ("data.local_crops.0.augment.blur_radius=[2,1]", "data.local_crops.0.augment.blur_radius: needs low <= high"),
        ("data.augment.flip=0", "unknown key data.augment.flip; did you mean 'data.flip'?"),
    ],
)
def test_wrong_values_are_one_clear_line(override: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        resolve("swin_t", [override])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_show_crops_draws_a_sheet_and_trains_nothing(
    shard_set: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = f"pretrain demo data.train={shard_set.root} data.flip=0 --show-crops out/crops.png"
    assert cli.main(line.split()) == 0
    said = capsys.readouterr()
    assert said.out == "out/crops.png\n"
    assert "note       training would not begin: train.global_batch: 64 images, but the set holds" in said.err
    assert cli.main([*line.split(), "train.global_batch=8"]) == 0
    assert "note       crops of 32 pixels have one region token each" in capsys.readouterr().err
    with Image.open("out/crops.png") as sheet:
        assert sheet.width > 2 * 64 + 4 * 32
        assert sheet.height > 8 * 64
        assert len(sheet.getcolors(1 << 24) or ()) > 100
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no run dir"
    assert cli.main([*line.split()[:-1], "crops.jpg"]) == 2
    assert "must end in .png" in capsys.readouterr().err
