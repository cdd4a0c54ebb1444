"""Runs that start from weights: what is taken, what is initialised at random, at every ZeRO stage."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esvit_scale.checkpoint import official, safetensors_file, state
from esvit_scale.checkpoint.convert import convert
from esvit_scale.checkpoint.initial_weights import load_initial_weights
from esvit_scale.checkpoint.weights import Weights
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.models.initialize import initialize
from esvit_scale.objective.network import build_network
from esvit_scale.objective.schedules import Schedules
from esvit_scale.parallel import world as worlds
from esvit_scale.train import pretraining
from esvit_scale.train.trainer import Trainer
from tests import tiny
from tests.models.rule import by_hash, fill


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("start") / "shards")


@pytest.fixture(scope="module")
def weights(shards: Path) -> Weights:
    """Student and teacher of the tiny run by rule, and centres."""
    config = tiny.config(shards.parent / "unused", shards)
    teacher, student = build_network(config), build_network(config)
    fill(teacher, by_hash)
    fill(student)
    networks = {"student": _tensors(student), "teacher": _tensors(teacher)}
    return Weights(config, networks, {name: by_hash(name, (64,)).float() for name in ("view.values", "region.values")})


def _tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def _begin(config: Config, folder: Path) -> Weights:
    """Return the state of a fresh run, read back from its checkpoint at step 0."""
    world = worlds.start()
    try:
        trainer = Trainer(config, world, Schedules(config, 4))
        saved = state.save(folder, config, trainer.engines, trainer.objective.extra_state(), {"step": 0})
        return state.read_weights(saved)
    finally:
        worlds.stop()


def _sources(weights: Weights, folder: Path) -> dict[str, Path]:
    state.write_weights(folder / "step", weights)
    official.write(folder / "official.pth", weights)
    safetensors_file.write(
        folder / "all.safetensors", weights._replace(networks={"teacher": weights.networks["teacher"]}), "teacher"
    )
    return {"step": folder / "step", "official": folder / "official.pth", "safetensors": folder / "all.safetensors"}


@pytest.mark.parametrize(
    ("form", "stage"), [("official", "zero1"), ("step", "zero3"), ("safetensors", "zero0"), ("official", "zero3")]
)
def test_student_teacher_and_centres_start_from_the_teacher(
    weights: Weights, shards: Path, tmp_path: Path, form: str, stage: str
) -> None:
    source = _sources(weights, tmp_path)[form]
    config = tiny.config(tmp_path / "run", shards, model__init_from=str(source), train__ds_config=stage)
    begun = _begin(config, tmp_path / "run")
    for network in ("student", "teacher"):
        for name, expected in weights.networks["teacher"].items():
            assert torch.equal(begun.networks[network][name], expected), name
    assert begun.centers.keys() == weights.centers.keys()
    assert all(torch.equal(begun.centers[name], center) for name, center in weights.centers.items())


def test_missing_heads_are_initialised(weights: Weights, shards: Path, tmp_path: Path) -> None:
    convert(_sources(weights, tmp_path)["step"], tmp_path / "trunk.safetensors", "esvit-scale", "safetensors")
    config = tiny.config(
        tmp_path / "run", shards, model__init_from=str(tmp_path / "trunk.safetensors"), objective__prototypes=32
    )
    begun, fresh = _begin(config, tmp_path / "run"), build_network(config)
    initialize(fresh, config.seed)
    for name, p in fresh.named_parameters():
        expected = weights.networks["teacher"][name] if name.startswith("trunk.") else p
        assert torch.equal(begun.networks["student"][name], expected), name
    assert not begun.centers


def test_frozen_gains_are_not_loaded(weights: Weights, shards: Path, tmp_path: Path) -> None:
    """They are no part of such a run's checkpoints, so that a resume would lose them in silence."""
    source = str(_sources(weights, tmp_path)["step"])
    config = tiny.config(
        tmp_path / "run", shards, model__init_from=source, objective__norm_last_layer=True, train__ds_config="zero3"
    )
    left = weights.networks["teacher"].keys() - load_initial_weights(config).values.keys()
    assert left == {f"objective.{head}_head.last_layer.weight_g" for head in ("view", "region")}
    begun = _begin(config, tmp_path / "run")
    name = "objective.view_head.last_layer.weight_v"
    assert torch.equal(begun.networks["student"][name], weights.networks["teacher"][name])
    assert begun.networks["student"][name.replace("weight_v", "weight_g")].unique().tolist() == [1]


def test_run_from_weights_resumes_without_the_source(weights: Weights, shards: Path, tmp_path: Path) -> None:
    source = _sources(weights, tmp_path)["official"]
    options: dict[str, Any] = {"train__steps": 4, "train__checkpoint_every": 2, "model__init_from": str(source)}
    config = tiny.config(tmp_path / "run", shards, **options)
    assert pretraining.pretrain(config) == 0
    assert (
        f"starts from the teacher of {source}: trunk, view head, region head" in (tmp_path / "run/log.txt").read_text()
    )
    losses = [row["loss"] for row in tiny.rows(tmp_path / "run")]
    random = tiny.config(tmp_path / "random", shards, train__steps=4)
    assert pretraining.pretrain(random) == 0
    assert losses[0] != pytest.approx(tiny.rows(tmp_path / "random")[0]["loss"], rel=1e-2)

    source.unlink()
    (tmp_path / "run/checkpoints/latest").write_text("step-00000002\n")
    (tmp_path / "run/summary.json").unlink()
    assert pretraining.pretrain(config) == 0
    assert [row["loss"] for row in tiny.rows(tmp_path / "run")] == losses


def test_unfit_source_is_an_error_before_any_file_is_written(weights: Weights, shards: Path, tmp_path: Path) -> None:
    source = _sources(weights, tmp_path)["step"]
    for options, match in {
        (("model__embed_dim", 32),): r"model.init_from: .*step: .*another architecture: trunk\.\S+: \[16.*and \d+ more",
        (
            ("objective__prototypes", 32),
        ): r"weight_g: \[64, 1\] .* \[32, 1\] in the model; .*; set objective.prototypes",
        (("model__init_from", str(tmp_path / "nowhere")),): "model.init_from: .*nowhere: no such file or folder",
    }.items():
        config = tiny.config(tmp_path / "run", shards, **({"model__init_from": str(source)} | dict(options)))
        with pytest.raises(UserError, match=match):
            pretraining.pretrain(config)
        assert not (tmp_path / "run").exists()


def test_unused_heads_of_the_source_are_ignored(weights: Weights, shards: Path, tmp_path: Path) -> None:
    source = _sources(weights, tmp_path)["safetensors"]
    config = tiny.config(tmp_path / "run", shards, model__init_from=str(source), objective__regions=False)
    begun = _begin(config, tmp_path / "run")
    assert list(begun.centers) == ["view.values"]
    assert not any("region" in name for name in begun.networks["student"])


def test_position_biases_of_swin_v2_are_not_stretched_in_silence(shards: Path, tmp_path: Path) -> None:
    old = tiny.config(tmp_path / "old", shards, model__trunk="swinv2_t")
    tensors = {"teacher": _tensors(build_network(old))}
    safetensors_file.write(tmp_path / "old.safetensors", Weights(old, tensors, {}), "teacher")
    changed = {"model__trunk": "swinv2_t", "model__init_from": str(tmp_path / "old.safetensors"), "model__window": 2}
    with pytest.raises(UserError, match=r"set model.pretrained_windows=\[4,4,2\].* or .*=\[2,2,2\] to stretch"):
        load_initial_weights(tiny.config(tmp_path / "run", shards, **changed))
    kept = tiny.config(tmp_path / "run", shards, **changed, model__pretrained_windows=[4, 4, 2])
    name = "trunk.patch_embed.proj.weight"
    assert torch.equal(load_initial_weights(kept).values[name], tensors["teacher"][name])
