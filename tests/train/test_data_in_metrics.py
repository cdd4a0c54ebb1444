"""Bad samples in the records of a run, and the run's end when there are too many."""

import json
from pathlib import Path
from typing import Any

import pytest

from esvit_scale.data import manifest as manifests
from esvit_scale.errors import UserError
from esvit_scale.train import pretraining
from esvit_scale.train.metrics import MetricLogger
from esvit_scale.train.replaced import ReplacedShare
from esvit_scale.train.row_file import read_rows
from tests import tiny


def test_bad_samples_are_counted_and_recorded_across_a_resume(tmp_path: Path) -> None:
    shards = tiny.shards(tmp_path / "set")
    tar = shards / manifests.load(shards).shards[1].name
    offset, size = manifests.read_index(tar)[4].members["png"]
    content = bytearray(tar.read_bytes())
    content[offset : offset + size] = bytes(size)
    tar.write_bytes(content)
    config = tiny.config(tmp_path / "run", shards, train__steps=12, data__workers=1)
    assert pretraining.pretrain(config) == 0
    rows = read_rows(config.run_path / "metrics.jsonl")
    quarantine = read_rows(config.run_path / "quarantine.jsonl")
    assert 2 <= len(quarantine) <= 3  # once an epoch of 4 steps, unless it is among the dropped
    for row in rows:
        assert row["bad_samples"] == sum(bad["step"] <= row["step"] for bad in quarantine)
        assert row["data_wait_s"] >= 0
        assert 0 < row["worker_images_per_s_min"] <= row["worker_images_per_s"]
    assert {bad["shard"] for bad in quarantine} == {tar.name}
    cut = quarantine[0]["step"]
    logger = MetricLogger(config.run_path, 12, active=True)
    logger.open(cut)
    logger.close()
    assert logger.bad == 1


def test_many_replaced_images_stop_the_run_with_the_reason(tmp_path: Path) -> None:
    """With 9 bad images of 36, the run ends after the first epoch, is saved, and gives the reason."""
    shards = tiny.shards(tmp_path / "set")
    for shard in manifests.load(shards).shards[:1]:
        content = bytearray((shards / shard.name).read_bytes())
        for entry in list(manifests.read_index(shards / shard.name))[:9]:
            offset, size = entry.members["png"]
            content[offset : offset + size] = bytes(size)
        (shards / shard.name).write_bytes(content)
    config = tiny.config(tmp_path / "run", shards, train__steps=12)
    with pytest.raises(UserError, match=r"stopped at step 4: .* of the last 32 images .* over 5 %.*not an image"):
        pretraining.pretrain(config)
    summary = json.loads((config.run_path / "summary.json").read_text())
    assert (summary["finished"], summary["step"]) == (False, 4)
    assert (config.run_path / "checkpoints" / "step-00000004").is_dir()


def bad_row(**more: Any) -> dict[str, Any]:
    return {"shard": "x.tar", "key": "k", "reason": "not an image", **more}


@pytest.mark.parametrize(
    ("batch", "epoch_steps", "every", "verdict"),
    [
        (100, 50, 1, False),  # one of 100
        (100, 50, 0, True),  # ten of 100
        (8, 4, 4, False),  # one of 32
        (8, 10**6, 4, False),  # one of 32 of a large set
        (8, 10**6, 2, True),  # one of 16 of a large set
    ],
)
def test_share_of_replaced_images_is_judged_over_its_window(
    batch: int, epoch_steps: int, every: int, verdict: bool
) -> None:
    share, said = ReplacedShare(batch, epoch_steps), []
    for step in range(3000):
        rows = [bad_row()] * (1 if every else 10) if step % max(every, 1) == 0 else []
        aside = [bad_row(used=True), bad_row(stand_in=True), bad_row(key="")]
        share.add(rows + aside)
        if share.problem():
            said.append(step + 1)
    assert bool(said) == verdict
    if said:
        assert said[0] == min(epoch_steps, 10_000 // batch)
