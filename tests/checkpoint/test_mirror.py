"""Checkpoints in an object store; fsspec's local file system stands for the store."""

import shutil
import time
from pathlib import Path

import pytest

from esvit_scale import config as configs
from esvit_scale.checkpoint import mirror
from esvit_scale.config import Config
from esvit_scale.data.remote.store import StoreUnreachable
from esvit_scale.errors import UserError
from esvit_scale.train import pretraining, row_file
from tests import tiny


def config(tmp_path: Path, **overrides: object) -> Config:
    data = tmp_path / "set"
    return tiny.config(tmp_path / "run", data, train__mirror=f"file://{tmp_path}/store", **overrides)


def step_folder(run: Path, step: int, content: bytes) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    (folder / "student").mkdir(parents=True)
    (folder / "student" / "rank0").write_bytes(content)
    (folder / "state.json").write_text("{}")
    (run / "config.yaml").write_text(f"step: {step}")
    return folder


def sent(tmp_path: Path) -> set[str]:
    store = tmp_path / "store" / "run"
    return {path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file()}


def test_newest_checkpoint_is_sent_and_restored_and_old_ones_leave(tmp_path: Path) -> None:
    c = config(tmp_path)
    with mirror.sending(c, active=True) as send:
        for step in (10, 20, 30):
            send(step_folder(tmp_path / "run", step, b"%d" % step * 1000))
            time.sleep(0.2 if step == 10 else 0)
            if step == 10:
                shutil.rmtree(tmp_path / "run/checkpoints/step-00000010")
    assert (tmp_path / "store/run/latest").read_text() == "step-00000030\n"
    assert not any("step-00000010" in name for name in sent(tmp_path))
    shutil.rmtree(tmp_path / "run")
    mirror.restore(c)
    folder = tmp_path / "run/checkpoints/step-00000030"
    assert (folder / "student/rank0").read_bytes() == b"30" * 1000
    assert (tmp_path / "run/config.yaml").read_text() == "step: 30"
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000030\n"
    (folder / "student/rank0").write_bytes(b"mine")
    mirror.restore(c)  # what is there stays
    assert (folder / "student/rank0").read_bytes() == b"mine"


def test_damaged_mirror_leaves_no_run_dir_with_a_part_of_it(tmp_path: Path) -> None:
    c = config(tmp_path)
    mirror.restore(c)  # an empty mirror: a new run
    assert not (tmp_path / "run").exists()
    with mirror.sending(c, active=True) as send:
        send(step_folder(tmp_path / "run", 10, b"x" * 1000))
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "store/run/checkpoints/step-00000010/student/rank0").write_bytes(b"y" * 1000)
    with pytest.raises(UserError, match="rank0: is not what was sent"):
        mirror.restore(c)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


def test_failing_mirror_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise StoreUnreachable("s3://bucket/x: gone")

    monkeypatch.setattr(mirror, "_send", fail)
    with mirror.sending(config(tmp_path), active=True) as send:
        send(tmp_path)
    assert "train.mirror: s3://bucket/x: gone; the run goes on" in caplog.text


def test_mirror_must_be_an_address_without_secrets() -> None:
    for place, why in (("/data/mirror", "no address"), ("https://u:hush@h/x", "user name or password")):
        with pytest.raises(UserError, match=rf"train\.mirror: .*{why}"):
            configs.validate({"train": {"mirror": place}}, where="test")


@pytest.mark.slow
def test_run_whose_disk_is_lost_resumes_from_the_mirror(tmp_path: Path) -> None:
    tiny.shards(tmp_path / "set")
    c = config(tmp_path, train__steps=8, train__checkpoint_every=4)
    assert pretraining.pretrain(c) == 0
    whole = [row["loss"] for row in row_file.read_rows(tmp_path / "run/metrics.jsonl")]
    assert len(whole) == 8
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "store/run/latest").write_text("step-00000004\n")  # as if the run had ended there
    assert pretraining.pretrain(c) == 0
    assert [row["loss"] for row in row_file.read_rows(tmp_path / "run/metrics.jsonl")] == whole
