"""Runs of distillation: ZeRO stages, ranks, resume, and students without their teacher."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_scale import config as configs
from esvit_scale.checkpoint import convert, frozen_teacher, state, storage
from esvit_scale.checkpoint.backbone import load_backbone
from esvit_scale.data.stream import MicroBatch
from esvit_scale.errors import UserError
from esvit_scale.objective.network import build_frozen_teacher, build_network
from esvit_scale.objective.schedules import Schedules
from esvit_scale.parallel import world as worlds
from esvit_scale.train.trainer import Trainer
from tests import launcher, tiny
from tests.objective.distillation import BOTH, Straight, config_of, run, write_teacher


@pytest.fixture(scope="module")
def straight(shards: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """A run of each kind at ZeRO 1, saved at steps 3 and 6."""
    found = {}
    for targets in BOTH:
        folder = tmp_path_factory.mktemp("straight") / targets
        found[targets] = folder, run(folder, shards, teacher, objective__targets=targets)
    return found


def test_the_teacher_stays_and_the_average_follows(shards: Path, teacher: Path, tmp_path: Path) -> None:
    """Step by step: targets are the file's network's bit for bit, before and after; its centres are the first."""
    config = frozen_teacher.described_in(config_of(tmp_path / "run", shards, teacher))
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
    straight: Straight, shards: Path, teacher: Path, tmp_path: Path, targets: str, changes: dict[str, Any]
) -> None:
    rows = run(tmp_path / "run", shards, teacher, objective__targets=targets, **changes)
    for row, expected in zip(rows, straight[targets][1], strict=True):
        for key in ("loss", "loss_view", "loss_region"):
            assert row[key] == pytest.approx(expected[key], rel=2e-5), key  # fp32 sums in another order, over 6 steps


@pytest.mark.parametrize(
    ("targets", "stage"), [("prototypes", "zero1"), pytest.param("cosine", "zero3", marks=pytest.mark.slow)]
)
def test_resume_is_exact(
    straight: Straight, shards: Path, teacher: Path, tmp_path: Path, targets: str, stage: str
) -> None:
    """From its weights at another place, too; nothing of the teacher is in the checkpoint."""
    source, rows = straight[targets]
    changes = {"objective__targets": targets, "train__ds_config": stage}
    if stage != "zero1":
        rows = run(source := tmp_path / "run", shards, teacher, **changes)
    shutil.copytree(source, resumed := tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints" / "step-00000006")
    (resumed / "checkpoints" / "latest").write_text("step-00000003\n")
    (resumed / "summary.json").unlink()
    held = storage.tensor_sizes(resumed / "checkpoints" / "step-00000003")
    assert {name.partition("/")[0] for name in held} <= {"student", "ema", "exp_avg", "exp_avg_sq", "center"}
    moved = shutil.copy(teacher, tmp_path / "moved.safetensors")
    assert run(resumed, shards, Path(moved), **changes) == rows


def test_another_teacher_is_refused_on_resume(straight: Straight, shards: Path, tmp_path: Path, teacher: Path) -> None:
    other = write_teacher(tmp_path / "other.safetensors", seed=6)
    with pytest.raises(UserError, match=r"objective\.teacher_config\.checksum: "):
        run(straight["prototypes"][0], shards, other)
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
def test_two_ranks_match_one(straight: Straight, shards: Path, teacher: Path, tmp_path: Path) -> None:
    """ZeRO 1 and 3, and a teacher with running statistics in a run directory."""
    paths = []
    for name, changes in {
        "prototypes": {},
        "cosine": {"objective__targets": "cosine", "train__ds_config": "zero3"},
    }.items():
        config = config_of(tmp_path / name, shards, teacher, **changes)
        paths.append(tiny.write_config(tmp_path / f"{name}.yaml", config))
    norms = {"model__trunk": "resnet50", "model__embed_dim": 8, "model__depths": [1, 1, 1, 1], "model__heads": None}
    bare = write_teacher(tmp_path / "norms.safetensors", heads=False, objective__name="dino", **norms)
    of_norms = {"objective__targets": "cosine", "objective__regions": False, "train__ds_config": "zero3"}
    config = config_of(tmp_path / "norms", shards, bare, **of_norms)
    paths.append(tiny.write_config(tmp_path / "norms.yaml", config))
    scenarios = Path(__file__).parents[1] / "distributed" / "scenarios.py"
    launcher.run(scenarios, *paths, ranks=2, timeout=300)
    one = run(tmp_path / "norms-one", shards, bare, **of_norms | {"train__ds_config": "zero1"})
    for name, expected in {**{t: straight[t][1] for t in BOTH}, "norms": one}.items():
        for row, want in zip(tiny.rows(tmp_path / name), expected, strict=True):
            assert row["loss"] == pytest.approx(want["loss"], rel=5e-5), name


def test_official_and_run_teachers(straight: Straight, shards: Path, tmp_path: Path) -> None:
    """A run that was itself distilled teaches, from its dir; so does a step folder's export."""
    run_dir = straight["prototypes"][0]
    described = frozen_teacher.described_in(config_of(tmp_path / "run", shards, run_dir)).objective.teacher_config
    assert described
    assert described["model"]["embed_dim"] == 16
    assert json.loads(json.dumps(described)) == described
    weights = state.read_weights(run_dir / "checkpoints" / "step-00000006")
    found = frozen_teacher.load(frozen_teacher.described_in(config_of(tmp_path / "run", shards, run_dir)))
    assert all(torch.equal(t, weights.networks["teacher"][name]) for name, t in found.values.items())
