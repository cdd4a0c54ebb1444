"""Extraction from real files, over ranks, and the file that `embed` leaves."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from esvit_scale.checkpoint import safetensors_file
from esvit_scale.checkpoint.weights import Weights
from esvit_scale.errors import UserError
from esvit_scale.evaluate import features
from esvit_scale.evaluate.features import (
    ExtractionOptions,
    FeatureSet,
    FrozenTrunk,
    extract,
    raw_pixels,
    run_embed,
    save,
    source_info,
)
from esvit_scale.models.initialize import initialize
from esvit_scale.objective.network import build_network
from tests import tiny

SIZE = 16


class Mean(nn.Module):
    """A trunk whose view feature is the mean colour; remembers whether it was in training mode."""

    def forward(self, crops: list[torch.Tensor]) -> SimpleNamespace:
        self.saw_training = self.training
        return SimpleNamespace(view=crops[0].mean((2, 3)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten grey images of rising brightness, in two classes."""
    root = tmp_path / "images"
    for i in range(10):
        path = root / ("bright" if i >= 6 else "adark") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), (20 * i,) * 3).save(path)
    return root


def test_features_cover_every_image_once_in_order(folder: Path) -> None:
    trunk = Mean()
    found = extract(trunk, folder, SIZE, batch=4, workers=0, device="cpu")
    assert [Path(key).stem for key in found.keys] == [str(i) for i in range(10)]
    assert found.labels.tolist() == [0] * 6 + [1] * 4
    assert source_info(folder) == (10, ("adark", "bright"))
    expected = (torch.arange(10) * 20 / 255 - 0.485) / 0.229
    assert torch.allclose(found.features[:, 0], expected, atol=1e-5)
    assert not trunk.saw_training
    assert trunk.training  # left as it was


def test_bf16_features_are_stored_as_fp32(folder: Path) -> None:
    class Precision(nn.Linear):
        def forward(self, crops: list[torch.Tensor]) -> SimpleNamespace:
            view = super().forward(crops[0].mean((2, 3)))
            self.saw = view.dtype
            return SimpleNamespace(view=view)

    trunk = Precision(3, 5)
    found = extract(trunk, folder, SIZE, workers=0, device="cpu", precision="bf16")
    assert trunk.saw == torch.bfloat16
    assert found.features.dtype == torch.float32


def test_raw_pixels_equal_the_normalised_image(folder: Path) -> None:
    found = raw_pixels(folder, SIZE, batch=3, workers=0)
    assert found.features.shape == (10, 3 * SIZE * SIZE)
    assert found.features[7].unflatten(0, (3, SIZE * SIZE))[2].allclose(torch.tensor((140 / 255 - 0.406) / 0.225))


def test_whole_pictures_reach_the_trunk_and_have_features_of_their_own(tmp_path: Path) -> None:
    """A frame of a picture's border is outside of the centre crop; the cache does not mix the two."""
    pixels = np.full((28, 28, 3), 0, np.uint8)
    pixels[[0, -1]] = pixels[:, [0, -1]] = 255
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "framed.png")
    cropped, whole = (
        extract(Mean(), tmp_path / "images", 28, workers=0, device="cpu", cache=tmp_path / "cache", whole=choice)
        for choice in (False, True)
    )
    border = 1 - (26 / 28) ** 2  # of the area
    assert whole.features[0, 0].item() == pytest.approx((border - 0.485) / 0.229, abs=1e-5)
    assert cropped.features[0, 0] < whole.features[0, 0] - 0.1
    pixels_of = raw_pixels(tmp_path / "images", 28, workers=0, whole=True)
    assert pixels_of.features.max().item() == pytest.approx((1 - 0.406) / 0.225, abs=1e-5)


def test_stage_gives_all_cells_of_its_map(folder: Path, tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "run", tmp_path)
    trunk = build_network(config).trunk
    initialize(torch.nn.ModuleDict({"trunk": trunk}), 0)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        first, second, last = (tokens for tokens, *_ in trunk.stage_maps([images]))
        for stage, expected in ((1, first), (2, second), (3, trunk.norm(last))):
            cells = features.stage_cells(trunk, images, stage)
            assert torch.equal(cells, expected.view(3, -1, expected.shape[1]).flatten(1))
    found = extract(trunk, folder, 32, workers=0, device="cpu", cache=tmp_path / "cache", stage=2)
    view = extract(trunk, folder, 32, workers=0, device="cpu", cache=tmp_path / "cache")
    assert found.features.shape == (10, 16 * trunk.channels[1])
    assert view.features.shape == (10, trunk.dim)
    for stage in (0, 4):
        with pytest.raises(UserError, match=f"--stage {stage}: the trunk swin_t has the stages 1 to 3"):
            features.stage_cells(trunk, images, stage)
    with pytest.raises(UserError, match="Mean gives no tokens on a grid"):
        extract(Mean(), folder, SIZE, workers=0, device="cpu", stage=1)


def test_source_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image files"):
        extract(Mean(), tmp_path, SIZE, workers=0, device="cpu")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="no readable image"):
        extract(Mean(), tmp_path, SIZE, workers=0, device="cpu")


def test_feature_file_loads_without_pickle(tmp_path: Path) -> None:
    found = FeatureSet(torch.randn(3, 4), ["a/1", "ü", "c"], torch.tensor([0, -1, 2]))
    save(found, tmp_path / "deep" / "f.npz")
    with np.load(tmp_path / "deep" / "f.npz", allow_pickle=False) as data:
        assert sorted(data) == ["classes", "features", "keys", "labels"]
        assert data["keys"].tolist() == found.keys
        assert data["labels"].dtype == np.int64
        assert data["features"].dtype == np.float32
        np.testing.assert_array_equal(data["features"], found.features.numpy())


def test_embed_writes_the_named_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "load_frozen_trunk", lambda path: FrozenTrunk(Mean(), SIZE, 400))
    run_embed(tmp_path / "run", folder, tmp_path / "f.npz", ExtractionOptions(workers=0, device="cpu"))
    with np.load(tmp_path / "f.npz", allow_pickle=False) as data:
        assert data["features"].shape == (10, 3)
    with pytest.raises(UserError, match="is a folder"):
        run_embed(tmp_path / "run", folder, tmp_path, ExtractionOptions())


def test_embed_accepts_a_safetensors_file(folder: Path, tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "run", tmp_path)
    network = build_network(config)
    initialize(network, 0)
    tensors = {name: p.detach() for name, p in network.named_parameters() if name.startswith("trunk.")}
    safetensors_file.write(tmp_path / "t.safetensors", Weights(config, {"teacher": tensors}, {}), "teacher")
    run_embed(tmp_path / "t.safetensors", folder, tmp_path / "f.npz", ExtractionOptions(workers=0, device="cpu"))
    with np.load(tmp_path / "f.npz", allow_pickle=False) as data:
        assert data["features"].shape == (10, network.trunk.dim)
    assert features.load_frozen_trunk(tmp_path / "t.safetensors").step is None
