"""Where a set lies and where its cache is."""

import os
import time
from pathlib import Path

import pytest

from esvit_scale.data import stream
from esvit_scale.data.remote import place, room
from esvit_scale.data.remote.store import Store
from esvit_scale.errors import UserError
from tests import tiny
from tests.data.remote.conftest import config, remote_copy, small


def test_missing_set_ends_the_start_at_once(shards: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match="not a finished shard set"):
        stream.open_data(config(f"file://{tmp_path}/nothing", tmp_path / "cache"))
    with pytest.raises(UserError, match="gcsfs"):
        stream.open_data(config("gs://bucket/set", tmp_path / "cache"))
    assert time.monotonic() - began < 5


def test_replaced_set_is_read_anew(shards: Path, tmp_path: Path) -> None:
    bucket, cache = remote_copy(shards, tmp_path), tmp_path / "cache"
    first = stream.open_data(config(f"file://{bucket}", cache))
    other = tiny.shards(tmp_path / "other", samples=30)
    for path in other.iterdir():
        if path.is_file():
            (bucket / path.name).write_bytes(path.read_bytes())
    place._attached.cache_clear()
    now = stream.open_data(config(f"file://{bucket}", cache))
    assert (now.samples, first.samples) == (30, 96)
    assert now.root != first.root


def test_default_cache_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = place.cache_folder(None)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    assert place.cache_folder(None).stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    with pytest.raises(UserError, match=r"data\.cache_dir: the default, .* only you may write"):
        place.cache_folder(None)
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="only you may write"):
        place.cache_folder(None)
    folder.unlink()
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(UserError, match="only you may write"):
        place.cache_folder(None)


def test_set_is_opened_while_another_rank_records_a_new_version(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest and its version are one file at every time, so that no rank finds one without the other."""
    manifest, data = small(shards, tmp_path, 5), config("", tmp_path).data
    [recorded] = [path for path in (tmp_path / place.MANIFESTS).iterdir() if path.name != room.MARKER]
    recorded.write_bytes(b"old version\n" + recorded.read_bytes().partition(b"\n")[2])
    read_bytes = Path.read_bytes

    def vanishes(self: Path) -> bytes:
        if self == recorded:
            raise FileNotFoundError
        return read_bytes(self)

    monkeypatch.setattr(Path, "read_bytes", vanishes)
    place._attached.cache_clear()
    assert place.open_set(f"file://{shards}", data).shards == manifest.shards
    monkeypatch.undo()
    place._attached.cache_clear()
    assert recorded.read_bytes().partition(b"\n")[2] == (shards / "manifest.json").read_bytes()
    monkeypatch.setattr(Store, "read", lambda *_, **__: pytest.fail("the version is that of the store"))
    assert place.open_set(f"file://{shards}", data).root == manifest.root
