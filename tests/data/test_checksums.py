"""Checksums of the members of a shard, in its index."""

import json
import zlib
from pathlib import Path

import pytest

from esvit_scale import cli, files
from esvit_scale.data import manifest as manifests
from esvit_scale.data import shard_verify
from esvit_scale.data.identity import identity
from tests import tiny


def without_checksums(root: Path) -> None:
    """Make a set what versions before checksums wrote."""
    raw = json.loads((root / "manifest.json").read_bytes())
    del raw["index_version"]
    for row in raw["shards"]:
        del row["index_sha256"]
        tar = root / row["name"]
        manifests.index_path(tar).write_bytes(manifests.dump_index(tar.name, manifests.scan(tar)))
    (root / "manifest.json").write_bytes((json.dumps(raw, indent=1) + "\n").encode())


def test_written_index_has_the_checksum_of_every_member(tmp_path: Path) -> None:
    root = tiny.shards(tmp_path / "set", samples=12)
    manifest = manifests.load(root)
    assert manifest.has_checksums
    for shard in manifest.shards:
        tar = (root / shard.name).read_bytes()
        assert files.sha256(manifests.index_path(root / shard.name)) == shard.index_sha256
        for entry in manifests.read_side_car(root / shard.name):
            expected = {ext: zlib.crc32(tar[at : at + size]) for ext, (at, size) in entry.members.items()}
            assert entry.checksums == expected
            assert len(expected) == 2


def test_set_without_checksums_loads_and_gets_them_by_a_command(tmp_path: Path) -> None:
    root = tiny.shards(tmp_path / "set", samples=12)
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    without_checksums(root)
    old = manifests.load(root)
    assert not old.has_checksums
    assert shard_verify.verify(root) == []
    assert [entry.checksums for entry in manifests.read_side_car(root / old.shards[0].name)] == [{}] * 10
    assert cli.main(["shards", "index", str(root), "--workers", "1"]) == 0
    assert {path.name: path.read_bytes() for path in root.iterdir()} == before
    assert identity(manifests.load(root)) == identity(old)  # checkpoints of the set go on


def test_wrong_checksum_is_a_problem_and_is_repaired(tmp_path: Path) -> None:
    root = tiny.shards(tmp_path / "set", samples=12)
    index = manifests.index_path(root / "shard-000000.tar")
    good = index.read_text()
    rows = good.splitlines()
    key, members = json.loads(rows[1])
    members["png"][2] ^= 1
    index.write_text("\n".join([rows[0], json.dumps([key, members], separators=(",", ":")), *rows[2:]]) + "\n")
    assert shard_verify.verify(root) == [f"{index}: does not agree with the tar"]
    assert cli.main(["shards", "verify", str(root), "--repair", "--workers", "1"]) == 0
    assert index.read_text() == good


def test_damaged_shard_gets_no_checksums(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tiny.shards(tmp_path / "set", samples=12)
    without_checksums(root)
    tar = root / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)
    assert cli.main(["shards", "index", str(root), "--workers", "1"]) == 2
    assert "its sha256 differs from the manifest's" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"", b"x", None])
def test_damaged_or_missing_index_is_written_anew(damage: bytes | None, tmp_path: Path) -> None:
    root = tiny.shards(tmp_path / "set", samples=12)
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    index = manifests.index_path(root / "shard-000001.tar")
    index.unlink() if damage is None else index.write_bytes(damage)
    assert cli.main(["shards", "index", str(root), "--workers", "1"]) == 0
    assert {path.name: path.read_bytes() for path in root.iterdir()} == before


def test_set_without_a_tar_is_not_called_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tiny.shards(tmp_path / "set", samples=12)
    (root / "shard-000001.tar").unlink()
    assert cli.main(["shards", "index", str(root), "--workers", "1"]) == 2
    assert "shard-000001.tar: No such file" in capsys.readouterr().err
