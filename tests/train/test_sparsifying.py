"""`esvit-scale sparsify`: what it fills in and refuses, and its runs: ZeRO stages, ranks, resume, evaluation and export."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esvit_scale import cli
from esvit_scale import config as configs
from esvit_scale.checkpoint import convert, safetensors_file, state, step_folders
from esvit_scale.checkpoint.backbone import load_backbone
from esvit_scale.checkpoint.weights import TRUNK, Weights
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.models.initialize import initialize
from esvit_scale.models.registry import build_trunk
from esvit_scale.objective.network import build_network
from esvit_scale.objective.param_groups import lr_scale, optimizer_groups
from esvit_scale.train import pretraining, sparsifying
from tests import launcher, tiny

STEPS, SAVE = 6, 3
MODELS = {
    "vit": {"trunk": "deit_s", "embed_dim": 16, "depths": [4], "heads": [2]},
    "swin": {"trunk": "swin_t", "embed_dim": 8, "depths": [1, 1, 3], "heads": [1, 2, 4], "window": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled shards `data`, and dense weights `vit.safetensors` and `swin.safetensors`."""
    folder = tmp_path_factory.mktemp("sparsifying")
    tiny.shards(folder / "data")
    for name, model in MODELS.items():
        config = tiny.model_config(model, 64)
        trunk = build_trunk(config)
        initialize(trunk, 0)
        tensors = {TRUNK + key: value.clone() for key, value in trunk.state_dict().items()}
        safetensors_file.write(folder / f"{name}.safetensors", Weights(config, {"teacher": tensors}, {}), "teacher")
    return folder


def overrides(folder: Path, run: Path, **changes: Any) -> list[str]:
    values = {
        "run_dir": run,
        "data.train": folder / "data",
        "data.workers": 0,
        "optim.lr": 3e-2,
        "optim.warmup_epochs": 0.5,
        "train.global_batch": 8,
        "train.steps": STEPS,
        "train.precision": "fp32",
        "train.log_every": 1,
        "train.checkpoint_every": SAVE,
    }
    return [f"{key}={value}" for key, value in (values | {k.replace("__", "."): v for k, v in changes.items()}).items()]


def config(folder: Path, run: Path, kind: str = "vit", labels: bool = False, **changes: Any) -> Config:
    weights = str(folder / f"{kind}.safetensors")
    name = "sparsify" if kind == "vit" else "sparsify_swin"
    return sparsifying.resolve(weights, name, overrides(folder, run, **changes), keep=0.5, labels=labels)


# --- the config ------------------------------------------------------------------------------------------------------


def test_config_takes_the_trunk_from_the_weights(folder: Path, tmp_path: Path) -> None:
    found = config(folder, tmp_path)
    assert (found.model.trunk, found.model.depths, found.model.keep) == ("sparse:deit_s", [4], 0.5)
    assert found.model.init_from == found.objective.teacher == str(folder / "vit.safetensors")
    assert (found.crop_sizes, found.objective.classes) == ([64, 64], 0)
    labelled = config(folder, tmp_path, labels=True)
    assert (labelled.crop_sizes, labelled.objective.class_names) == ([64], ["a", "b", "c"])


def test_mistakes_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        assert cli.main(["sparsify", *arguments]) == 2
        return capsys.readouterr().err.strip()

    given = overrides(folder, tmp_path / "run")
    vit = str(folder / "vit.safetensors")
    assert "CHECKPOINT: nowhere: no such file or folder" in said("nowhere", *given)
    assert "is no config of a sparsification; take the preset sparsify" in said(vit, "--config", "swin_t", *given)
    assert "data.train: not set" in said(vit)
    sparse = tmp_path / "sparse.safetensors"
    trunk = build_trunk(tiny.model_config(MODELS["vit"] | {"trunk": "sparse:deit_s", "keep": 0.5}, 64))
    tensors = {TRUNK + key: value.clone() for key, value in trunk.state_dict().items()}
    of_sparse = tiny.model_config(MODELS["vit"] | {"trunk": "sparse:deit_s", "keep": 0.5}, 64)
    safetensors_file.write(sparse, Weights(of_sparse, {"teacher": tensors}, {}), "teacher")
    assert "is sparse already (keep 0.5); name the dense weights" in said(str(sparse), *given)
    assert not (tmp_path / "run").exists()


def test_added_layers_learn_at_the_whole_rate(folder: Path, tmp_path: Path) -> None:
    found = config(folder, tmp_path, "swin", labels=True)
    with torch.device("meta"):
        network = build_network(found.model_copy(update={"objective": found.objective}))
    groups = optimizer_groups(network, network.trunk, found.optim)
    rates = {name: lr_scale(group, network.trunk, found.optim) for group, names in groups.items() for name in names}
    assert {rate for name, rate in rates.items() if "predictors" in name or ".short." in name} == {1.0}
    assert {rate for name, rate in rates.items() if name.startswith("objective.")} == {1.0}
    others = {rate for name, rate in rates.items() if name.startswith("trunk.") and rate < 1}
    assert others == {found.optim.trunk_rate} == {0.2}
    assert rates["trunk.layers.2.blocks.1.mlp.fc1.weight"] == 0.2


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A finished run of the ViT at ZeRO 1, started by the command."""
    given = overrides(folder, folder / "run")
    assert cli.main(["sparsify", str(folder / "vit.safetensors"), "--keep", "0.5", *given]) == 0
    return folder / "run"


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_is_the_same_at_zero_3(folder: Path, run: Path, tmp_path: Path) -> None:
    straight = tiny.rows(run)
    assert [row["step"] for row in straight] == list(range(1, STEPS + 1))
    assert {"loss_view", "loss_tokens", "loss_ratio", "kept_1", "kept_3"} <= set(straight[-1])
    resumed = tmp_path / "resumed"
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"step-{STEPS:08d}")
    (resumed / "checkpoints" / "latest").write_text(f"step-{SAVE:08d}\n")
    (resumed / "summary.json").unlink()
    assert pretraining.pretrain(config(folder, resumed)) == 0
    assert tiny.rows(resumed) == straight
    ours, theirs = (state.read_weights(step_folders.resolve(path)) for path in (resumed, run))
    for role, tensors in theirs.networks.items():
        for name, tensor in tensors.items():
            assert torch.equal(ours.networks[role][name], tensor), (role, name)
    changes = {"train__ds_config": "zero3", "train__activation_checkpointing": "deepspeed"}
    assert pretraining.pretrain(config(folder, tmp_path / "zero3", **changes)) == 0
    for row, expected in zip(tiny.rows(tmp_path / "zero3"), straight, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=2e-5), row["step"]


@pytest.mark.slow
@pytest.mark.long
def test_two_ranks_train_like_one(folder: Path, run: Path, tmp_path: Path) -> None:
    """At ZeRO 3; the sums of two ranks are taken in another order."""
    given = overrides(folder, tmp_path / "two", train__ds_config="zero3")
    arguments = ["sparsify", str(folder / "vit.safetensors"), "--keep", "0.5", *given]
    launcher.run(*launcher.CLI, *arguments, ranks=2)
    for row, expected in zip(tiny.rows(tmp_path / "two"), tiny.rows(run), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=2e-5), row["step"]
        assert row["kept_1"] == pytest.approx(expected["kept_1"], abs=1e-6)


@pytest.mark.slow
def test_the_trained_trunk_is_evaluated_and_exported_sparse(folder: Path, run: Path, tmp_path: Path) -> None:
    trained = load_backbone(run)
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        kept = trained.trunk([images]).kept
    assert kept is not None
    assert [mask.view(3, 16).sum(1).tolist() for mask in kept.masks] == [[8] * 3, [4] * 3, [2] * 3]
    convert.convert(run, tmp_path / "sparse.safetensors", "esvit-scale", "safetensors")
    exported = load_backbone(tmp_path / "sparse.safetensors")
    with torch.no_grad():
        assert torch.equal(exported(images), trained(images))
    out = tmp_path / "features.npz"
    assert (
        cli.main(
            ["embed", "--checkpoint", str(run), "--data", str(folder / "data"), "--out", str(out), "--workers", "0"]
        )
        == 0
    )
    assert np.isfinite(np.load(out)["features"]).all()
    for form, message in (("huggingface", "no form of"), ("esvit", "the official code has no trunk")):
        with pytest.raises(UserError, match=message):
            convert.convert(run, tmp_path / f"of-{form}{'.pth' * (form == 'esvit')}", "esvit-scale", form)


@pytest.mark.slow
def test_a_swin_with_labels_trains(folder: Path, tmp_path: Path) -> None:
    assert pretraining.pretrain(config(folder, tmp_path, "swin", labels=True, train__precision="bf16")) == 0
    assert all(np.isfinite(row["loss"]) and "train_top1" in row for row in tiny.rows(tmp_path))
    assert configs.load(tmp_path / "config.yaml").model.trunk == "sparse:swin_t"
