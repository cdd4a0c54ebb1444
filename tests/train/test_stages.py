"""Training stages: one run, whose stages begin with the weights of the one before; exact over every interruption."""

import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_scale import cli
from esvit_scale import config as configs
from esvit_scale.checkpoint import carried, state, state_file, step_folders
from esvit_scale.checkpoint.weights import network_shapes
from esvit_scale.config import Config
from esvit_scale.data.stream import MicroBatch
from esvit_scale.errors import UserError
from esvit_scale.objective.schedules import Schedules, of_stages
from esvit_scale.parallel import world as worlds
from esvit_scale.train import pretraining, run_dir, run_records, signals
from esvit_scale.train.trainer import Trainer
from tests import launcher, tiny
from tests.checkpoint.test_positions import slowly

FIRST = {"train.steps": 6}
# Larger crops and windows, another batch and rate, and a region head that stage 0 does not have.
SECOND = {
    "train.steps": 6,
    "data.global_crops.size": 64,
    "data.local_crops.0.size": 32,
    "model.window": 8,
    "train.global_batch": 4,
    "optim.lr": 2e-3,
    "objective.regions": True,
}
COMMON = {"objective__regions": False, "train__checkpoint_every": 2, "train__keep_checkpoints": 20}


def staged(run: Path, data: Path, *stages: dict[str, Any], **overrides: Any) -> Config:
    return tiny.config(run, data, stages=list(stages or (FIRST, SECOND)), **COMMON, **overrides)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    assert pretraining.pretrain(staged(run, data)) == 0
    return run


@pytest.mark.slow
def test_run_of_two_stages_has_one_record(data: Path, straight: Path) -> None:
    rows = tiny.rows(straight)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["stage"] for row in rows] == [0] * 6 + [1] * 6
    assert [row["images_seen"] for row in rows] == [*range(8, 49, 8), *range(52, 73, 4)]
    assert rows[6]["lr"] == 0 < rows[7]["lr"]  # a warm-up of its own
    assert ["loss_region" in row for row in rows[5:7]] == [False, True]
    summary = run_records.read_summary(straight)
    assert (summary["finished"], summary["step"], summary["total_steps"]) == (True, 12, 12)
    assert configs.load(straight / "config.yaml") == staged(straight, data)
    of_steps = {step: state_file.read_state(straight / "checkpoints" / f"step-{step:08d}") for step in (6, 8)}
    assert [of_steps[step]["config"]["model"]["window"] for step in (6, 8)] == [4, 8]
    assert of_steps[8]["cursor"]["batch_index"] == 2 * 9 + 2  # stage 0 began two epochs; 9 batches of 4 in 36 images


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 6])
def test_resumed_run_equals_uninterrupted_run(data: Path, straight: Path, tmp_path: Path, step: int) -> None:
    """In stage 0, and between the stages."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "summary.json").unlink()
    for folder in step_folders.list_step_folders(run):
        if (step_folders.step_of(folder) or 0) > step:
            shutil.rmtree(folder)
    assert pretraining.pretrain(staged(run, data)) == 0
    assert tiny.rows(run) == tiny.rows(straight)


@pytest.mark.slow
def test_killed_run_goes_on_in_its_stage(data: Path, straight: Path, tmp_path: Path) -> None:
    """A process that is killed in stage 1 leaves what the next start needs."""
    run = tmp_path / "run"
    path = tiny.write_config(tmp_path / "c.yaml", staged(run, data))
    process = launcher.start_cli("pretrain", str(path))
    while len(tiny.rows(run)) < 9 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not run_records.read_summary(run).get("finished")
    assert pretraining.pretrain(staged(run, data)) == 0
    assert tiny.rows(run) == tiny.rows(straight)


@pytest.mark.slow
def test_signal_in_a_later_stage_asks_for_a_requeue(
    data: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's batch script requeues the job when it finds the marker, and the same command goes on in stage 1."""
    run = tmp_path / "run"
    path = tiny.write_config(tmp_path / "c.yaml", staged(run, data))
    record = Trainer._record

    def stopped_at_step_9(trainer: Trainer, *arguments: Any) -> None:
        record(trainer, *arguments)
        if trainer.step == 9:
            signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(Trainer, "_record", stopped_at_step_9)
    with signals.installed():
        assert cli.main(["pretrain", str(path)]) == 0
    assert (run / "requeue").read_text() in ("9\n", "10\n")
    assert run_records.read_summary(run)["finished"] is False
    monkeypatch.undo()
    assert cli.main(["pretrain", str(path)]) == 0
    assert tiny.rows(run) == tiny.rows(straight)
    assert not (run / "requeue").exists()


@pytest.mark.slow
def test_last_stage_made_longer_and_a_stage_added(data: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    with pytest.raises(UserError, match=r"stages\.0\.train\.steps: 6 → 7"):
        pretraining.pretrain(staged(run, data, FIRST | {"train.steps": 7}, SECOND))
    with pytest.raises(UserError, match=r"stages\.1\.optim\.lr: 0\.002 → 0\.1"):
        pretraining.pretrain(staged(run, data, FIRST, SECOND | {"optim.lr": 0.1}))
    further = staged(run, data, FIRST, SECOND, {"train.steps": 1, "data.global_crops.size": 32})
    assert run_dir.is_longer(staged(run, data), further)
    assert run_dir.is_longer(staged(run, data), staged(run, data, FIRST, SECOND | {"train.steps": 7}))
    assert pretraining.pretrain(further) == 0
    assert [row["stage"] for row in tiny.rows(run)] == [0] * 6 + [1] * 6 + [2]


# --- what is carried over --------------------------------------------------------------------------------------------


def values_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return what a checkpoint would hold of student and teacher, as whole tensors."""
    engines = trainer.engines
    snapshot = state.take_snapshot(trainer.config, engines, {}, {"step": 0})
    whole = {name: part for name, part in snapshot.intervals.items() if name.startswith(("student/", "ema/"))}
    return {name: part.values.detach().clone() for name, part in whole.items()}


@pytest.mark.parametrize(
    "zero", ["zero0", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("zero1", "zero2", "zero3"))]
)
def test_next_stage_begins_with_the_weights_of_the_one_before(tmp_path: Path, zero: str) -> None:
    """Student, teacher and centres are the same bit for bit, tables are resized, a new head and the optimizer are new."""
    config = staged(tmp_path / "run", tmp_path, train__ds_config=zero, optim__freeze_last_layer_epochs=0)
    first, second = of_stages(config.of_stages, [4, 9])
    world = worlds.start()
    try:
        before = Trainer(first.config, world, first)
        for _ in range(3):
            crops = [torch.randn(16, 3, 32, 32), torch.randn(32, 3, 16, 16)]
            assert before.train_step([MicroBatch(crops, torch.arange(8))]).applied
        cursor = {"step": 6, "optimizer_step": 3, "batch_index": 6, "data_offset": 0, "images_seen": 48}
        folder = state.save(tmp_path / "run", first.config, before.engines, before.objective.extra_state(), cursor)
        old = values_of(before)
        after = Trainer(second.config, world, second, fresh=False)
        at_random = values_of(after)
        assert "tables resized: 2 of 3×3 to 7×7, 2 of 7×7 to 15×15" in after._restore(folder)
        new = values_of(after)
        assert (after.step, after.optimizer_step, after.step + after.data_offset) == (6, 3, 18)
        assert not torch.equal(old["student/trunk.norm.weight"], old["ema/trunk.norm.weight"])
        tables = 0
        for name, value in new.items():
            if "region_head" in name:
                assert torch.equal(value, at_random[name]), name
            elif len(value) == len(old[name]):
                assert torch.equal(value, old[name]), name
            else:
                layer = int(name.split("layers.")[1][0])
                table = slowly(old[name].view(-1, 2**layer), *((3, 7) if layer == 2 else (7, 15)))
                torch.testing.assert_close(value.double(), table.flatten(), rtol=0, atol=1e-6)
                tables += 1
        assert tables == 2 * 4  # one a block, of student and teacher
        assert not any(after.engines.optimizer.state.get(p.flat) for p in after.engines.partitions)
        centers = after.objective.extra_state()
        assert torch.equal(centers["view.values"], before.objective.extra_state()["view.values"])
        assert "region.values" not in centers
        for p, working in zip(after.engines.partitions, after.engines.student.module.parameters(), strict=False):
            if zero != "zero3":
                assert torch.equal(working.detach().flatten()[p.start : p.start + p.length], p.master), p.name
    finally:
        worlds.stop()


TWICE = {"data.global_crops.size": 64, "data.local_crops.0.size": 32}
V2 = {"model__trunk": "swinv2_t"}
VIL = {"model__trunk": "vil_2262", "model__embed_dim": 8, "model__depths": [1] * 4, "model__heads": [1, 1, 2, 4]}
VIL |= {"model__window": 3, "data__global_crops__size": 32, "data__local_crops": [{"size": 32, "count": 4}]}


@pytest.mark.parametrize(
    ("own", "changes", "note"),
    [
        ({}, {"model.window": 8}, "2 of 3×3 to 7×7, 2 of 7×7 to 15×15"),
        (V2, {"model.window": 8, "model.pretrained_windows": [4, 4, 2]}, ""),
        (VIL, {}, "1 of 1×1 to 3×3, 1 of 3×3 to 7×7"),
        ({"model__trunk": "resnet50", **dict.fromkeys(("model__embed_dim", "model__depths", "model__heads"))}, {}, ""),
    ],
    ids=["swin", "swin v2", "vil", "resnet"],
)
def test_trunks_that_go_on_at_larger_crops(own: dict[str, Any], changes: dict[str, Any], note: str) -> None:
    config = staged(Path("run"), Path("data"), FIRST, {"train.steps": 2, **TWICE, **changes}, **own)
    carried.check(config.of_stages)
    shapes = [network_shapes(one) for one in config.of_stages]
    assert (f"position tables resized: {note}" if note else "each its own") in carried.compare("here", *shapes).note


def test_windows_of_a_position_network_change_only_on_request() -> None:
    second = {"train.steps": 2, **TWICE, "model.window": 8}
    with pytest.raises(UserError) as error:
        carried.check(staged(Path("run"), Path("data"), FIRST, second, **V2).of_stages)
    assert "set model.pretrained_windows=[4,4,2] so that" in str(error.value)
    assert "or model.pretrained_windows=[8,8,4] to stretch" in str(error.value)
    with pytest.raises(UserError, match=r"model\.pretrained_windows: 2 stages, but swinv2_t has 3"):
        carried.check(
            staged(Path("r"), Path("d"), FIRST, second | {"model.pretrained_windows": [4, 4]}, **V2).of_stages
        )
    with pytest.raises(UserError, match=r"model\.pretrained_windows: is for Swin V2, and swin_t is none; leave it out"):
        carried.check(staged(Path("r"), Path("d"), FIRST, second | {"model.pretrained_windows": [4, 4, 2]}).of_stages)


def test_schedules_of_stages_are_those_of_runs_of_their_own() -> None:
    config = staged(Path("run"), Path("data"), FIRST | {"train.steps": 10}, SECOND | {"train.steps": 8})
    first, second = of_stages(config.of_stages, [4, 9])
    alone = Schedules(config.of_stages[1], 9)
    assert (second.first_step, second.last_step, second.run_steps, first.run_steps) == (10, 18, 18, 18)
    assert (second.first_batch, second.images_seen(11)) == (27, 84)  # three epochs were begun
    for name in ("lr", "trunk_lr", "weight_decay", "ema_momentum", "teacher_temp", "last_layer_frozen", "trunk_frozen"):
        values = [getattr(second, name)(10 + step) for step in range(8)]
        assert values == [getattr(alone, name)(step) for step in range(8)], name


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "problem"),
    [
        ({}, "stages.1: needs its length, train.epochs or train.steps"),
        ({"train.steps": 0}, "stages.1: train.steps: must be ≥ 1, got 0; nearest: 1"),
        ({"train.steps": 1, "train.epochs": 1}, "stages.1: has two lengths"),
        ({"train.steps": 1, "model.windw": 8}, "stages.1: unknown key model.windw; did you mean 'model.window'?"),
        ({"train.steps": 1, "model.trunk": "swin_b"}, "stages.1: model.trunk: cannot change between stages"),
        (
            {"train.steps": 1, "objective.prototypes": 32},
            "stages.1: objective.prototypes: cannot change between stages",
        ),
        ({"train.steps": 1, "name": "b"}, "stages.1: name: cannot change between stages"),
        ({"train.steps": 1, "data.local_crops.1.size": 8}, "'1' is not an item of a list of 1; use 0 to 0"),
        ({"train.steps": 1, "train.global_batch": 7, "data.slots": 4}, "stages.1: data.slots: 4 does not divide"),
    ],
)
def test_bad_stage_is_one_line(tmp_path: Path, stage: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError) as error:
        staged(tmp_path, tmp_path, FIRST, stage)
    assert problem in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_overrides_reach_the_stages(tmp_path: Path) -> None:
    path = tiny.write_config(tmp_path / "c.yaml", staged(tmp_path, tmp_path))
    config = configs.resolve(
        str(path), ["stages.1.train.steps=9", "stages.0.data.local_crops.0.count=2", "optim.clip=1"]
    )
    first, second = config.of_stages
    assert (second.train.steps, second.data.local_crops[0].count, second.data.local_crops[0].size) == (9, 2, 32)
    assert first.optim.clip == second.optim.clip == 1
    assert first.stages == second.stages == []
    nested = [{"train": {"steps": 6}}, {"train": {"steps": 9}, "optim.lr": 1.0, "data": {"global_crops": {"size": 64}}}]
    as_written = staged(tmp_path, tmp_path, *nested)
    assert as_written.stages[1] == {"train.steps": 9, "optim.lr": 1.0, "data.global_crops.size": 64}
    for override, problem in {
        "train.steps=3": "train.steps=3: the stages of this config set it; give stages.0.train.steps",
        "stages.2.train.steps=3": "there is no stage 2; the config has stages 0 to 1",
    }.items():
        with pytest.raises(UserError, match=problem):
            configs.resolve(str(path), [override])


def test_stage_that_does_not_fit_is_found_before_the_first_step(tmp_path: Path) -> None:
    """Whether tensors fit is known from their shapes."""
    stages = staged(tmp_path, tmp_path).of_stages
    carried.check(stages)
    focal = {"model__trunk": "focal_t", "model__window": 7, "model__depths": [1, 1, 1, 1], "model__heads": [1, 1, 1, 1]}
    config = staged(tmp_path, tmp_path, FIRST, SECOND | {"model.window": 9}, **focal, data__global_crops__size=224)
    with pytest.raises(UserError, match=r"stages\.1: cannot start from the stage before: trunk\.layers"):
        carried.check(config.of_stages)
