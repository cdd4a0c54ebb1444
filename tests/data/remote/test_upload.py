"""Uploads of a set, and their record: a line for each shard, kept when one is interrupted or the set is read-only."""

import json
import os
import shutil
from pathlib import Path

import pytest

from esvit_scale.data import checksums
from esvit_scale.data import manifest as manifests
from esvit_scale.data.remote import store, upload
from esvit_scale.data.remote.store import Store, StoreUnreachable
from esvit_scale.errors import UserError
from tests import tiny
from tests.data.remote.conftest import remote_copy
from tests.data.test_checksums import without_checksums


@pytest.fixture(scope="module")
def three_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("local") / "set", samples=30)  # each of 10


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(store, "REQUESTS_PER_SECOND", 5000)
    return tmp_path / "bucket"


def lines_of(record: Path) -> list[str]:
    return [line for line in record.read_text().splitlines() if line]


def test_record_has_a_line_for_each_shard_and_survives_a_cut(three_shards: Path, bucket: Path, tmp_path: Path) -> None:
    local = shutil.copytree(three_shards, tmp_path / "set")
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
    three_shards: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, access = sorted(three_shards.iterdir()), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != three_shards and access(path, mode))
    assert [upload.upload(three_shards, f"file://{bucket}") for _ in range(2)] == [3, 0]
    assert sorted(three_shards.iterdir()) == before
    [record] = tmp_path.glob("esvit-scale-*/.uploaded-*.jsonl")
    assert len(lines_of(record)) == 3


def test_upload_sends_the_manifest_last_and_continues(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, bucket, sent = remote_copy(shards, tmp_path), tmp_path / "store", []
    bucket.mkdir()
    put = Store.put

    def failing(self: Store, path: Path) -> None:
        if len(sent) == 9:
            raise StoreUnreachable("gone")
        sent.append(path.name)
        put(self, path)

    monkeypatch.setattr(Store, "put", failing)
    with pytest.raises(StoreUnreachable):
        upload.upload(local, f"file://{bucket}")
    assert not (bucket / "manifest.json").exists()
    there = [name for name in sent if name.endswith(".tar")]
    monkeypatch.setattr(Store, "put", lambda self, path: (sent.append(path.name), put(self, path))[1])
    assert upload.upload(local, f"file://{bucket}") >= 10 - len(there)
    assert sent[-1] == "manifest.json"
    assert len(sent) < 2 * 21
    for path in [*shards.glob("*.tar"), *shards.glob("*.json*")]:
        if path.name != "quarantine.jsonl":
            assert (bucket / path.name).read_bytes() == path.read_bytes()
    (bucket / "shard-000004.tar").write_bytes(b"other")
    assert upload.upload(local, f"file://{bucket}") == 1
    assert (bucket / "shard-000004.tar").read_bytes() == (shards / "shard-000004.tar").read_bytes()
    content = bytearray((local / "shard-000001.tar").read_bytes())
    content[700] ^= 1
    (local / "shard-000001.tar").write_bytes(content)
    with pytest.raises(UserError, match="sha256 differs"):
        upload.upload(local, f"file://{tmp_path}/store2")


def test_checksums_that_are_added_later_send_the_indexes_only(
    three_shards: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = shutil.copytree(three_shards, tmp_path / "set")
    without_checksums(local)
    upload.upload(local, f"file://{bucket}")
    checksums.add(local)
    sent, put = [], Store.put
    monkeypatch.setattr(Store, "put", lambda self, path, name=None: (sent.append(path.name), put(self, path, name))[1])
    assert upload.upload(local, f"file://{bucket}") == 3
    assert sorted(sent) == ["manifest.json", *(f"shard-00000{i}.index.jsonl" for i in range(3))]
    assert manifests.load(bucket).has_checksums


def test_index_without_its_checksums_is_not_uploaded(three_shards: Path, bucket: Path, tmp_path: Path) -> None:
    local = shutil.copytree(three_shards, tmp_path / "set")
    index = manifests.index_path(local / "shard-000001.tar")
    for damage in (lambda: index.write_bytes(b"x"), index.unlink):
        damage()
        with pytest.raises(UserError, match=r"000001\.index\.jsonl: missing, or not .*run `esvit-scale shards index"):
            upload.upload(local, f"file://{bucket}")
    assert not (bucket / "manifest.json").exists()
    checksums.add(local)
    upload.upload(local, f"file://{bucket}")
    assert (bucket / index.name).read_bytes() == index.read_bytes()
