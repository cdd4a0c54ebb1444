"""What the data did, in a run's records."""

from pathlib import Path

from esvit_scale.data import manifest as manifests
from esvit_scale.train import loop
from esvit_scale.train.metrics import Journal
from esvit_scale.train.row_file import read_rows
from tests import tiny


def test_bad_samples_are_counted_named_and_survive_a_resume(tmp_path: Path) -> None:
    shards = tiny.shards(tmp_path / "set")
    tar = shards / manifests.load(shards).shards[1].name
    offset, size = manifests.read_index(tar)[4].members["png"]
    content = bytearray(tar.read_bytes())
    content[offset : offset + size] = bytes(size)
    tar.write_bytes(content)
    config = tiny.config(tmp_path / "run", shards, train__steps=12, data__workers=1)
    assert loop.pretrain(config) == 0
    rows = read_rows(config.run_path / "metrics.jsonl")
    quarantine = read_rows(config.run_path / "quarantine.jsonl")
    assert 2 <= len(quarantine) <= 3  # once an epoch of 4 steps, unless it is among the dropped
    for row in rows:
        assert row["bad_samples"] == sum(bad["step"] <= row["step"] for bad in quarantine)
        assert row["data_wait_s"] >= 0
        assert 0 < row["worker_images_per_s_min"] <= row["worker_images_per_s"]
    assert {bad["shard"] for bad in quarantine} == {tar.name}
    cut = quarantine[0]["step"]
    journal = Journal(config.run_path, 12, cut, active=True)
    journal.close()
    assert journal.bad == 1
