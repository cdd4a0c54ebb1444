"""Every trunk of the registry with every objective: what must hold of each, whoever adds the next one."""

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_scale import config as configs
from esvit_scale.checkpoint import convert, state, step_folders
from esvit_scale.checkpoint.backbone import load_backbone
from esvit_scale.config import Config
from esvit_scale.data.mixing import mix_labels
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.models.initialize import initialize
from esvit_scale.models.registry import TRUNKS, build_trunk
from esvit_scale.models.swin_variants import SHAPES
from esvit_scale.objective.network import (
    StudentNetwork,
    TeacherNetwork,
    build_frozen_teacher,
    build_student,
    build_teacher,
)
from esvit_scale.objective.objective import joined_targets
from esvit_scale.objective.param_groups import parameter_groups
from esvit_scale.objective.registry import OBJECTIVES
from esvit_scale.parallel.buffers import persistent_buffers
from esvit_scale.train import pretraining
from tests import tiny

# ZeRO stage and implementation of activation checkpointing, for trunks that are called once a forward, and once a crop size.
ONCE = [
    ("zero3", "selective"),
    ("zero3", "torch"),
    ("zero1", "deepspeed"),
    ("zero3", "deepspeed"),
    ("zero1", "fairscale"),
]
# Of trunks of one kind (neither windows nor running statistics are new): one implementation that runs inside autograd and
# one that starts a backward of its own, as both of the libraries do.
FEW = [("zero3", "selective"), ("zero3", "torch"), ("zero3", "deepspeed")]
ALL = ("swin_t", "resnet50")
ONCE_A_SIZE = [("zero3", "selective"), ("zero3", "torch"), ("zero3", "none"), ("zero1", "torch")]
IMAGES = 12  # the truncated triplet loss needs 11
# How to make a trunk small; one that is not named here is built as it is.
SMALL: dict[str, dict[str, Any]] = {
    **{name: {"embed_dim": 8, "depths": [1, 1, 2], "heads": [1, 2, 4], "window": 4} for name in SHAPES},
    **{
        name: {"embed_dim": 32, "depths": [2], "heads": [4]}
        for name in ("deit_s", "deit_b", "vit_s_moco", "vit_b_moco")
    },
    "vit_s_moco": {"embed_dim": 32, "depths": [2], "heads": [4], "registers": 3},
    "sparse:deit_s": {"embed_dim": 32, "depths": [3], "heads": [4], "registers": 1, "keep": 0.5},
    "sparse:swin_t": {"embed_dim": 8, "depths": [1, 1, 3], "heads": [1, 2, 4], "window": 4, "keep": 0.5},
    "resnet50": {"embed_dim": 8, "depths": [1, 1, 2, 1]},
    **{
        name: {"embed_dim": 16, "depths": [2], "heads": [2], "modalities": {"patch": 8}}
        for name in ("modal_small", "modal_medium", "modal_large")
    },
    "cvt_s1": {"embed_dim": 8, "depths": [1, 1, 2, 1], "heads": [1, 1, 2, 4]},
    **{
        name: {"embed_dim": 8, "depths": [1, 1, 2, 1], "heads": [1, 2, 4, 8]}
        for name in ("vil_2262", "focal_t", "focal_s", "focal_b")
    },
}
SPARSE = ["sparse:deit_s", "sparse:swin_t"]
LIBRARY = ["timm:test_convnext", "timm:test_resnet", "timm:test_vit"]  # the smallest of timm's
VARIANTS = {*SHAPES, "deit_b", "vit_b_moco", "focal_s", "focal_b", "modal_medium", "modal_large"} - {
    "swin_t",
    "swinv2_t",
}  # another's class, other numbers
FAMILIES = [*(name for name in TRUNKS if name not in VARIANTS), *SPARSE, *LIBRARY]


def config_of(trunk: str, objective: str, **changes: Any) -> Config:
    values = json.loads(json.dumps(tiny.VALUES))
    values["model"] = {"trunk": trunk, "drop_path": 0.2, **SMALL.get(trunk, {})}
    values["data"] |= {"global_crops": {"size": 64}, "local_crops": [{"size": 32, "count": 2}]}
    values["objective"] |= {"name": objective}
    if not OBJECTIVES_OF[objective].multi_crop:
        values["data"]["local_crops"] = []
    if not (OBJECTIVES_OF[objective].has_teacher or OBJECTIVES_OF[objective].has_frozen_teacher):
        values["objective"] |= {"ema_momentum": 0.0, "ema_momentum_end": 0.0}
    if OBJECTIVES_OF[objective].has_frozen_teacher:
        values["objective"] |= FROZEN_TEACHER
    if OBJECTIVES_OF[objective].takes_signals:
        values["data"] |= SIGNALS
    if "features" in OBJECTIVES_OF[objective].teacher_targets:
        dense = values["model"] | {"trunk": trunk.removeprefix("sparse:"), "drop_path": 0.0, "keep": None}
        of_self = FROZEN_TEACHER["teacher_config"] | {"model": dense, "data": {**values["data"], "local_crops": []}}
        values["objective"] |= {"teacher_config": of_self, "targets": "features"}
    if OBJECTIVES_OF[objective].takes_labels:
        values["objective"] |= {"classes": 3, "regions": False}
        values["data"]["global_crops"]["count"] = 1
    for key, value in changes.items():
        section, leaf = key.split("__")
        values[section][leaf] = value
    return configs.validate(values, where=f"{trunk} and {objective}")


OBJECTIVES_OF = {
    name: make(8, configs.Objective(prototypes=8, head_hidden=8, bottleneck=8, classes=3))
    for name, make in OBJECTIVES.items()
}
SELF_SUPERVISED = [  # from images alone
    name for name, objective in OBJECTIVES_OF.items() if not (objective.takes_labels or objective.takes_signals)
]


# What an objective of several modalities reads beside images.
SIGNALS = {"audio": {"views": 1, "rate": 1000, "seconds": 0.3}, "text": {"views": 2, "length": 12}}


# A Swin of another width, with the prototypes of tiny.VALUES.
FROZEN_TEACHER = {
    "teacher": "teacher.safetensors",
    "teacher_config": {
        "checksum": "none",
        "data": {"global_crops": {"size": 64}},
        "model": {"trunk": "swin_t", "embed_dim": 12, "depths": [1, 1, 1], "heads": [1, 2, 4], "window": 4},
        "objective": {"prototypes": 64, "head_hidden": 24, "bottleneck": 16, "regions": False},
    },
}


def networks(config: Config) -> tuple[StudentNetwork, TeacherNetwork]:
    """The student, and the teacher that computes its targets."""
    student = build_student(config)
    frozen = student.objective.has_frozen_teacher
    teacher = build_frozen_teacher(config, student.objective) if frozen else build_teacher(config)
    for network in (student, teacher):
        initialize(network, 3)
    return student, teacher


def crops_of(config: Config, seed: int = 0) -> list[torch.Tensor]:
    """IMAGES random images; every call draws the same."""
    generator = torch.Generator().manual_seed(seed)
    globals_ = config.data.global_crops
    groups = [(globals_.count, globals_.size), *((g.count, g.size) for g in config.data.local_crops)]
    return [torch.randn(n * IMAGES, 3, size, size, generator=generator) for n, size in groups]


def signals_of(config: Config) -> list[Any]:
    """Random signals, and which samples have an image; an empty list for a config that reads images alone."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"audio": (300,), "text": (12,)}
    found = {}
    for name, views in config.signal_views.items():
        values = torch.randint(1, 200, (views * IMAGES, *shapes[name]), generator=generator)
        lengths = torch.randint(0, shapes[name][0], (views * IMAGES,), generator=generator)
        found[name] = (values if name == "text" else values / 200, lengths)
    return [found, torch.arange(IMAGES) % 3 > 0] if found else []


def targets_of(student: StudentNetwork, teacher: TeacherNetwork, crops: list[torch.Tensor], *beside: Any) -> Any:
    """The teacher's targets, labels, or both; None for an objective with neither."""
    labels = mix_labels(torch.arange(IMAGES) % 3, None) if student.objective.takes_labels else None
    if not (student.objective.has_teacher or student.objective.has_frozen_teacher):
        return labels
    with torch.no_grad():
        return joined_targets(labels, teacher(crops[:1], *beside))


def train_once(config: Config) -> tuple[StudentNetwork, torch.Tensor, dict[str, torch.Tensor]]:
    """The student after one forward and backward, its loss and its logs."""
    student, teacher = networks(config)
    crops = crops_of(config)
    beside = signals_of(config)
    targets = targets_of(student, teacher, crops, *beside)
    keys = drop_keys(0, 0, torch.arange(IMAGES), len(config.crop_sizes) + sum(config.signal_views.values()))
    loss, logs, features = student(crops, targets, keys, 0.05, None, *beside)
    loss.backward()
    assert features.shape == (IMAGES * len(config.crop_sizes), student.trunk.dim)
    return student, loss, logs


MULTIMODAL = [name for name, objective in OBJECTIVES_OF.items() if objective.takes_signals]
OF_LIBRARIES = ("esvit", "byol", "classify")  # regions and several sizes of crops, one size, labels
# What an objective takes of a trunk is the same whatever library the trunk is from.
PAIRS = [
    (trunk, objective)
    for trunk, objective in product(FAMILIES, OBJECTIVES)
    if (trunk.startswith("modal_") if objective in MULTIMODAL else trunk not in LIBRARY or objective in OF_LIBRARIES)
]


@pytest.mark.parametrize(("trunk", "objective"), PAIRS)
def test_training_step_is_finite_complete_and_reproducible(trunk: str, objective: str) -> None:
    """Builds, is finite, uses every parameter, logs scalars, and does the same when done again.

    Again: every trunk with EsViT, and every objective with a Swin. What differs is in one or the other.
    """
    config = config_of(trunk, objective)
    student, loss, logs = train_once(config)
    assert loss.isfinite()
    assert all(value.dim() == 0 and value.isfinite() and not value.requires_grad for value in logs.values())
    assert "feature_std" in logs
    for name, p in student.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, f"{name} takes no part in the loss"
            assert p.grad.isfinite().all(), name
    assert set(parameter_groups(student)) == {n for n, p in student.named_parameters() if p.requires_grad}
    if trunk != "swin_t" and objective not in ("esvit", *MULTIMODAL):
        return
    again, same_loss, _ = train_once(config)
    assert torch.equal(loss, same_loss)
    for (name, p), q in zip(student.named_parameters(), again.parameters(), strict=True):
        assert p.grad is None or torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("trunk", [*TRUNKS, *SPARSE, *LIBRARY])
def test_features_have_the_agreed_shapes_and_crops_are_independent(trunk: str) -> None:
    """The contract of `Features`, `last_blocks` and `stage_maps`, and crops that do not see each other."""
    config = config_of(trunk, "esvit", model__drop_path=0.0, objective__regions=False)
    built = build_trunk(config).eval()
    initialize(built, 0)
    crops = [x[:2] for x in crops_of(config)]
    with torch.no_grad():
        features = built(crops)
        alone = [built([x[i : i + 1]]) for x in crops for i in range(len(x))]
        maps = built.last_blocks(crops, 2)
        stages = built.stage_maps(crops) if built.reductions else []
    assert features.view.shape == (4, built.dim)
    tokens = [h * w for n, h, w in features.grids for _ in range(n)]
    assert features.regions.shape == (sum(tokens), built.dim)
    assert [n for n, _, _ in features.grids] == [2, 2]
    assert built.has_regions == (sum(tokens) > 0)
    torch.testing.assert_close(torch.cat([a.view for a in alone]), features.view, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([a.regions for a in alone]), features.regions, rtol=1e-4, atol=1e-4)
    assert len(maps) == 2
    last = maps[-1]
    if built.has_regions:
        torch.testing.assert_close(last.tokens, features.regions)
    means = torch.stack([t.mean(0) for t in last.tokens.split(tokens)]) if last.view is None else last.view
    torch.testing.assert_close(means, features.view, rtol=1e-4, atol=1e-5)
    assert len(stages) == len(built.reductions) == len(built.channels)
    for (stage, grids, _), channels, reduction in zip(stages, built.channels, built.reductions, strict=True):
        assert grids == [(2, -(-64 // reduction), -(-64 // reduction)), (2, -(-32 // reduction), -(-32 // reduction))]
        assert stage.shape == (sum(n * h * w for n, h, w in grids), channels)


@pytest.mark.parametrize("trunk", FAMILIES)
def test_stochastic_depth_of_a_crop_does_not_depend_on_the_batch(trunk: str) -> None:
    """What is dropped for a crop depends on its key, not on who else is in the batch."""
    config = config_of(trunk, "esvit", model__drop_path=0.5, objective__regions=False)
    built = build_trunk(config).eval()  # batch norm must not mix the crops
    initialize(built, 0)
    x = crops_of(config)[0][:6]
    keys = drop_keys(1, 2, torch.arange(6), 1)
    with torch.no_grad():
        together, alone = (
            built([x], keys).view,
            torch.cat([built([x[i : i + 1]], keys[i : i + 1]).view for i in range(6)]),
        )
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("conformance") / "shards")


def pretrain(config: Config, data: Path, run: Path, **train: Any) -> list[dict[str, Any]]:
    """Four real steps; the rows of metrics.jsonl."""
    values = config.model_dump(mode="json")
    values["run_dir"], values["data"]["train"] = str(run), str(data)
    values["train"] |= {"steps": 4, "checkpoint_every": 2, "keep_checkpoints": 4, "global_batch": IMAGES, **train}
    assert pretraining.pretrain(configs.validate(values, where="conformance")) == 0
    return tiny.rows(run)


@pytest.mark.slow
@pytest.mark.parametrize("trunk", FAMILIES)
def test_every_trunk_trains_resumes_and_exports(trunk: str, data: Path, tmp_path: Path) -> None:
    """ZeRO 1 and 3, with activation checkpointing by every implementation that the trunk supports: the same four steps. Resumed: the same bit for bit.
    Exported and loaded again: the same features."""
    config = config_of(trunk, "esvit", objective__regions=build_trunk(config_of(trunk, "esvit")).has_regions)
    straight = pretrain(config, data, tmp_path / "straight")
    for ds_config, implementation in ONCE_A_SIZE if trunk in LIBRARY else ONCE if trunk in ALL else FEW:
        rows = pretrain(
            config,
            data,
            tmp_path / f"{ds_config}-{implementation}",
            ds_config=ds_config,
            activation_checkpointing=implementation,
        )
        for row, expected in zip(rows, straight, strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], abs=2e-5), (ds_config, implementation, row["step"])
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "straight", resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000004")
    (resumed / "checkpoints" / "latest").write_text("step-00000002\n")
    (resumed / "summary.json").unlink()
    assert pretrain(config, data, resumed) == straight
    ours, theirs = (
        state.read_weights(step_folders.resolve(resumed)),
        state.read_weights(step_folders.resolve(tmp_path / "straight")),
    )
    for role, tensors in theirs.networks.items():
        for name, tensor in tensors.items():
            assert torch.equal(ours.networks[role][name], tensor), (role, name)
    convert.convert(tmp_path / "straight", tmp_path / "trunk.safetensors", "esvit-scale", "safetensors")
    of_run, of_file = load_backbone(tmp_path / "straight"), load_backbone(tmp_path / "trunk.safetensors")
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(of_file(images), of_run(images), rtol=0, atol=0)
    assert of_run(images).shape == (3, of_run.dim)
    assert all(b.dtype == torch.float32 for b in persistent_buffers(of_run).values())
