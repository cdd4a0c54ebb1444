"""The record of an upload: a line for each shard, kept when the upload is interrupted or the set is read-only."""

import json
import os
import shutil
from pathlib import Path

import pytest

from esvit_scale.data.remote import store, upload
from tests import tiny


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("local") / "set", samples=30)  # 3 shards of 10


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(store, "REQUESTS_PER_SECOND", 5000)
    return tmp_path / "bucket"


def lines_of(record: Path) -> list[str]:
    return [line for line in record.read_text().splitlines() if line]


def test_record_has_a_line_for_each_shard_and_survives_a_cut(shards: Path, bucket: Path, tmp_path: Path) -> None:
    local = shutil.copytree(shards, tmp_path / "set")
    assert upload.upload(local, f"file://{bucket}") == 3
    [record] = local.glob(".uploaded-*.jsonl")
    lines = lines_of(record)
    assert sorted(json.loads(line)[0] for line in lines) == sorted(path.name for path in local.glob("*.tar"))
    assert upload.upload(local, f"file://{bucket}") == 0
    assert lines_of(record) == lines
    record.write_text("\n".join(lines)[:-20])  # interrupted while the last line was written
    assert upload.upload(local, f"file://{bucket}") == 1
    assert upload.upload(local, f"file://{bucket}") == 0


def test_read_only_set_is_uploaded_and_continued(
    shards: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, access = sorted(shards.iterdir()), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != shards and access(path, mode))
    assert [upload.upload(shards, f"file://{bucket}") for _ in range(2)] == [3, 0]
    assert sorted(shards.iterdir()) == before
    [record] = tmp_path.glob("esvit-scale-*/.uploaded-*.jsonl")
    assert len(lines_of(record)) == 3
