import json
import logging
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from esvit_scale.checkpoint import state, state_file, step_folders, storage
from esvit_scale.errors import UserError
from esvit_scale.objective.schedules import Schedules
from esvit_scale.parallel import world as worlds
from esvit_scale.train import pretraining
from esvit_scale.train.trainer import Trainer
from tests import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    config = tiny.config(folder / "run", tiny.shards(folder / "shards"), train__steps=6, train__checkpoint_every=2)
    assert pretraining.pretrain(config) == 0
    return folder / "run"


def test_retention_keeps_the_last_and_latest_names_the_newest(run: Path) -> None:
    kept = sorted(folder.name for folder in (run / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000002", "step-00000004", "step-00000006"]
    assert step_folders.latest(run) == run / "checkpoints" / "step-00000006"


def test_load_teacher_returns_the_ema_without_a_process_group(run: Path) -> None:
    trunk, config = state.load_teacher(run)
    folder = step_folders.resolve(run)
    for name, p in trunk.named_parameters():
        stored = torch.zeros(p.numel())
        storage.load(folder, {f"ema/trunk.{name}": storage.whole_interval(stored)}, single_process=True)
        assert torch.equal(p.detach().flatten(), stored), name
    assert config.name == "tiny"
    features = trunk([torch.randn(2, 3, 32, 32)])
    assert features.view.shape == (2, trunk.dim)
    assert torch.isfinite(features.view).all()


def test_other_architecture_is_refused_and_nothing_is_loaded(run: Path, tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "run", tmp_path / "shards", model__embed_dim=32)
    world = worlds.start()
    try:
        trainer = Trainer(config, world, Schedules(config, 4))
        before = [p.master.clone() for p in trainer.engines.partitions]
        with pytest.raises(
            UserError,
            match=r"another architecture: trunk\.\S+: \[16.* in the checkpoint, \[32.* in the model.*and \d+ more",
        ):
            state.restore(step_folders.resolve(run), trainer.engines, {})
        assert all(torch.equal(a, p.master) for a, p in zip(before, trainer.engines.partitions, strict=True))
    finally:
        worlds.stop()


def test_index_with_code_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    (tmp_path / storage.INDEX_FILE).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="no checkpoint of esvit-scale contains"):
        storage.tensor_sizes(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("damage", ["empty", "garbage", "missing"])
def test_damaged_index_is_one_error_line(tmp_path: Path, damage: str) -> None:
    if damage != "missing":
        (tmp_path / storage.INDEX_FILE).write_bytes(b"" if damage == "empty" else b"\x80\x04garbage")
    with pytest.raises(UserError, match=r"missing|damaged"):
        storage.tensor_sizes(tmp_path)


def test_folder_that_is_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        state.load_teacher(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"not a checkpoint \(no state.json\)"):
        state.load_teacher(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has no checkpoint yet"):
        state.load_teacher(tmp_path)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000009\n")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        state.load_teacher(tmp_path)


def test_newer_format_is_refused(run: Path, tmp_path: Path) -> None:
    newer = json.loads((step_folders.resolve(run) / "state.json").read_text()) | {"format_version": 99}
    (tmp_path / "state.json").write_text(json.dumps(newer))
    with pytest.raises(UserError, match="format version 99; this version of esvit-scale reads 1 and 2"):
        state_file.read_state(tmp_path)


def test_intervals_load_at_other_partitions(tmp_path: Path) -> None:
    """What was written whole is read in any pieces."""
    tensor = torch.randn(13)
    storage.save(tmp_path / "c", {"x": storage.whole_interval(tensor)})
    assert storage.tensor_sizes(tmp_path / "c") == {"x": 13}
    for start, stop in [(0, 13), (0, 5), (5, 13), (12, 13)]:
        part = torch.zeros(stop - start)
        storage.load(tmp_path / "c", {"x": storage.Interval(part, start, 13)})
        assert torch.equal(part, tensor[start:stop])


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "file gone", "state gone"])
def test_damaged_checkpoint_falls_back_to_the_previous_with_a_warning(
    run: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    newest = copy / "checkpoints" / "step-00000006"
    file = next(newest.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    if damage == "flipped bit":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "cut short":
        file.write_bytes(data[:-10])
    elif damage == "file gone":
        file.unlink()
    else:
        (newest / "state.json").unlink()
    logging.getLogger("esvit_scale").propagate = True
    with caplog.at_level(logging.WARNING):
        assert step_folders.newest_valid(copy) == copy / "checkpoints" / "step-00000004"
    assert "step-00000006 is damaged" in caplog.text
    for folder in (copy / "checkpoints").glob("step-*"):
        (folder / "state.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        step_folders.newest_valid(copy)


def test_newest_undamaged_checkpoint_is_used(run: Path) -> None:
    assert step_folders.newest_valid(run) == run / "checkpoints" / "step-00000006"


def test_keep_every_is_never_pruned(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in range(1, 11):
        (checkpoints / f"step-{step:08d}").mkdir(parents=True)
    config = tiny.config(tmp_path / "run", tmp_path, train__keep_checkpoints=2, train__keep_every=4)
    step_folders.prune(checkpoints / "step-00000010", config)
    assert sorted(int(f.name[5:]) for f in checkpoints.iterdir()) == [4, 8, 9, 10]
