"""Masked regions: the masks, the loss and its gradients against loops in float64, every trunk, ZeRO stages and resume."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from esvit_scale import config as configs
from esvit_scale.checkpoint import convert, state
from esvit_scale.checkpoint.backbone import load_backbone
from esvit_scale.checkpoint.initial_weights import load_initial_weights
from esvit_scale.errors import UserError
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.models.heads import ProjectionHead
from esvit_scale.models.masking import Mask, MaskToken, cells_of, draw_cells
from esvit_scale.models.registry import TRUNKS
from esvit_scale.objective import costs
from esvit_scale.objective.network import StudentNetwork, TeacherNetwork, build_network
from esvit_scale.train import pretraining
from tests import test_conformance as conformance
from tests import tiny

ON: dict[str, Any] = {"objective__mask_weight": 0.7}
MASKABLE = {name for name in TRUNKS if not name.startswith(("resnet", "cvt", "modal"))}
IMAGES, TEMP = 3, 0.05


def networks_of(trunk: str, weight: float = 0.7) -> tuple[StudentNetwork, TeacherNetwork]:
    """In float64, with all parameters away from their initial values."""
    config = conformance.config_of(trunk, "esvit", objective__mask_crops=0.6, objective__mask_weight=weight)
    networks = conformance.networks(config)
    for seed, network in enumerate(networks):
        network.double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in network.parameters():
                p.add_(0.05 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    return networks


def logits(head: ProjectionHead, features: Tensor) -> Tensor:
    return head.last_layer(head(features), lambda z, rows: z @ rows.t())


def slow_masked_loss(student: StudentNetwork, teacher: TeacherNetwork, globals_: Tensor, keys: Tensor) -> Tensor:
    """Crop by crop, region by region; the token takes the place of what the embedding makes of hidden pixels."""
    token, geometry = student.mask_token, student.trunk.mask_geometry
    assert token is not None
    assert geometry is not None
    h = w = 64 // (geometry.patch * geometry.patches)
    total = torch.zeros((), dtype=torch.float64)
    masks = draw_cells(keys[: len(globals_)], h, w, student.mask_share, student.mask_ratio)
    for crop, key, mask in zip(globals_, keys, masks, strict=False):
        hidden = mask.flatten()
        hook = student.trunk.patch_embed.register_forward_hook(
            lambda module, inputs, tokens, hidden=hidden: torch.where(hidden[:, None], token.values, tokens)
        )
        found = student.trunk([crop[None]], key[None]).regions
        hook.remove()
        targets = (
            (logits(teacher.objective.region_head, teacher.trunk([crop[None]]).regions) / TEMP).softmax(1).detach()
        )
        predicted = logits(student.objective.region_head, found) / student.objective.student_temp
        of_crop = [-(p * q).sum() for p, q, hide in zip(targets, predicted.log_softmax(1), hidden, strict=True) if hide]
        if of_crop:
            total = total + torch.stack(of_crop).mean() / len(globals_)
    assert 0 < masks.any((1, 2)).sum() < len(globals_)
    return total


def test_loss_and_gradients_match_loops() -> None:
    """What a weight more by 1 adds to the loss and to every gradient, the token's included."""
    student, teacher = networks_of("deit_s")
    globals_, keys = torch.randn(2 * IMAGES, 3, 64, 64, dtype=torch.float64), drop_keys(4, 9, torch.arange(IMAGES), 4)
    crops = [globals_, torch.randn(2 * IMAGES, 3, 32, 32, dtype=torch.float64)]
    with torch.no_grad():
        targets = teacher(crops[:1])
    parameters = [p for p in student.parameters() if p.requires_grad]
    losses, gradients, logs = [], [], {}
    for weight in (0.7, 1.7):
        student.objective.mask_weight = weight
        loss, logs, _ = student(crops, targets, keys, TEMP)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, parameters))
    expected = slow_masked_loss(student, teacher, globals_, keys)
    torch.testing.assert_close(losses[1] - losses[0], expected.detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(logs["loss_masked"], expected.detach(), rtol=0, atol=1e-9)
    parts = 0.5 * logs["loss_view"] + 0.5 * logs["loss_region"] + 1.7 * logs["loss_masked"]
    torch.testing.assert_close(losses[1], parts, rtol=0, atol=1e-9)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    used = 0
    for first, second, want in zip(*gradients, wanted, strict=True):
        want = torch.zeros_like(first) if want is None else want
        torch.testing.assert_close(second - first, want, rtol=0, atol=1e-9)
        used += bool(want.any())
    [of_token] = [
        g for p, g in zip(parameters, wanted, strict=True) if student.mask_token and p is student.mask_token.values
    ]
    assert of_token.abs().max() > 1e-4
    assert used > len(parameters) / 2


@pytest.mark.parametrize("trunk", sorted(MASKABLE & set(conformance.FAMILIES)))
def test_features_depend_on_visible_pixels_alone(trunk: str) -> None:
    """Every stage hides the same cells: other pixels in hidden ones change nothing, in visible ones they do."""
    student, _ = networks_of(trunk)
    geometry = student.trunk.mask_geometry
    assert geometry is not None
    assert student.mask_token is not None
    side = geometry.patch * geometry.patches
    size = 3 * side + geometry.patch  # padded or cut to whole cells
    cells = torch.rand(2, cells_of(geometry, size), cells_of(geometry, size)) < 0.4
    cells[:, 0, 0], cells[:, -1, 1], cells[0, 1] = True, False, True
    pixels = cells.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None, :size, :size].double()
    pixels = F.pad(pixels, (0, size - pixels.shape[3], 0, size - pixels.shape[2]))
    x, local = torch.randn(2, 3, size, size, dtype=torch.float64), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    features = lambda x: student.trunk([x, local], None, Mask(cells, student.mask_token))  # noqa: E731
    with torch.no_grad():
        found, same = features(x), features(x + pixels * torch.randn_like(x))
        other = features(x + (1 - pixels) * torch.randn_like(x))
    assert torch.equal(found.regions, same.regions)
    assert (found.regions - other.regions)[: cells.numel()].abs().amax(1).gt(1e-9).all()


def test_masks_are_blocks_of_the_asked_size() -> None:
    keys = drop_keys(1, 2, torch.arange(2000), 2)
    masks = draw_cells(keys, 7, 9, 0.5, (0.2, 0.5))
    counts = masks.flatten(1).sum(1)
    assert counts.any()
    assert 0.47 < (counts > 0).float().mean() < 0.53  # 4,000 draws: a standard deviation of 0.008
    sizes = set(counts[counts > 0].tolist())
    assert sizes == set(range(round(0.2 * 63), round(0.5 * 63) + 1))
    neighbours = (masks[:, 1:] & masks[:, :-1]).sum() / masks[:, 1:].sum()
    assert neighbours > 0.6  # single cells: about 0.35
    few = draw_cells(keys[100:103], 7, 9, 0.5, (0.2, 0.5))
    assert torch.equal(few, masks[100:103])  # nobody else's
    assert not torch.equal(draw_cells(drop_keys(1, 3, torch.arange(2000), 2), 7, 9, 0.5, (0.2, 0.5)), masks)
    assert draw_cells(keys, 1, 2, 1.0, (0.9, 1.0)).flatten(1).sum(1).eq(1).all()  # never all of a crop


@pytest.mark.parametrize("trunk", TRUNKS)
def test_every_trunk_is_masked_or_refuses(trunk: str) -> None:
    config = conformance.config_of(trunk, "esvit", data__global_crops={"size": 128}, **ON)
    with torch.device("meta"):
        if trunk in MASKABLE:
            token = build_network(config).mask_token
            assert isinstance(token, MaskToken)
            assert costs.parameters(config).heads > token.values.numel() > 0
        else:
            with pytest.raises(UserError, match=f"^objective.mask_weight: {trunk} cannot be masked, [^\n]*$"):
                build_network(config)


def test_what_cannot_be_masked_is_refused_in_one_line() -> None:
    def message(objective: str, **changes: Any) -> str:
        with pytest.raises(UserError) as error:
            build_network(conformance.config_of("swin_t", objective, **ON, **changes))
        return str(error.value)

    assert "dino with objective.regions=false has no loss of masked regions" in message("dino")
    assert "esvit with objective.regions=false" in message("esvit", objective__regions=False)
    small = message("esvit", data__global_crops={"size": 16}, data__local_crops=[])
    assert small.endswith("at least data.global_crops.size=32")


def test_masks_cost_a_token_and_no_product() -> None:
    masked, plain = (configs.resolve("swin_t", [f"objective.mask_weight={weight}"]) for weight in (1, 0))
    assert costs.parameters(masked).heads - costs.parameters(plain).heads == 96
    assert costs.image_flops(masked, "executed") == costs.image_flops(plain, "executed")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("masked") / "shards")


def run(folder: Path, data: Path, **overrides: Any) -> list[dict[str, Any]]:
    values = {"train__steps": 3, "train__checkpoint_every": 2, "objective__mask_crops": 0.8, **ON, **overrides}
    assert pretraining.pretrain(tiny.config(folder, data, **values)) == 0
    return tiny.rows(folder)


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("straight") / "run"
    return folder, run(folder, data)


@pytest.mark.parametrize(
    "changes",
    [
        {"train__ds_config": "zero0"},
        {"train__ds_config": "zero3", "train__grad_accum": 2, "train__activation_checkpointing": "torch"},
    ],
)
def test_zero_stages_and_accumulation_give_the_same_losses(
    straight: tuple[Path, list[dict[str, Any]]], data: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    for row, expected in zip(run(tmp_path / "run", data, **changes), straight[1], strict=True):
        assert row["loss_masked"] > 0
        for key in ("loss", "loss_region", "loss_masked", "grad_norm_mask_token"):
            assert row[key] == pytest.approx(expected[key], rel=1e-5), key  # fp32 sums in another order, over 3 steps


def test_resume_is_exact_and_weights_are_used_without_the_token(
    straight: tuple[Path, list[dict[str, Any]]], data: Path, tmp_path: Path
) -> None:
    source, rows = straight
    resumed = tmp_path / "resumed"
    shutil.copytree(source, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000003")
    (resumed / "checkpoints" / "latest").write_text("step-00000002\n")
    (resumed / "summary.json").unlink()
    assert run(resumed, data) == rows
    weights = [state.read_weights(folder / "checkpoints" / "step-00000003").networks for folder in (source, resumed)]
    for role in ("student", "teacher"):
        token, again = (networks[role]["mask_token.values"] for networks in weights)
        assert token.any()
        assert torch.equal(token, again)
    convert.convert(source, tmp_path / "trunk.safetensors", "esvit-scale", "safetensors")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_backbone(tmp_path / "trunk.safetensors")(images), load_backbone(source)(images))
    for weight in (0.0, 0.7):  # a run without masks, and one with a token of its own, start from it
        config = tiny.config(tmp_path, data, model__init_from=str(source), objective__mask_weight=weight)
        initial = load_initial_weights(config)
        assert any(name.startswith("trunk.") for name in initial.values)
        assert "mask_token.values" not in initial.values
