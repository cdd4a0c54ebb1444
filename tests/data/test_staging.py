"""Staged shards: the same bytes under another root, complete or not used, copied once."""

import errno
import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from esvit_scale.data import manifest as manifests
from esvit_scale.data import staging
from esvit_scale.errors import UserError
from tests import launcher, tiny


@pytest.fixture
def shards(tmp_path: Path) -> manifests.Manifest:
    return manifests.load(tiny.shards(tmp_path / "set"))


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir() if not path.name.startswith((".", "quarantine"))}


def test_staged_set_equals_the_set(tmp_path: Path, shards: manifests.Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "disk"))
    staged = staging.staged(shards, "$NODE_DISK/deep/er")
    assert staged.root.is_relative_to(tmp_path / "disk/deep/er")
    assert contents(staged.root) == contents(shards.root)
    assert (staged.shards, staged.classes) == (shards.shards, shards.classes)
    assert manifests.load(staged.root).shards == shards.shards


def test_only_missing_and_truncated_shards_are_copied(tmp_path: Path, shards: manifests.Manifest) -> None:
    first = staging.staged(shards, str(tmp_path / "disk"))
    whole, cut, gone = (first.root / shard.name for shard in shards.shards[:3])
    before = whole.stat().st_ino
    cut.write_bytes(cut.read_bytes()[:100])
    gone.unlink()
    again = staging.staged(shards, str(tmp_path / "disk"))
    assert contents(again.root) == contents(shards.root)
    assert whole.stat().st_ino == before


def test_another_set_of_the_same_name_is_copied_separately(tmp_path: Path, shards: manifests.Manifest) -> None:
    other = manifests.load(tiny.shards(tmp_path / "elsewhere/set", samples=20))
    roots = [staging.staged(data, str(tmp_path / "disk")).root for data in (shards, other)]
    assert roots[0] != roots[1]
    assert contents(roots[1]) == contents(other.root)


def test_processes_of_a_node_share_one_copy(tmp_path: Path, shards: manifests.Manifest) -> None:
    code = (
        "import sys; from pathlib import Path; from esvit_scale.data import manifest, staging\n"
        "print(staging.staged(manifest.load(Path(sys.argv[1])), sys.argv[2]).root)"
    )
    command = [sys.executable, "-c", code, str(shards.root), str(tmp_path / "disk")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=launcher.environment()) for _ in range(2)]
    roots = {process.communicate(timeout=60)[0].strip() for process in both}
    assert len(roots) == 1
    assert contents(Path(roots.pop())) == contents(shards.root)


def test_staging_errors_name_the_remedy(
    tmp_path: Path, shards: manifests.Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_DISK", raising=False)
    with pytest.raises(
        UserError, match=re.escape("data.stage: $NO_SUCH_DISK/x: $NO_SUCH_DISK is not set on this node")
    ):
        staging.staged(shards, "$NO_SUCH_DISK/x")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.stage: .*file/set-.*: Not a directory"):
        staging.staged(shards, str(tmp_path / "file"))
    monkeypatch.setattr(staging, "SPARE", 1 << 62)
    with pytest.raises(UserError, match=r"the set needs 0.0 GiB more, but .* GiB are free"):
        staging.staged(shards, str(tmp_path / "disk"))


@pytest.mark.slow
def test_run_reads_the_copy_and_resumes_without_it(tmp_path: Path, shards: manifests.Manifest) -> None:
    """The same numbers from the copy; a resume may read the shared set again."""
    disk = tmp_path / "disk"
    for name, steps, stage in (("plain", 4, None), ("staged", 4, str(disk))):
        config = tiny.config(tmp_path / name, shards.root, data__stage=stage, train__steps=steps)
        path = tiny.write_config(tmp_path / f"{name}.yaml", config)
        launcher.run(*launcher.CLI, "pretrain", path, timeout=120)
    assert tiny.rows(tmp_path / "staged") == tiny.rows(tmp_path / "plain")
    assert len(list(disk.iterdir())) == 1
    plain = tiny.write_config(tmp_path / "again.yaml", tiny.config(tmp_path / "staged", shards.root, train__steps=4))
    launcher.run(*launcher.CLI, "pretrain", str(plain), timeout=120)


def test_every_copied_piece_counts_as_progress(tmp_path: Path, shards: manifests.Manifest, monkeypatch) -> None:
    """An hour of honest copying is no hang, however large the shards are; a copy that stands still is one."""
    monkeypatch.setattr(staging, "PIECE", 1000)
    pieces: list[None] = []
    staging.staged(shards, str(tmp_path / "disk"), lambda: pieces.append(None))
    assert len(pieces) >= sum(shard.bytes for shard in shards.shards) // 1000
    before = len(pieces)
    staging.staged(shards, str(tmp_path / "disk"), lambda: pieces.append(None))
    assert len(pieces) - before < 20  # the manifest alone


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_staging_works_without_file_locks(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_flock(handle: object, kind: int) -> None:
        raise OSError(code, os.strerror(code))

    shards = manifests.load(tiny.shards(tmp_path / "set"))
    monkeypatch.setattr(fcntl, "flock", no_flock)
    staged = staging.staged(shards, str(tmp_path / "disk"))
    assert manifests.load(staged.root).shards == shards.shards
    assert not list(staged.root.glob(".*.partial"))
    assert "this file system has no locks" in caplog.text
