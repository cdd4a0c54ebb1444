"""What modalities attend to: the arrays and the figure of `evaluate attention` on a shard set."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from esvit_scale import cli
from esvit_scale import config as configs
from esvit_scale.errors import UserError
from esvit_scale.evaluate import modal_attention
from esvit_scale.evaluate.modal_attention import Attended, from_aggregation
from esvit_scale.report import modal_figure
from tests.data.media_files import modal_set

VALUES: dict[str, Any] = {
    "seed": 1,
    "data": {
        "global_crops": {"size": 16, "count": 2},
        "local_crops": [],
        "audio": {"views": 1, "rate": 8000, "seconds": 0.05},
        "video": {"views": 1, "frames": 6, "size": 8},
        "text": {"views": 1, "length": 12, "fields": ["fr", "en"]},
    },
    "model": {"trunk": "modal_small", "embed_dim": 8, "depths": [2], "heads": [2], "drop_path": 0.0},
    "objective": {"name": "esvit_modalities", "prototypes": 16, "head_hidden": 8, "bottleneck": 8},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return modal_set(tmp_path_factory.mktemp("attended") / "set").root


def config_file(folder: Path, **modalities: Any) -> Path:
    values = VALUES | {"model": {**VALUES["model"], "modalities": {"patch": 4, "waveform_patch": 50, **modalities}}}
    path = folder / "modal.yaml"
    path.write_text(configs.dump(configs.validate(values, where="attention")))
    return path


@pytest.mark.parametrize(("audio", "backbone"), [("waveform", "shared"), ("spectrogram", "separate")])
def test_command_writes_maps_of_what_every_sample_has(
    shards: Path, tmp_path: Path, audio: str, backbone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = f"untrained:{config_file(tmp_path, audio=audio, backbone=backbone)}"
    words = ["evaluate", "attention", str(shards), "--checkpoint", checkpoint, "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--keys", "s001", "s002"]) == 0
    assert [line.rpartition("/")[2] for line in capsys.readouterr().out.splitlines()] == [
        "attention.npz",
        "attention.png",
    ]
    with np.load(tmp_path / "out/attention.npz") as arrays:
        assert arrays["keys"].tolist() == ["s001", "s002"]
        stretches = 8 if audio == "waveform" else 2  # 400 samples; 50 ms are 5 frames of 10 ms
        shapes = {name: arrays[name].shape[1:] for name in arrays if name != "keys"}
        assert shapes["sample1_image"] == (2, 4, 4)
        assert shapes["sample1_video"] == (2, 2, 2, 2)
        assert shapes["sample1_audio"] == (2, stretches)
        assert shapes["sample1_text"] == (2, 12)  # "été numér"
        assert "sample2_image" not in shapes  # s002 has none
        assert {array.shape[0] for name, array in arrays.items() if name != "keys"} == {2}
        for name, array in arrays.items():
            if name != "keys":  # what is left of an even share of all is the aggregation token's own
                assert (array.reshape(*array.shape[:2], -1).sum(2) < array[0, 0].size + 1).all()
                assert array.min() >= 0
    with Image.open(tmp_path / "out/attention.png") as image:
        assert image.width == 2080


def test_samples_with_the_most_modalities_are_shown(shards: Path, tmp_path: Path) -> None:
    checkpoint = Path(f"untrained:{config_file(tmp_path)}")
    found = modal_attention.run_modal_attention(checkpoint, shards, tmp_path / "out", samples=2)
    assert [sample.key for sample in found.samples] == ["s001", "s013"]  # the first with all four


@pytest.mark.parametrize(
    ("place", "more", "match"),
    [
        ("set", ["--keys", "s01"], "--keys: .* has no readable sample 's01'; did you mean"),
        ("set", ["--size", "32"], "--size: not with a shard set"),
        ("x.png", ["--samples", "2"], "--samples: only with a shard set"),
    ],
)
def test_options_that_do_not_fit(
    shards: Path, tmp_path: Path, place: str, more: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", f"untrained:{config_file(tmp_path)}", "--out", str(tmp_path / "out"), *more]
    assert cli.main(["evaluate", "attention", str(shards if place == "set" else tmp_path / place), *words]) == 2
    error = capsys.readouterr().err
    assert re.search(match, error)
    assert error.count("\n") == 1


def test_images_alone_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reads images alone"):
        modal_attention.run_modal_attention(Path("untrained:demo"), shards, tmp_path)


def test_share_of_the_aggregation_token_leaves_padding_out() -> None:
    blocks = [torch.rand(3, 5, 5, dtype=torch.float64) for _ in range(2)]
    valid = torch.tensor([True, True, False, True, False])
    found = from_aggregation(blocks, valid)
    for block in range(2):
        for head in range(3):
            slow = [float(blocks[block][head, 0, j]) * 3 for j in (1, 3)]  # two tokens and the aggregation token
            np.testing.assert_allclose(found[block, head], slow)


def test_characters_have_the_mean_of_their_bytes() -> None:
    text = "é$ 日" + "x" * 20
    data = text.encode()
    attention = np.random.default_rng(0).random((1, 2, len(data)))
    values = torch.tensor([byte + 1 for byte in data] + [0, 0])
    drawn = modal_figure.drawing(*named(), Attended("text", values, len(data), attention))
    assert drawn.text == text
    assert drawn.maps.shape == (2, 2, modal_figure.LINE)
    flat, at = drawn.maps.reshape(2, -1), 0
    for i, character in enumerate(text):
        size = len(character.encode())
        np.testing.assert_allclose(flat[:, i], attention[0, :, at : at + size].mean(1))
        at += size
    assert np.isnan(flat[:, len(text) :]).all()


def test_frames_and_their_maps_lie_on_the_same_places() -> None:
    config, trunk = named()
    values = torch.zeros(3, 12, 8, 8)
    values[:, 4] = 1  # the first frame of the second tube
    attention = np.random.default_rng(0).random((1, 2, 3, 2, 2))
    drawn = modal_figure.drawing(config, trunk, Attended("video", values, 12, attention))
    assert drawn.pixels is not None
    assert drawn.pixels.shape == (16, 16, 3)
    np.testing.assert_array_equal(drawn.maps[:, :2, 2:], attention[0][:, 1])
    np.testing.assert_array_equal(drawn.maps[:, 2:, :2], attention[0][:, 2])
    assert np.isnan(drawn.maps[:, 2:, 2:]).all()
    assert len({*drawn.pixels[:8, 8:, 0].flat}) == 1
    assert drawn.pixels[0, 8, 0] > drawn.pixels[0, 0, 0]


def named() -> tuple[configs.Config, Any]:
    values = VALUES | {"model": {**VALUES["model"], "modalities": {"patch": 4}}}
    config = configs.validate(values, where="attention")
    return config, modal_attention.modalities.build_network(config).trunk
