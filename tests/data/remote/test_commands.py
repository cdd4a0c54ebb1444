"""The shards commands on remote sets."""

from pathlib import Path

import pytest
import torch

from esvit_scale import cli
from esvit_scale.data import evaluation, shard_verify
from esvit_scale.data.remote import place
from esvit_scale.data.remote.shard_cache import ShardCache
from tests.data.remote.conftest import remote_copy, small


def test_commands_read_a_remote_set_like_a_local_one(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    told = []
    for place_ in (str(shards), f"file://{shards}"):
        assert cli.main(["shards", "stats", place_, "--json", "--workers", "2"]) == 0
        told.append(capsys.readouterr().out)
        assert cli.main(["shards", "show", place_, "--out", str(tmp_path / f"{len(told)}.png"), "--count", "9"]) == 0
        assert cli.main(["shards", "verify", place_, "--workers", "2"]) == 0
        capsys.readouterr()
    assert told[0] == told[1]
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
    batches = [
        list(evaluation.evaluation_batches(source, 32, 7, workers=workers))
        for source, workers in ((shards, 0), (place.local_folder(f"file://{shards}"), 2))
    ]
    assert [b.keys for b in batches[0]] == [b.keys for b in batches[1]]
    assert all(torch.equal(a.images, b.images) for a, b in zip(*batches, strict=True))


def test_verify_names_every_changed_object(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bucket = remote_copy(shards, tmp_path)
    for name in ("shard-000002.tar", "shard-000005.tar"):
        (bucket / name).write_bytes((bucket / name).read_bytes()[:-1024])
    assert cli.main(["shards", "verify", f"file://{bucket}"]) == 2
    told = capsys.readouterr().err
    assert all(f"file://{bucket}/{name}: " in told for name in ("shard-000002.tar", "shard-000005.tar"))
    assert cli.main(["shards", "verify", f"file://{bucket}", "--repair"]) == 2
    assert "cannot be repaired in place" in capsys.readouterr().err


def test_verify_needs_no_index_of_a_remote_shard(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardCache, "_write_index", lambda *_: None)  # as if the cache had no room for it
    assert shard_verify.verify(small(shards, tmp_path, 20).root) == []


def test_batch_script_refuses_an_address(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["slurm", "submit", "shards", "photos", "s3://bucket/set", "--dry-run"])
    assert "shards create … s3://bucket/set --shard-range I/N" in capsys.readouterr().err
