"""Weights for detection libraries: torchvision's own Swin runs here; mmdet's and detectron2's by their names and shapes."""

from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esvit_scale
from esvit_scale import cli
from esvit_scale.checkpoint import state
from esvit_scale.checkpoint.convert import convert
from esvit_scale.errors import UserError
from esvit_scale.models.swin import PatchMerging
from tests.checkpoint.test_export import images, step_of
from tests.checkpoint.test_export_trunks import DEIT

SMALL = {"trunk": "swin_t", "window": 4, "embed_dim": 16, "depths": [2, 1], "heads": [1, 2]}
V2 = {**SMALL, "trunk": "swinv2_t"}


def written(tmp_path: Path, library: str, model: dict = SMALL, size: int = 32) -> tuple[Path, dict]:
    """A step folder, and the content of its weights for a library."""
    source = step_of(tmp_path, model, size)
    convert(source, tmp_path / f"{library}.pth", "esvit-scale", library)
    return source, torch.load(tmp_path / f"{library}.pth", weights_only=True)


def their_swin(model: dict) -> nn.Module:
    """torchvision's Swin or Swin V2 of the same size, with EsViT's norms."""
    from torchvision.models import swin_transformer as theirs

    extra = {"norm_layer": partial(nn.LayerNorm, eps=1e-6)}
    if model is V2:
        extra = {"block": theirs.SwinTransformerBlockV2, "downsample_layer": theirs.PatchMergingV2}
    window = [model["window"]] * 2
    return theirs.SwinTransformer([4, 4], model["embed_dim"], model["depths"], model["heads"], window, **extra).eval()


@torch.no_grad()
@pytest.mark.parametrize("model", [SMALL, V2], ids=["v1", "v2"])
def test_torchvision_gives_the_same_maps_at_any_size(tmp_path: Path, model: dict) -> None:
    source, content = written(tmp_path, "torchvision", model)
    other = their_swin(model)
    found = other.load_state_dict(content, strict=False)
    assert not found.unexpected_keys
    computed = ("relative_position_index", "relative_coords_table")
    assert {name for name in found.missing_keys if not name.endswith(computed)} == {"head.weight", "head.bias"}
    trunk, _ = state.load_teacher(source)
    for height, width in ((32, 32), (40, 56), (100, 72)):  # in the last two, windows are padded in both stages
        x = images(2, 112)[:, :, :height, :width]
        ours = trunk([x])
        theirs = other.norm(other.features(x))
        assert theirs.abs().max() > 0.5
        torch.testing.assert_close(theirs.flatten(0, 2), ours.regions, rtol=0, atol=2e-5)


def their_names(library: str) -> dict[str, list[int]]:
    """The parameters of the libraries' Swin of SMALL, as their code names and shapes them.

    A stage's norm of the map it returns (`norm0`) is left out: no pretrained weights have it.
    """
    mmdet = library == "mmdet"
    first, stage = ("backbone.", "stages") if mmdet else ("", "layers")
    attention, fc1, fc2 = ("attn.w_msa", "ffn.layers.0.0", "ffn.layers.1") if mmdet else ("attn", "mlp.fc1", "mlp.fc2")
    projection = "projection" if mmdet else "proj"
    names = {f"patch_embed.{projection}.weight": [16, 3, 4, 4], f"patch_embed.{projection}.bias": [16]}
    names |= {"patch_embed.norm.weight": [16], "patch_embed.norm.bias": [16]}
    for s, (depth, heads, c) in enumerate(((2, 1, 16), (1, 2, 32))):
        for i in range(depth):
            block = f"{stage}.{s}.blocks.{i}"
            names |= {f"{block}.{norm}.{kind}": [c] for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
            names |= {
                f"{block}.{attention}.relative_position_bias_table": [49, heads],
                f"{block}.{attention}.qkv.weight": [3 * c, c],
                f"{block}.{attention}.qkv.bias": [3 * c],
                f"{block}.{attention}.proj.weight": [c, c],
                f"{block}.{attention}.proj.bias": [c],
                f"{block}.{fc1}.weight": [4 * c, c],
                f"{block}.{fc1}.bias": [4 * c],
                f"{block}.{fc2}.weight": [c, 4 * c],
                f"{block}.{fc2}.bias": [c],
            }
    names |= {f"{stage}.0.downsample.norm.{kind}": [64] for kind in ("weight", "bias")}
    names |= {f"{stage}.0.downsample.reduction.weight": [32, 64], "norm1.weight": [32], "norm1.bias": [32]}
    return {first + name: shape for name, shape in names.items()}


@pytest.mark.parametrize("library", ["mmdet", "detectron2"])
def test_names_and_shapes_are_those_of_the_library(tmp_path: Path, library: str) -> None:
    _, content = written(tmp_path, library)
    tensors = content["state_dict" if library == "mmdet" else "model"]
    assert {name: list(t.shape) for name, t in tensors.items()} == their_names(library)
    if library == "detectron2":
        assert content["matching_heuristics"] is True


def unfold_merging(x: Tensor, norm: Tensor, bias: Tensor, reduction: Tensor) -> Tensor:
    """mmdet's patch merging of a map [B, H, W, C]: neighbours side by side by an unfold, then norm and reduction."""
    cells = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)  # [B, T, 4C], channel by channel
    return F.linear(F.layer_norm(cells, norm.shape, norm, bias, 1e-6), reduction)


def test_merging_for_mmdet_is_in_the_order_of_an_unfold(tmp_path: Path) -> None:
    source, content = written(tmp_path, "mmdet")
    trunk, _ = state.load_teacher(source)
    merging = trunk.layers[0].downsample
    assert isinstance(merging, PatchMerging)
    x = torch.randn(2, 6, 8, 16)
    quads = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
    t = {n.rpartition("downsample.")[2]: v for n, v in content["state_dict"].items() if "downsample" in n}
    found = unfold_merging(x, t["norm.weight"], t["norm.bias"], t["reduction.weight"])
    torch.testing.assert_close(found, merging.reduce(quads.flatten(1, 2)), rtol=0, atol=1e-5)


def test_what_a_library_lacks_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(model: dict, library: str, message: str, size: int = 32, name: str = "x.pth") -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        source = step_of(folder, model, size)
        arguments = ["convert", str(source), str(tmp_path / name), "--from", "esvit-scale", "--to", library]
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

    refused(V2, "mmdet", "--to mmdet: mmdet has no Swin V2; use load_backbone(…).pyramid as the backbone")
    refused(DEIT, "detectron2", "no form of deit_s")
    refused({**SMALL, "window": 7}, "torchvision", "the map of stage 2 (4×4) is smaller than the window 7")
    refused(SMALL, "torchvision", "writes a .pth file; nearest: ", name="x.safetensors")
    with pytest.raises(UserError, match="holds only a trunk"):
        convert(tmp_path / "0" / "step", tmp_path / "y.pth", "esvit-scale", "mmdet", heads=True)


@pytest.mark.slow
def test_faster_rcnn_runs_and_learns_on_the_feature_pyramid(tmp_path: Path) -> None:
    """torchvision's detector with an FPN on our pyramid: detections of an image, and training steps that lower the loss."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    class Backbone(nn.Module):
        out_channels = 32

        def __init__(self) -> None:
            super().__init__()
            self.model = esvit_scale.load_backbone(step_of(tmp_path, SMALL, 32))
            self.fpn = FeaturePyramidNetwork(self.model.channels, self.out_channels, LastLevelMaxPool())

        def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
            return self.fpn(OrderedDict((str(i), found) for i, found in enumerate(self.model.pyramid(x))))

    torch.manual_seed(0)
    detector = FasterRCNN(
        Backbone(),
        num_classes=2,
        min_size=96,
        max_size=160,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3),
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], output_size=7, sampling_ratio=2),
    )
    picture = torch.rand(3, 96, 130) * 0.2
    picture[:, 30:70, 40:90] += 0.7
    target = {"boxes": torch.tensor([[40.0, 30.0, 90.0, 70.0]]), "labels": torch.tensor([1])}
    parameters = {name: p for name, p in detector.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = sum(detector.train()([picture], [target]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = {name for name, p in parameters.items() if p.grad is not None and p.grad.abs().max() > 0}
    # the pyramid's maps come from before the trunk's final norm, which therefore learns nothing
    idle = {name for name in parameters if name not in trained}
    assert idle == {name for name in parameters if name.endswith(("trunk.norm.weight", "trunk.norm.bias"))}
    (found,) = detector.eval()([picture])
    assert set(found) == {"boxes", "labels", "scores"}
    assert found["boxes"].shape[1] == 4
