"""Gram anchoring: the loss and its gradients against loops in float64, its schedule, ZeRO stages, resume and costs."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esvit_scale import cli
from esvit_scale import config as configs
from esvit_scale.checkpoint import storage
from esvit_scale.data.stream import MicroBatch
from esvit_scale.errors import UserError
from esvit_scale.models.swin import Swin
from esvit_scale.models.trunk import Grid
from esvit_scale.objective import costs
from esvit_scale.objective.gram import gram_loss
from esvit_scale.objective.network import build_network
from esvit_scale.objective.schedules import Schedules
from esvit_scale.parallel import world as worlds
from esvit_scale.scaling import plan as plans
from esvit_scale.train import pretraining
from esvit_scale.train.trainer import Trainer
from tests import launcher, tiny
from tests import test_conformance as conformance

ON: dict[str, Any] = {"objective__gram_weight": 2.0, "objective__gram_start": 2, "objective__gram_every": 3}
CROPS, H, W, C = 4, 3, 2, 5


def slow(student: Tensor, teacher: Tensor, globals_: Grid) -> Tensor:
    """The formula: crops, pairs of regions."""
    crops, tokens = globals_[0], globals_[1] * globals_[2]
    total = torch.zeros((), dtype=torch.float64)
    for v in range(crops):
        x, y = ([f[v * tokens + i] for i in range(tokens)] for f in (student, teacher))
        for i in range(tokens):
            for j in range(tokens):
                own, anchor = (f[i] @ f[j] / (f[i].norm() * f[j].norm()) for f in (x, y))
                total = total + (own - anchor) ** 2 / (crops * tokens**2)
    return total


def test_loss_and_gradient_match_formula() -> None:
    student = (3 * torch.randn(CROPS * H * W + 7, C, dtype=torch.float64)).requires_grad_()  # with local crops
    teacher = torch.randn(CROPS * H * W, C, dtype=torch.float64)
    loss, expected = (f(student, teacher, (CROPS, H, W)) for f in (gram_loss, slow))
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    found, wanted = (torch.autograd.grad(value, student)[0] for value in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert found[: len(teacher)].abs().amin() > 0
    assert not found[len(teacher) :].any()
    assert torch.autograd.gradcheck(lambda x: gram_loss(x, teacher, (CROPS, H, W)), student)


def test_loss_is_invariant_where_similarities_are_and_a_mean_over_crops() -> None:
    """Rotations and lengths do not count; so accumulation and ranks, which take means, are exact."""
    student, teacher = (torch.randn(CROPS * H * W, C, dtype=torch.float64) for _ in range(2))
    rotation = torch.linalg.qr(torch.randn(C, C, dtype=torch.float64))[0]
    turned = (student @ rotation) * (1 + torch.rand(len(student), 1, dtype=torch.float64))
    whole = gram_loss(student, teacher, (CROPS, H, W))
    torch.testing.assert_close(gram_loss(turned, teacher, (CROPS, H, W)), whole, rtol=0, atol=1e-9)
    assert gram_loss(turned, student, (CROPS, H, W)) < 1e-20
    half = CROPS // 2 * H * W
    parts = [gram_loss(student[s], teacher[s], (CROPS // 2, H, W)) for s in (slice(half), slice(half, None))]
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=0, atol=1e-9)


def test_bf16_features_are_compared_in_fp32_and_zeros_have_a_finite_gradient() -> None:
    student, teacher = (torch.randn(CROPS * H * W, C).bfloat16() for _ in range(2))
    exact = gram_loss(student.double(), teacher.double(), (CROPS, H, W))
    with torch.autocast("cpu", torch.bfloat16):
        found = gram_loss(student, teacher, (CROPS, H, W))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
    dead = torch.zeros(CROPS * H * W, C, requires_grad=True)
    (gradient,) = torch.autograd.grad(gram_loss(dead, teacher, (CROPS, H, W)), dead)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("objective", conformance.SELF_SUPERVISED)
def test_every_objective_takes_it(objective: str) -> None:
    """The loss is the objective's and the weighted term's; without anchors nothing is computed or logged."""
    config = conformance.config_of("swin_t", objective, objective__gram_weight=0.5, objective__gram_start=0)
    student, teacher = conformance.networks(config)
    crops = conformance.crops_of(config)
    with torch.no_grad():
        targets = conformance.targets_of(student, teacher, crops)
        anchors = torch.randn_like(student.trunk(crops[:1]).regions)
        loss, logs, _ = student(crops, targets, None, 0.05)
        both, logs_of_both, _ = student(crops, targets, None, 0.05, anchors)
    assert logs_of_both.keys() - logs.keys() == {"loss_gram"}
    assert logs_of_both["loss_gram"] > 0.01
    torch.testing.assert_close(both, loss + 0.5 * logs_of_both["loss_gram"], rtol=1e-5, atol=0)


def test_bad_values_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["config", "swin_t", "objective.gram_weight=1"]) == 2
    assert "objective.gram_weight: needs objective.gram_start" in capsys.readouterr().err
    for bad in ("gram_weight=-1", "gram_start=-1", "gram_every=0"):
        assert cli.main(["config", "swin_t", "objective.gram_start=0", f"objective.{bad}"]) == 2
        message = capsys.readouterr().err.strip()
        assert f"objective.{bad.partition('=')[0]}" in message
        assert "\n" not in message
    monkeypatch.setattr(Swin, "has_regions", False)
    config = conformance.config_of("swin_t", "dino", objective__gram_weight=1.0, objective__gram_start=0)
    with pytest.raises(UserError, match=r"^objective.gram_weight: swin_t gives no region tokens [^\n]*$"):
        build_network(config)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("gram") / "shards")


def run(folder: Path, data: Path, **overrides: Any) -> list[dict[str, Any]]:
    values = {"train__steps": 7, "train__checkpoint_every": 4, "train__keep_checkpoints": 9, **ON, **overrides}
    assert pretraining.pretrain(tiny.config(folder, data, **values)) == 0
    return tiny.rows(folder)


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run at ZeRO 1 whose Gram teachers are those of steps 2 and 5, saved at steps 4 and 7."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    return folder, run(folder, data)


def test_it_begins_at_its_step_and_changes_nothing_before(
    straight: tuple[Path, list[dict[str, Any]]], data: Path, tmp_path: Path
) -> None:
    rows = straight[1]
    assert ["loss_gram" in row for row in rows] == [False, False, True, True, True, True, True]
    assert all(row["loss_gram"] > 0 for row in rows[3:5])
    off = run(tmp_path / "off", data, objective__gram_weight=0.0)
    assert off[:2] == rows[:2]
    assert off[2]["loss"] != rows[2]["loss"]


def test_anchors_are_an_earlier_teachers_features(data: Path, tmp_path: Path) -> None:
    """Step by step in one process: the Gram teacher's features are those of the teacher at steps 2, 5, …, bit for bit."""
    config = tiny.config(tmp_path / "run", data, model__drop_path=0.0, **ON)
    world = worlds.start()
    try:
        trainer = Trainer(config, world, Schedules(config, 4))
        crops = [torch.randn(16, 3, 32, 32), torch.randn(32, 3, 16, 16)]
        of_teacher: Tensor | None = None
        for step in range(7):
            with torch.no_grad():
                now = trainer.engines.teacher.network.trunk([crops[0]]).regions
            if step in (2, 5):
                of_teacher = now
            anchors = trainer._gram_anchors(crops[:1])
            assert (anchors is None) == (step < 2)
            if anchors is not None and of_teacher is not None:
                assert torch.equal(anchors, of_teacher)
                assert torch.equal(anchors, now) == (step in (2, 5))
            trainer.train_step([MicroBatch(crops, torch.arange(8))])
    finally:
        worlds.stop()


@pytest.mark.parametrize(
    "changes",
    [
        {"train__ds_config": "zero0"},
        pytest.param(
            {"train__ds_config": "zero2", "train__activation_checkpointing": "selective"}, marks=pytest.mark.slow
        ),
        pytest.param({"train__ds_config": "zero3", "train__grad_accum": 2}, marks=pytest.mark.slow),
    ],
)
def test_zero_stages_and_accumulation_give_the_same_losses(
    straight: tuple[Path, list[dict[str, Any]]], data: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    for row, expected in zip(run(tmp_path / "run", data, **changes), straight[1], strict=True):
        for key in ("loss", "loss_region", *(["loss_gram"] if "loss_gram" in expected else [])):
            assert row[key] == pytest.approx(expected[key], rel=2e-5), key  # fp32 sums in another order, over 7 steps


@pytest.mark.parametrize("stage", ["zero1", pytest.param("zero3", marks=pytest.mark.slow)])
def test_resume_is_exact(straight: tuple[Path, list[dict[str, Any]]], data: Path, tmp_path: Path, stage: str) -> None:
    """From a checkpoint between two Gram teachers, whose teacher is no longer the anchor."""
    source, rows = straight
    if stage != "zero1":
        rows = run(source := tmp_path / "run", data, train__ds_config=stage)
    resumed = tmp_path / "resumed"
    back_to(4, source, resumed)
    assert any(
        name.startswith("gram/trunk.") for name in storage.tensor_sizes(resumed / "checkpoints" / "step-00000004")
    )
    assert not any(
        "head" in n for n in storage.tensor_sizes(source / "checkpoints" / "step-00000004") if n[:5] == "gram/"
    )
    assert run(resumed, data, train__ds_config=stage) == rows


def back_to(step: int, source: Path, run: Path) -> None:
    shutil.copytree(source, run)
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    (run / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
    (run / "summary.json").unlink()


@pytest.mark.slow
def test_checkpoints_before_its_step_have_none(data: Path, tmp_path: Path) -> None:
    rows = run(tmp_path / "run", data, train__checkpoint_every=1, train__steps=4)
    sizes = storage.tensor_sizes(tmp_path / "run" / "checkpoints" / "step-00000001")
    assert not any(name.startswith("gram/") for name in sizes)
    back_to(1, tmp_path / "run", tmp_path / "resumed")
    assert run(tmp_path / "resumed", data, train__checkpoint_every=1, train__steps=4) == rows


@pytest.mark.slow
def test_two_ranks_match_one_and_resume_as_one(
    straight: tuple[Path, list[dict[str, Any]]], data: Path, tmp_path: Path
) -> None:
    """ZeRO 1 and 3 on two ranks, batch norms' running statistics, and one process that goes on at another stage."""
    norms = {"model__trunk": "resnet50", "model__embed_dim": 8, "model__depths": [1, 1, 1, 1], "model__heads": None}
    norms |= {"data__global_crops__size": 64, "train__steps": 4, "objective__gram_start": 1}
    norms["optim__lr"] = 1e-4  # at the others' rate, rounding alone moves gradients of this trunk by 1e-4 at step 4
    runs = {"zero1": {}, "zero3": {"train__ds_config": "zero3"}, "norms": norms | {"train__ds_config": "zero3"}}
    paths = []
    for name, changes in runs.items():
        values = {"train__steps": 7, "train__checkpoint_every": 4, "train__keep_checkpoints": 9, **ON, **changes}
        config = tiny.config(tmp_path / name, data, **values)
        paths.append(tiny.write_config(tmp_path / f"{name}.yaml", config))
    scenarios = Path(__file__).parents[1] / "distributed" / "scenarios.py"
    launcher.run(scenarios, *paths, ranks=2, timeout=300)
    back_to(4, tmp_path / "zero3", tmp_path / "elastic")
    run(tmp_path / "elastic", data)
    run(tmp_path / "one", data, **norms)
    expected = {"norms": tiny.rows(tmp_path / "one")}
    for name in ("zero1", "zero3", "elastic", "norms"):
        for row, want in zip(tiny.rows(tmp_path / name), expected.get(name, straight[1]), strict=True):
            for key in ("loss", "loss_region", *(["loss_gram"] if "loss_gram" in want else [])):
                assert row[key] == pytest.approx(want[key], rel=5e-5), (name, key)


def test_it_costs_a_forward_of_the_globals_and_a_trunk() -> None:
    plain = configs.resolve("swin_t")
    anchored = configs.resolve("swin_t", ["objective.gram_weight=2", "objective.gram_start=1000"])
    more = costs.image_flops(anchored) - costs.image_flops(plain)
    assert more == 2 * (costs.crop_flops(plain, 224) + 8 * 49**2 * 768)
    found, without = (plans.plan(c, 8, 80 * 2**30, None, None) for c in (anchored, plain))
    trunk = 27_519_354
    assert found.numbers["checkpoint_bytes"] - without.numbers["checkpoint_bytes"] == 4 * trunk
    assert "\ngram " in plans.table(found, anchored, 8)
    assert "gram" not in plans.table(without, plain, 8)
    of_three = next(s for s in found.settings if s.stage == 3)
    assert of_three.memory.gram == pytest.approx(6 * trunk / 8, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_kept_bytes_are_those_of_the_backward(precision: str) -> None:
    """By the closed form of Swin and by tracing: the same addition."""
    values = {
        "data": {"global_crops": {"size": 64}, "local_crops": []},
        "model": {"trunk": "swin_t", "embed_dim": 32, "depths": [1, 1], "heads": [1, 2], "window": 4},
        "objective": {"prototypes": 64, "head_hidden": 32, "bottleneck": 16},
        "train": {"precision": precision},
    }
    sizes = []
    for weight in (0.0, 1.0):
        values["objective"] |= {"gram_weight": weight, "gram_start": 0}
        config = configs.validate(values, where="test")
        traced = costs._traced_kept(costs._key(config)).outside.per_image
        sizes.append((costs.kept(config).outside.per_image, traced))
    (by_form, by_trace), (with_form, with_trace) = sizes
    assert with_form - by_form == with_trace - by_trace > 0
