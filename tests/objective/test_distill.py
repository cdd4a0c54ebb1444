"""Distillation: loss and gradients against loops in float64, ZeRO stages, resume, costs, and teachers that do not fit."""

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from esvit_scale import cli
from esvit_scale import config as configs
from esvit_scale.checkpoint import convert, frozen_teacher, safetensors_file, state, storage
from esvit_scale.checkpoint.backbone import load_backbone
from esvit_scale.checkpoint.weights import Weights
from esvit_scale.config import Config
from esvit_scale.data.stream import MicroBatch
from esvit_scale.errors import UserError
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.models.initialize import initialize
from esvit_scale.models.trunk import Features
from esvit_scale.objective import costs
from esvit_scale.objective.distill import DistillCosine, DistillPrototypes
from esvit_scale.objective.network import build_frozen_teacher, build_network, build_student, configs_of_students
from esvit_scale.objective.objective import Objective
from esvit_scale.objective.schedules import Schedules
from esvit_scale.parallel import world as worlds
from esvit_scale.scaling import plan as plans
from esvit_scale.train import pretraining
from esvit_scale.train.trainer import Trainer
from tests import launcher, tiny
from tests import test_conformance as conformance

B, TEMP = 3, 0.05
GRIDS = [(2 * B, 2, 3), (2 * B, 2, 2), (1 * B, 1, 2)]
BOTH = ("prototypes", "cosine")


def objectives_of(targets: str, regions: bool) -> tuple[Objective, Objective, int, int]:
    """Student's and teacher's side in float64, and the widths of their features; all values are random."""
    config = conformance.config_of("swin_t", "distill", objective__targets=targets, objective__regions=regions)
    network = build_network(config)
    teacher = build_frozen_teacher(config, network.objective)
    for module in (network.objective, teacher.objective):
        module.double()
        for p in module.parameters():
            p.data = torch.randn_like(p)
    return network.objective, teacher.objective, network.trunk.dim, teacher.trunk.dim


def features(grids: list[tuple[int, int, int]], dim: int) -> Features:
    regions = torch.randn(sum(n * h * w for n, h, w in grids), dim, dtype=torch.float64, requires_grad=True)
    parts = regions.split([n * h * w for n, h, w in grids])
    view = torch.cat([x.view(n, h * w, dim).mean(1) for x, (n, h, w) in zip(parts, grids, strict=True)])
    return Features(view, regions, grids)


def crops_of(f: Features) -> list[list[tuple[Tensor, Tensor]]]:
    """For every crop of an image, and every image: view [C] and regions [T, C]."""
    found, parts = [], f.regions.split([n * h * w for n, h, w in f.grids])
    views = iter(f.view)
    for x, (n, h, w) in zip(parts, f.grids, strict=True):
        found += [(next(views), regions) for regions in x.view(n, h * w, -1)]
    return [found[i : i + B] for i in range(0, len(found), B)]


def slow_loss(student: Objective, teacher: Objective, f: Features, t: Features, centers: dict[str, Tensor]) -> Tensor:
    """Pair by pair: teacher crops, student crops, images, regions."""

    def logits(head: Any, x: Tensor) -> Tensor:
        rows = head.last_layer.weight_g * F.normalize(head.last_layer.weight_v, dim=1)
        return rows @ F.normalize(head.mlp(x), dim=0)

    def distance(part: str, ours: Tensor, theirs: Tensor) -> Tensor:
        if isinstance(student, DistillCosine):
            projected = getattr(student, f"{part}_projection")(ours)
            return 1 - F.cosine_similarity(projected, theirs, dim=0)
        p = ((logits(getattr(teacher, f"{part}_head"), theirs) - centers[part]) / TEMP).softmax(0)
        return -(p.detach() * (logits(getattr(student, f"{part}_head"), ours) / 0.1).log_softmax(0)).sum()

    of_student, of_teacher = crops_of(f), crops_of(t)
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for teacher_crop in range(2):
        for v, crop in enumerate(of_student):
            pairs += 1
            for b in range(B):
                view, regions = crop[b]
                their_view, their_regions = of_teacher[teacher_crop][b]
                of_view = distance("view", view, their_view.detach())
                if not student.needs_regions:
                    total = total + of_view / B
                    continue
                of_regions = torch.zeros((), dtype=torch.float64)
                for i, region in enumerate(regions):
                    cosines = [F.cosine_similarity(region, g, dim=0).item() for g in of_student[teacher_crop][b][1]]
                    j = i if v == teacher_crop else cosines.index(max(cosines))
                    of_regions = of_regions + distance("region", region, their_regions[j].detach()) / len(regions)
                total = total + (0.5 * of_view + 0.5 * of_regions) / B
    return total / pairs


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("targets", BOTH)
@pytest.mark.parametrize("grids", [GRIDS, GRIDS[:1]], ids=["multi-crop", "two globals"])
def test_loss_and_gradients_match_loops(targets: str, regions: bool, grids: list[tuple[int, int, int]]) -> None:
    """Of the student's parameters and features, with a teacher of another width."""
    student, teacher, dim, other = objectives_of(targets, regions)
    assert other != dim
    f, t = features(grids, dim), features(GRIDS[:1], other)
    centers = {part: torch.randn(64, dtype=torch.float64) for part in ("view", "region")}
    if targets == "prototypes":
        of_heads = ("view", "region") if regions else ("view",)
        student.load_extra_state({f"{part}.values": centers[part] for part in of_heads})
    with torch.no_grad():
        given = teacher.targets(t)
    loss, logs = student(f, given, TEMP)
    expected = slow_loss(student, teacher, f, t, centers)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    leaves = [f.regions, *student.parameters()]
    for found, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    parts = [0.5 * logs["loss_view"] + 0.5 * logs["loss_region"]] if regions else [logs["loss_view"]]
    torch.testing.assert_close(parts[0], loss.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("trunk", ["resnet50", "vil_2262"])
def test_cosine_trains_every_parameter(trunk: str) -> None:
    """The step that conformance tests take with prototypes."""
    config = conformance.config_of(trunk, "distill", objective__targets="cosine", objective__regions=True)
    student, loss, logs = conformance.train_once(config)
    assert loss.isfinite()
    assert {"loss_view", "loss_region"} <= logs.keys()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)


# --- runs ------------------------------------------------------------------------------------------------------------

LARGE: dict[str, Any] = {"model__embed_dim": 24}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("distill") / "shards")


def write_teacher(path: Path, heads: bool = True, seed: int = 5, **changes: Any) -> Path:
    """A safetensors file of a trunk with heads and centres, wider than the tiny student; values are random."""
    config = tiny.config(path.parent / "unused", path.parent, **{**LARGE, **changes})
    network = build_network(config)
    initialize(network, seed)
    tensors = {name: t.detach() for name, t in network.state_dict().items()}
    centers = {f"{part}.values": 0.1 * torch.randn(64) for part in ("view", "region")}
    if not heads:
        tensors, centers = {name: t for name, t in tensors.items() if name.startswith("trunk.")}, {}
    safetensors_file.write(path, Weights(config, {"teacher": tensors}, centers), "teacher")
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


def config_of(folder: Path, data: Path, teacher: Path, **overrides: Any) -> Config:
    values = {"train__steps": 6, "train__checkpoint_every": 3, "train__keep_checkpoints": 9, **overrides}
    own = {"objective__name": "distill", "objective__teacher": str(teacher), "objective__regions": True}
    return tiny.config(folder, data, **{**own, **values})


def run(folder: Path, data: Path, teacher: Path, **overrides: Any) -> list[dict[str, Any]]:
    assert pretraining.pretrain(config_of(folder, data, teacher, **overrides)) == 0
    return tiny.rows(folder)


Straight = dict[str, tuple[Path, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def straight(data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """A run of each kind at ZeRO 1, saved at steps 3 and 6."""
    found = {}
    for targets in BOTH:
        folder = tmp_path_factory.mktemp("straight") / targets
        found[targets] = folder, run(folder, data, teacher, objective__targets=targets)
    return found


def test_the_teacher_stays_and_the_average_follows(data: Path, teacher: Path, tmp_path: Path) -> None:
    """Step by step: targets are the file's network's bit for bit, before and after; its centres are the first."""
    config = frozen_teacher.described_in(config_of(tmp_path / "run", data, teacher))
    network = build_frozen_teacher(config, build_network(config).objective).eval()
    stored = frozen_teacher.load(config)
    network.load_state_dict(stored.values)
    world = worlds.start()
    try:
        trainer = Trainer(config, world, Schedules(config, 4))
        assert trainer.objective.extra_state().keys() == stored.centers.keys() == {"view.values", "region.values"}
        assert all(torch.equal(c, stored.centers[n]) for n, c in trainer.objective.extra_state().items())
        crops = [torch.randn(16, 3, 32, 32), torch.randn(32, 3, 16, 16)]
        with torch.no_grad():
            expected = network(crops[:1])
        for _ in range(2):
            found = trainer._teacher_targets(crops[:1])
            assert torch.equal(found.view.z, expected.view.z)
            assert torch.equal(found.region.rows, expected.region.rows)
            trainer.train_step([MicroBatch(crops, torch.arange(8))])
        student = dict(trainer.engines.student.module.named_parameters())
        moved = [
            (ema - student[p.name].data.view(-1)).abs().max() > 0
            for p, ema in zip(trainer.engines.partitions, trainer.engines.teacher.values, strict=True)
        ]
        assert sum(moved) > len(moved) / 2
    finally:
        worlds.stop()


@pytest.mark.parametrize(
    ("targets", "changes"),
    [
        ("prototypes", {"train__ds_config": "zero0"}),
        pytest.param("prototypes", {"train__ds_config": "zero3", "train__grad_accum": 2}, marks=pytest.mark.slow),
        pytest.param("cosine", {"train__ds_config": "zero2", "train__grad_accum": 2}, marks=pytest.mark.slow),
        pytest.param(
            "cosine",
            {"train__ds_config": "zero3", "train__activation_checkpointing": "selective"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_zero_stages_and_accumulation_give_the_same_losses(
    straight: Straight, data: Path, teacher: Path, tmp_path: Path, targets: str, changes: dict[str, Any]
) -> None:
    rows = run(tmp_path / "run", data, teacher, objective__targets=targets, **changes)
    for row, expected in zip(rows, straight[targets][1], strict=True):
        for key in ("loss", "loss_view", "loss_region"):
            assert row[key] == pytest.approx(expected[key], rel=2e-5), key  # fp32 sums in another order, over 6 steps


@pytest.mark.parametrize(
    ("targets", "stage"), [("prototypes", "zero1"), pytest.param("cosine", "zero3", marks=pytest.mark.slow)]
)
def test_resume_is_exact(
    straight: Straight, data: Path, teacher: Path, tmp_path: Path, targets: str, stage: str
) -> None:
    """From its weights at another place, too; nothing of the teacher is in the checkpoint."""
    source, rows = straight[targets]
    changes = {"objective__targets": targets, "train__ds_config": stage}
    if stage != "zero1":
        rows = run(source := tmp_path / "run", data, teacher, **changes)
    shutil.copytree(source, resumed := tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints" / "step-00000006")
    (resumed / "checkpoints" / "latest").write_text("step-00000003\n")
    (resumed / "summary.json").unlink()
    held = storage.tensor_sizes(resumed / "checkpoints" / "step-00000003")
    assert {name.partition("/")[0] for name in held} <= {"student", "ema", "exp_avg", "exp_avg_sq", "center"}
    moved = shutil.copy(teacher, tmp_path / "moved.safetensors")
    assert run(resumed, data, Path(moved), **changes) == rows


def test_another_teacher_is_refused_on_resume(straight: Straight, data: Path, tmp_path: Path, teacher: Path) -> None:
    other = write_teacher(tmp_path / "other.safetensors", seed=6)
    with pytest.raises(UserError, match=r"objective\.teacher_config\.checksum: "):
        run(straight["prototypes"][0], data, other)
    recorded = configs.load(straight["prototypes"][0] / "config.yaml")
    assert recorded == frozen_teacher.described_in(recorded)
    shutil.copy(other, tmp_path / "changed.safetensors")
    changed = recorded.objective.model_copy(update={"teacher": str(tmp_path / "changed.safetensors")})
    with pytest.raises(UserError, match="not the weights with which this config was recorded"):
        frozen_teacher.described_in(recorded.model_copy(update={"objective": changed}))


@pytest.fixture
def gone(teacher: Path) -> Iterator[None]:
    """The teacher's file is elsewhere while a test runs."""
    elsewhere = teacher.rename(teacher.with_name("elsewhere"))
    yield
    elsewhere.rename(teacher)


@pytest.mark.usefixtures("gone")
def test_students_are_used_where_the_teacher_is_not(straight: Straight, tmp_path: Path) -> None:
    source = straight["cosine"][0]
    folder = source / "checkpoints" / "step-00000006"
    convert.convert(source, tmp_path / "student.safetensors", "esvit-scale", "safetensors", heads=True)
    convert.convert(source, tmp_path / "folder", "esvit-scale", "safetensors")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, found, other = (
            load_backbone(path)(images) for path in (folder, tmp_path / "student.safetensors", tmp_path / "folder")
        )
    assert torch.equal(expected, found)
    assert torch.equal(expected, other)
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "distillation of a teacher's features" in card


@pytest.mark.slow
def test_two_ranks_match_one(straight: Straight, data: Path, teacher: Path, tmp_path: Path) -> None:
    """ZeRO 1 and 3, and a teacher with running statistics in a run directory."""
    paths = []
    for name, changes in {
        "prototypes": {},
        "cosine": {"objective__targets": "cosine", "train__ds_config": "zero3"},
    }.items():
        config = config_of(tmp_path / name, data, teacher, **changes)
        paths.append(tiny.write_config(tmp_path / f"{name}.yaml", config))
    norms = {"model__trunk": "resnet50", "model__embed_dim": 8, "model__depths": [1, 1, 1, 1], "model__heads": None}
    bare = write_teacher(tmp_path / "norms.safetensors", heads=False, objective__name="dino", **norms)
    of_norms = {"objective__targets": "cosine", "objective__regions": False, "train__ds_config": "zero3"}
    config = config_of(tmp_path / "norms", data, bare, **of_norms)
    paths.append(tiny.write_config(tmp_path / "norms.yaml", config))
    scenarios = Path(__file__).parents[1] / "distributed" / "scenarios.py"
    launcher.run(scenarios, *paths, ranks=2, timeout=300)
    one = run(tmp_path / "norms-one", data, bare, **of_norms | {"train__ds_config": "zero1"})
    for name, expected in {**{t: straight[t][1] for t in BOTH}, "norms": one}.items():
        for row, want in zip(tiny.rows(tmp_path / name), expected, strict=True):
            assert row["loss"] == pytest.approx(want["loss"], rel=5e-5), name


# --- several students ------------------------------------------------------------------------------------------------

FURTHER = [
    {"trunk": "resnet50", "embed_dim": 8, "depths": [1, 1, 1], "drop_path": 0.2},
    {"trunk": "swin_t", "embed_dim": 8, "depths": [1, 1, 1], "heads": [1, 1, 2], "window": 4, "drop_path": 0.2},
]


@pytest.mark.parametrize("targets", BOTH)
def test_students_learn_as_each_does_alone(targets: str) -> None:
    """Every gradient is that of a network of its own with the same weights, bit for bit."""
    own = {"objective__targets": targets, "objective__regions": True, "objective__students": FURTHER}
    config = conformance.config_of("swin_t", "distill", **own)
    student, teacher = conformance.networks(config)
    crops, keys = conformance.crops_of(config), drop_keys(0, 0, torch.arange(conformance.IMAGES), 4)
    given = conformance.targets_of(student, teacher, crops)
    loss, logs, _ = student(crops, given, keys, TEMP)
    loss.backward()
    losses = []
    for number, alone in enumerate(configs_of_students(config)):
        prefix = f"students.{number - 1}." if number else ""
        network = build_student(alone)
        values = {n.removeprefix(prefix): p for n, p in student.named_parameters() if n.startswith(prefix)}
        values = {n: p for n, p in values.items() if not n.startswith("students.")}
        assert values.keys() == dict(network.named_parameters()).keys()
        with torch.no_grad():
            for name, p in network.named_parameters():
                p.copy_(values[name])
        its_loss, its_logs, _ = network(crops, given, keys, TEMP)
        its_loss.backward()
        losses.append(its_loss.detach())
        for name, p in network.named_parameters():
            assert torch.equal(p.grad, values[name].grad), (number, name)
        if number:
            assert torch.equal(logs[f"loss_student{number - 1}"], its_loss)
            assert torch.equal(logs[f"loss_view_student{number - 1}"], its_logs["loss_view"])
    torch.testing.assert_close(loss.detach(), sum(losses))


@pytest.mark.slow
def test_further_students_are_saved_resumed_and_converted(
    data: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At ZeRO 1, and as a run of ZeRO 3 that goes on at ZeRO 1."""
    own = {"objective__students": FURTHER, "train__steps": 4, "train__checkpoint_every": 2}
    rows = run(tmp_path / "run", data, teacher, **own)
    assert all(row["loss"] > row["loss_student0"] + row["loss_student1"] for row in rows)
    assert rows[-1]["loss_student1"] != rows[0]["loss_student1"]
    for stage in ("zero1", "zero3"):
        source = tmp_path / "run"
        if stage == "zero3":
            run(source := tmp_path / "zero3", data, teacher, **own, train__ds_config=stage)
        shutil.copytree(source, resumed := tmp_path / f"resumed-{stage}")
        shutil.rmtree(resumed / "checkpoints" / "step-00000004")
        (resumed / "checkpoints" / "latest").write_text("step-00000002\n")
        (resumed / "summary.json").unlink()
        again = run(resumed, data, teacher, **own)
        if stage == "zero1":
            assert again == rows
        for row, expected in zip(again, rows, strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=2e-5)
    stored = state.read_weights(tmp_path / "run" / "checkpoints" / "step-00000004").networks["teacher"]
    images = torch.randn(2, 3, 32, 32)
    for number, prefix in ((None, ""), (0, "students.0."), (1, "students.1.")):
        path = tmp_path / f"{number}.safetensors"
        convert.convert(tmp_path / "run", path, "esvit-scale", "safetensors", heads=True, student=number)
        trunk = load_backbone(path).trunk
        assert trunk.name == ("resnet50" if number == 0 else "swin_t")
        for name, value in trunk.state_dict().items():
            assert torch.equal(value, stored[f"{prefix}trunk.{name}"]), name
        assert trunk([images]).view.isfinite().all()
    command = ["convert", str(tmp_path / "run"), str(tmp_path / "x.safetensors"), "--from", "esvit-scale"]
    assert cli.main([*command, "--to", "safetensors", "--student", "2"]) == 2
    assert "no such further student (objective.students); there: 0 to 1" in capsys.readouterr().err


@pytest.mark.slow
def test_further_students_are_counted_and_refused_where_they_cannot_be() -> None:
    config = planned(students=[{"trunk": "swin_s"}])
    first, second = configs_of_students(config)
    assert second.model.trunk == "swin_s"
    teacher = 2 * costs.crop_flops(configs.resolve("swin_b"), 224)
    assert costs.image_flops(config) == sum(map(costs.image_flops, (first, second))) - teacher
    assert costs.activation_bytes(config, "none").per_image == sum(
        costs.activation_bytes(one, "none").per_image for one in (first, second)
    )
    assert costs.parameters(config).trunk == sum(costs.parameters(one).trunk for one in (first, second))
    whole, alone = (plans.plan(c, 8, 80 * 2**30, None, None).settings[0].memory for c in (config, first))
    assert whole.frozen == alone.frozen
    assert whole.masters > alone.masters
    with pytest.raises(UserError, match=r"^objective\.students: esvit trains one student"):
        build_network(conformance.config_of("swin_t", "esvit", objective__students=[{"trunk": "swin_s"}]))
    with pytest.raises(UserError, match=r"objective\.students: one norm of all gradients"):
        configs.resolve("swin_t", ["objective.students=[{trunk: swin_s}]", "optim.clip_by=global"])


# --- costs -----------------------------------------------------------------------------------------------------------


def planned(**objective: Any) -> Config:
    """Swin-T taught by Swin-B, at their published sizes."""
    description = {
        "checksum": "none",
        "data": {"global_crops": {"size": 224}},
        "model": {"trunk": "swin_b"},
        "objective": {"prototypes": 65536, "head_hidden": 2048, "bottleneck": 256, "regions": False},
    }
    values = {"name": "distill", "teacher": "swin_b.pth", "teacher_config": description, "regions": True, **objective}
    return configs.validate({"objective": values}, where="test")


def test_plan_counts_the_teacher() -> None:
    config, plain = planned(), configs.resolve("swin_t")
    swin_b = configs.resolve("swin_b")
    trunks = 2 * (costs.crop_flops(swin_b, 224) - costs.crop_flops(plain, 224))
    heads = (2 + 2 * 49) * 2 * (1024 - 768) * 2048  # the first layer of the teacher's heads, for its tokens
    assert costs.image_flops(config) - costs.image_flops(plain) == trunks + heads
    found, without = (plans.plan(c, 8, 80 * 2**30, None, None) for c in (config, plain))
    parameters = sum(costs.parameters(swin_b))
    for setting in found.settings:
        assert setting.memory.frozen == pytest.approx(2 * parameters / (8 if setting.stage == 3 else 1), rel=1e-3)
    assert found.numbers["checkpoint_bytes"] == without.numbers["checkpoint_bytes"]
    assert "\nfrozen " in plans.table(found, config, 8)
    assert "frozen" not in plans.table(without, plain, 8)
    bare = plans.plan(planned(targets="cosine"), 8, 80 * 2**30, None, None)
    assert bare.settings[0].memory.frozen == 2 * costs.parameters(swin_b).trunk


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("targets", "kind"), [("prototypes", DistillPrototypes), ("cosine", DistillCosine)])
def test_formulas_give_what_a_trace_counts(
    targets: str, kind: type[Objective], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = conformance.config_of(
        "swin_t", "distill", objective__targets=targets, objective__regions=True, train__precision=precision
    )
    flops, kept = costs.image_flops(config, "executed"), costs.kept(config).outside
    monkeypatch.setattr(kind, "formulas", lambda self: None)
    try:
        traced = costs.image_flops(config, "executed")
    except NotImplementedError:  # of torch 2.7, for heads with weight norm; a run needs the formulas only
        pytest.skip("this torch cannot trace the backward of a weight norm")
    assert traced == flops
    # The formulas of heads count what grows with their widths, which are small here.
    assert costs.kept(config).outside.per_image == pytest.approx(kept.per_image, rel=0.02)


# --- teachers that do not fit ----------------------------------------------------------------------------------------


def message(capsys: pytest.CaptureFixture[str], folder: Path, data: Path, *overrides: str) -> str:
    """What `pretrain` says, with exit code 2 and before anything is written."""
    path = tiny.write_config(folder / "run.yaml", tiny.config(folder / "run", data))
    capsys.readouterr()
    assert cli.main(["pretrain", str(path), "objective.name=distill", "objective.regions=true", *overrides]) == 2
    assert not (folder / "run" / "config.yaml").exists()
    text = capsys.readouterr().err.strip().splitlines()[-1]
    return text


def test_teachers_that_do_not_fit_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], data: Path, teacher: Path, tmp_path: Path
) -> None:
    def said(**changes: Any) -> str:
        with pytest.raises(UserError) as error:
            frozen_teacher.described_in(config_of(tmp_path / "run", data, **{"teacher": teacher, **changes}))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "objective.teacher: distill needs the weights of a teacher" in message(capsys, tmp_path, data)
    missing = message(capsys, tmp_path, data, "objective.teacher=nowhere")
    assert "objective.teacher: nowhere: no such file or folder" in missing
    bare = write_teacher(tmp_path / "bare.safetensors", heads=False)
    assert "holds no view head, region head, whose prototypes" in message(
        capsys, tmp_path, data, f"objective.teacher={bare}"
    )
    # Cells of 8 pixels where the student's have 16.
    finer = {"model__depths": [1, 1], "model__heads": [1, 2]}
    other = write_teacher(tmp_path / "finer.safetensors", **finer)
    assert "makes 4 × 4 regions of a crop of 32 pixels, and the student swin_t 2 × 2" in said(teacher=other)
    frozen_teacher.described_in(config_of(tmp_path / "run", data, other, objective__regions=False))
    vit = {"model__trunk": "deit_s", "model__depths": [1], "model__heads": [4], "model__embed_dim": 32}
    of_16 = write_teacher(tmp_path / "vit.safetensors", heads=False, **vit)
    finer_student = said(teacher=of_16, objective__targets="cosine", **finer)
    assert "makes 2 × 2 regions of a crop of 32 pixels, and the student swin_t 4 × 4" in finer_student
    coarser = [{"trunk": "swin_t", "embed_dim": 8, "depths": [1, 1, 1, 1], "heads": [1, 1, 1, 1], "window": 4}]
    assert "and the student swin_t 1 × 1" in said(objective__students=coarser)
    four = {"data__channels": 4, "data__mean": [0.5] * 4, "data__std": [0.2] * 4}
    other = write_teacher(tmp_path / "four.safetensors", **four)
    assert "was trained on images of 4 channels, but data.channels=3" in said(teacher=other)
    other = write_teacher(tmp_path / "half.safetensors", data__mean=[0.5] * 3, data__std=[0.5] * 3)
    assert said(teacher=other).endswith("set data.mean=[0.5,0.5,0.5] data.std=[0.5,0.5,0.5]")
    assert said(objective__prototypes=32) == "objective.prototypes: 32, but the teacher's heads have 64; set it to 64"
    with pytest.raises(UserError, match=r"objective\.teacher: esvit has no frozen teacher"):
        build_network(tiny.config(tmp_path, data, objective__teacher="x"))
    with pytest.raises(UserError, match=r"distill with objective\.regions=true has no loss of masked regions"):
        build_network(config_of(tmp_path, data, teacher, objective__mask_weight=1.0))


@pytest.mark.slow
def test_timm_weights_teach_by_name(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As timm gives them, normalised as timm wants; without a network or a cache, one line."""
    create, kept = timm.create_model, []

    def pretrained(*args: Any, pretrained: bool = False, **kwargs: Any) -> Any:
        network = create(*args, **kwargs)
        if pretrained:
            kept.append(network)
            torch.manual_seed(0)
            for p in network.parameters():
                p.data = 0.1 * torch.randn_like(p)
        return network

    monkeypatch.setattr(timm, "create_model", pretrained)
    of_timm = Path("timm:test_convnext")
    own = {"objective__targets": "cosine", "objective__regions": False}
    with pytest.raises(UserError, match=r"set data\.mean=\[0\.5,0\.5,0\.5\] data\.std=\[0\.5,0\.5,0\.5\]$"):
        frozen_teacher.described_in(config_of(tmp_path / "run", data, of_timm, **own))
    own |= {"data__mean": [0.5] * 3, "data__std": [0.5] * 3}
    config = frozen_teacher.described_in(config_of(tmp_path / "run", data, of_timm, **own))
    network = build_frozen_teacher(config, build_network(config).objective).eval()
    network.load_state_dict(frozen_teacher.load(config).values)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = F.normalize(kept[-1].eval()(images))
        torch.testing.assert_close(network([images]).view, expected, rtol=1e-5, atol=1e-5)

    def offline(*args: Any, pretrained: bool = False, **kwargs: Any) -> Any:
        if pretrained:
            raise OSError("no network\nand no cache")
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"^objective.teacher: timm:test_convnext: [^\n]* at hand: no network$"):
        frozen_teacher.described_in(config_of(tmp_path / "run", data, of_timm, **own))
    with pytest.raises(UserError, match=r"^objective.teacher: model.trunk: timm has no network 'none'[^\n]*$"):
        frozen_teacher.described_in(config_of(tmp_path / "run", data, Path("timm:none"), **own))


@pytest.mark.slow
def test_teachers_for_other_crops_are_refused_in_one_line(data: Path, tmp_path: Path) -> None:
    """A network of timm that takes the sizes of its own crops alone."""
    own = {"model__trunk": "timm:mixer_s32_224", "model__drop_path": 0.0, "data__local_crops": []}
    own |= {f"model__{key}": None for key in ("embed_dim", "depths", "heads")}
    sized = write_teacher(tmp_path / "mixer.safetensors", heads=False, data__global_crops={"size": 224}, **own)
    config = config_of(tmp_path / "run", data, sized, objective__targets="cosine", objective__regions=False)
    with pytest.raises(UserError, match=r"takes no crops of 32 pixels \([^\n]*set data.global_crops.size=224$"):
        frozen_teacher.described_in(config)


def test_official_and_run_teachers(straight: Straight, data: Path, tmp_path: Path) -> None:
    """A run that was itself distilled teaches, from its dir; so does a step folder's export."""
    run_dir = straight["prototypes"][0]
    described = frozen_teacher.described_in(config_of(tmp_path / "run", data, run_dir)).objective.teacher_config
    assert described
    assert described["model"]["embed_dim"] == 16
    assert json.loads(json.dumps(described)) == described
    weights = state.read_weights(run_dir / "checkpoints" / "step-00000006")
    found = frozen_teacher.load(frozen_teacher.described_in(config_of(tmp_path / "run", data, run_dir)))
    assert all(torch.equal(t, weights.networks["teacher"][name]) for name, t in found.values.items())


@pytest.mark.slow
def test_benchmark_rows_are_configs(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("distill", launcher.REPOSITORY / "benchmarks" / "distill.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    trunk = costs.parameters(module.recipe(tmp_path, "alone", 0, 3, [])).trunk
    assert 3.5 < costs.parameters(module.recipe(tmp_path, "teacher", 0, 3, module.TEACHER)).trunk / trunk < 4.5
    for row, overrides in module.ROWS.items():
        config = module.recipe(tmp_path, row, 0, 3, overrides)
        assert config.objective.teacher == (None if row == "alone" else str(tmp_path / module.TAKEN))
        assert config.objective.regions
