"""Checkpoints under damage: a resume uses an older one or says why it cannot; it never believes what was not written."""

import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esvit_scale import cli
from esvit_scale.checkpoint import state_file, step_folders, storage
from esvit_scale.errors import RestartCanHelp, UserError
from tests import launcher, tiny

STEPS = {"train__steps": 6, "train__checkpoint_every": 2}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 6 steps with checkpoints at 2, 4 and 6, and its config beside it."""
    folder = tmp_path_factory.mktemp("damage")
    config = tiny.config(folder / "run", tiny.shards(folder / "shards"), **STEPS)
    tiny.write_config(folder / "c.yaml", config)
    assert cli.main(["pretrain", str(folder / "c.yaml")]) == 0
    return folder / "run"


@pytest.fixture
def run(straight: Path, tmp_path: Path) -> Path:
    """A copy of the run as if it had been killed right after step 6."""
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    return tmp_path / "run"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("esvit_scale"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def resume(run: Path) -> int:
    """The real command, on a copy of the run in another place."""
    return cli.main(["pretrain", str(run.parent / "c.yaml")])


def with_config(straight: Path, run: Path) -> Path:
    values = (straight.parent / "c.yaml").read_text().replace(str(straight), str(run))
    (run.parent / "c.yaml").write_text(values)
    return run


def flip(path: Path, seed: int = 0) -> None:
    data = bytearray(path.read_bytes())
    generator = random.Random(f"{path.name}{seed}")
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flipped bit": flip,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "NULs": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "folder": to_folder,
    "gone": Path.unlink,
    "dead link": to_link,
    "another step's": lambda path: shutil.copyfile(step(path.parents[2], 4) / path.name, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["state.json", ".metadata", "__0_0.distcp"])
def test_damage_to_any_file_falls_back_to_the_previous_checkpoint(
    run: Path, file: str, damage: str, said: pytest.LogCaptureFixture
) -> None:
    assert {path.name for path in step(run, 6).iterdir()} == {"state.json", ".metadata", "__0_0.distcp"}
    if (file, damage) == (".metadata", "another step's"):
        pytest.skip("the index is the same at every step")
    DAMAGES[damage](step(run, 6) / file)
    assert step_folders.newest_valid(run) == step(run, 4)
    assert "step-00000006 is damaged" in said.text
    for number in (2, 4):
        (step(run, number) / file).unlink()
    with pytest.raises(
        UserError, match=r"every checkpoint is damaged \(3 tried; step-00000006: .*; copy an undamaged one"
    ):
        step_folders.newest_valid(run)


def test_every_flipped_bit_of_state_json_is_detected(straight: Path, tmp_path: Path) -> None:
    original = (step(straight, 6) / "state.json").read_bytes()
    right = state_file.read_state(step(straight, 6))
    generator = random.Random(0)
    refused = 0
    for at in generator.sample(range(len(original)), 400):
        data = bytearray(original)
        data[at] ^= 1 << generator.randrange(8)
        (tmp_path / "state.json").write_bytes(data)
        try:
            assert state_file.read_state(tmp_path) == right, f"byte {at}: {data[at - 20 : at + 20]!r}"
        except UserError:
            refused += 1
    assert refused > 200  # the others hit white space between the values, where a flip changes nothing


@pytest.mark.parametrize(
    ("file", "damage"), [("state.json", "flipped bit"), ("__0_0.distcp", "empty"), (".metadata", "gone")]
)
def test_resume_after_damage_is_bit_exact(straight: Path, run: Path, file: str, damage: str) -> None:
    DAMAGES[damage](step(run, 6) / file)
    assert resume(with_config(straight, run)) == 0
    assert tiny.rows(run) == tiny.rows(straight)
    assert "resumed from" in (run / "log.txt").read_text().split("is damaged")[-1]
    assert step_folders.newest_valid(run) == step(run, 6)  # written again


POINTERS: dict[str, Callable[[Path], Any]] = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "bytes": lambda path: path.write_bytes(b"\xff\x00\x80" * 100),
    "folder": to_folder,
    "dead link": to_link,
    "a missing step": lambda path: path.write_text("step-00000099\n"),
    "outside": lambda path: path.write_text("../../../etc\n"),
    "itself": lambda path: path.write_text(".\n"),
}


@pytest.mark.parametrize("damage", POINTERS)
def test_newest_checkpoint_is_found_without_latest(run: Path, damage: str, said: pytest.LogCaptureFixture) -> None:
    POINTERS[damage](run / "checkpoints" / "latest")
    assert step_folders.newest_valid(run) == step(run, 6)
    assert "latest: " in said.text
    assert "trying the newest of 3 checkpoints" in said.text
    flip(step(run, 6) / "state.json")
    assert step_folders.newest_valid(run) == step(run, 4)


def test_resume_rewrites_a_missing_latest(straight: Path, run: Path) -> None:
    (run / "checkpoints" / "latest").unlink()
    shutil.rmtree(step(run, 6))
    (run / "checkpoints" / "step-notes.txt").write_text("mine")
    (run / "checkpoints" / ".step-00000006.partial").mkdir()  # of a save that was killed
    (run / "checkpoints" / ".step-00000006.partial" / "x").write_bytes(bytes(100))
    assert resume(with_config(straight, run)) == 0
    assert tiny.rows(run) == tiny.rows(straight)
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000002", "step-00000004", "step-00000006", "step-notes.txt"]
    assert (run / "checkpoints" / "latest").read_text() == "step-00000006\n"


def test_latest_is_respected_unless_a_save_is_newer_than_it(run: Path) -> None:
    pointer = run / "checkpoints" / "latest"
    pointer.write_text("step-00000004\n")
    assert step_folders.candidates(run) == [step(run, 4), step(run, 2), step(run, 6)]
    before = (step(run, 6) / "state.json").stat().st_mtime_ns - 1000
    os.utime(pointer, ns=(before, before))  # the process died between the two
    assert step_folders.candidates(run) == [step(run, 6), step(run, 4), step(run, 2)]


def test_format_1_checkpoints_load_and_damage_in_them_is_detected(run: Path) -> None:
    path = step(run, 6) / "state.json"
    old = json.loads(path.read_text()) | {"format_version": 1}
    del old["sha256"], old["data"]
    path.write_text(json.dumps(old, indent=2) + "\n")
    assert step_folders.newest_valid(run) == step(run, 6)
    for field, value in [("data_offset", 8), ("step", 7), ("step", "6"), ("batch_index", -1)]:
        path.write_text(json.dumps(old | {"cursor": old["cursor"] | {field: value}}))
        assert step_folders.newest_valid(run) == step(run, 4), field


def test_run_with_only_damaged_checkpoints_does_not_start_afresh(run: Path) -> None:
    (run / "checkpoints").rename(run / "moved")
    (run / "checkpoints").symlink_to("/nowhere/at/all")
    with pytest.raises(UserError, match="checkpoints: is a link that leads nowhere"):
        step_folders.newest_valid(run)
    (run / "checkpoints").unlink()
    (run / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints: is not a folder"):
        step_folders.newest_valid(run)


def test_unreachable_storage_is_not_treated_as_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> list[str]:
        raise OSError(5, "Input/output error", "__0_0.distcp")

    monkeypatch.setattr(step_folders, "RETRY_DELAYS", (0.01,))
    monkeypatch.setattr(storage, "file_problems", fail)
    with pytest.raises(RestartCanHelp, match=r"no checkpoint could be read \(step-00000006: .*Input/output error"):
        step_folders.newest_valid(run)


@pytest.mark.parametrize("damage", ["gone", "empty", "NULs", "bytes"])
def test_config_yaml_is_restored_from_the_checkpoint(straight: Path, run: Path, damage: str) -> None:
    shutil.rmtree(step(run, 6))
    with_config(straight, run)
    (DAMAGES | POINTERS)[damage](run / "config.yaml")
    if damage != "gone":  # one end-to-end run is enough
        from esvit_scale import config as configs
        from esvit_scale.train import run_dir

        config = configs.load(run.parent / "c.yaml")
        assert run_dir.open_run(config) == (run, False)
        with pytest.raises(UserError):
            run_dir.open_run(config.model_copy(update={"seed": 1}))
        return
    assert resume(run) == 0
    assert tiny.rows(run) == tiny.rows(straight)
    assert (run / "config.yaml").read_text() == (straight / "config.yaml").read_text().replace(str(straight), str(run))


@pytest.mark.slow
def test_all_ranks_fall_back_to_the_same_checkpoint(tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "run", tiny.shards(tmp_path / "shards"), train__ds_config="zero2", **STEPS)
    path = str(tiny.write_config(tmp_path / "c.yaml", config))

    def start() -> tuple[list[int], str]:
        """Return both ranks' exit codes and all that they said."""
        ranks = launcher.start_ranks(2, *launcher.CLI, "pretrain", path)
        errors = "".join(rank.communicate(timeout=200)[1] for rank in ranks)
        return [rank.wait() for rank in ranks], errors

    codes, errors = start()
    assert codes == [0, 0], errors
    straight = tiny.rows(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "checkpoints" / "latest").write_bytes(b"\xff")
    flip(step(tmp_path / "run", 6) / "__1_0.distcp")  # which rank 1 wrote
    (step(tmp_path / "run", 4) / "state.json").unlink()
    codes, errors = start()
    assert codes == [0, 0], errors
    assert "step-00000002 at step 2" in errors
    assert tiny.rows(tmp_path / "run") == straight
    for number in (2, 4, 6):
        (step(tmp_path / "run", number) / ".metadata").unlink()
    (tmp_path / "run" / "summary.json").unlink()
    codes, errors = start()
    assert codes == [2, 2], errors
    assert errors.count("every checkpoint is damaged (3 tried") == 1, errors
