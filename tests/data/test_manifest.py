import gc
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from esvit_scale.data import manifest as manifests
from esvit_scale.data.decode import BadImage
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.reader import OPEN_FILES, ShardReader
from esvit_scale.data.shard_table import Shard, ShardTable
from esvit_scale.errors import UserError
from tests.data.conftest import encoded, picture

GOLDEN = """{
 "format_version": 1,
 "tool": "esvit-scale 0.1.0",
 "samples": 3,
 "bytes": 10240,
 "source": "",
 "classes": ["a", "b"],
 "shards": [{"name": "shard-000000.tar", "samples": 3, "bytes": 10240, "sha256": "00"}]
}"""


def write(root: Path, **changes: Any) -> Path:
    root.mkdir(exist_ok=True)
    (root / "manifest.json").write_text(json.dumps({**json.loads(GOLDEN), **changes}))
    return root


def test_manifest_of_the_first_release_loads(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(GOLDEN)
    expected = Manifest(tmp_path, ShardTable([Shard("shard-000000.tar", 3, 10240, "00")]), ("a", "b"))
    assert manifests.load(tmp_path) == expected


def shard(name: Any = "s.tar", samples: Any = 1) -> dict[str, Any]:
    return {"name": name, "samples": samples, "bytes": 1, "sha256": "00"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format_version": 2}, "reads format_version 1, not 2"),
        ({"format_version": None}, "reads format_version 1, not None"),
        ({"shards": [shard("../x.tar")]}, "not the name of a tar"),
        ({"shards": [shard("/etc/x.tar")]}, "not the name of a tar"),
        ({"shards": [shard("a\\b.tar")]}, "not the name of a tar"),
        ({"shards": [shard("x")]}, "not the name of a tar"),
        ({"shards": [shard(7)]}, "not the name of a tar"),
        ({"shards": [shard(), shard()]}, "listed twice"),
        ({"shards": [shard(samples=-1)]}, "not a count"),
        ({"shards": [shard(samples="3")]}, "not a count"),
        ({"shards": [{}]}, "not a well-formed manifest"),
        ({"shards": None}, "not a well-formed manifest"),
    ],
)
def test_malformed_manifests_are_errors(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        manifests.load(write(tmp_path / "set", **changes))


def test_folder_without_set_is_an_error_with_hint(tmp_path: Path) -> None:
    write(tmp_path / "right")
    with pytest.raises(UserError, match=r"no such shard folder; shard sets in .*: right"):
        manifests.load(tmp_path / "wrong")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "x.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 tars but no manifest\.json"):
        manifests.load(tmp_path / "tars")
    (tmp_path / "right" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        manifests.load(tmp_path / "right")


def test_size_errors_name_the_shard(tmp_path: Path) -> None:
    manifest = manifests.load(write(tmp_path / "set"))
    with pytest.raises(UserError, match=r"shard-000000\.tar: No such file"):
        manifests.check_sizes(manifest)
    (tmp_path / "set" / "shard-000000.tar").write_bytes(b"x" * 10239)
    with pytest.raises(UserError, match="truncated: 10239 bytes; the manifest says 10240"):
        manifests.check_sizes(manifest)
    (tmp_path / "set" / "shard-000000.tar").write_bytes(b"x" * 10240)
    manifests.check_sizes(manifest)


def hostile_tar(path: Path) -> None:
    """Links, a device, a folder, names that climb out, and two good samples."""
    with tarfile.open(path, "w") as tar:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(data)
            tar.addfile(info, io.BytesIO(data))

        add("good.png", encoded(picture(0)))
        add("good.cls", b"4")
        add("link.png", kind=tarfile.SYMTYPE, link="/etc/passwd")
        add("hard.png", kind=tarfile.LNKTYPE, link="good.png")
        add("fifo.png", kind=tarfile.FIFOTYPE)
        add("folder.png", kind=tarfile.DIRTYPE)
        add("noextension", b"x")
        add("../../climbs.png", encoded(picture(1)))
        add("pickled.pickle", b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")


def test_hostile_tar_members_are_only_bytes_at_offsets(tmp_path: Path) -> None:
    hostile_tar(tmp_path / "x.tar")
    entries = list(manifests.read_index(tmp_path / "x.tar"))
    assert [e.key for e in entries] == ["good", "hard", "climbs", "pickled"]
    size = (tmp_path / "x.tar").stat().st_size
    reader = ShardReader(Manifest(tmp_path, ShardTable([Shard("x.tar", 4, size, "")])))
    assert reader.image(0, entries[0]) == reader.image(0, entries[1]) == encoded(picture(0))
    assert reader.label(0, entries[0]) == 4
    assert reader.image(0, entries[2]) == encoded(picture(1))
    with pytest.raises(BadImage, match=r"no image among its members \(pickle\)"):
        reader.image(0, entries[3])
    assert [p.name for p in tmp_path.iterdir()] == ["x.tar"]


def test_scan_of_any_prefix_gives_the_whole_members(tmp_path: Path) -> None:
    hostile_tar(tmp_path / "x.tar")
    whole = (tmp_path / "x.tar").read_bytes()
    everything = manifests.scan(tmp_path / "x.tar")
    for cut in range(0, len(whole), 389):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        entries = manifests.scan(tmp_path / "cut.tar")
        assert all(
            e.key == f.key and e.members.items() <= f.members.items() for e, f in zip(entries, everything, strict=False)
        )
        assert all(at + n <= cut for e in entries for at, n in e.members.values())


def test_backward_header_ends_the_scan(tmp_path: Path) -> None:
    """A negative size (base-256) would send a naive scan in circles."""
    info = tarfile.TarInfo("x.png")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"  # -1024
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(bytes(header) * 3 + bytes(1024))
    assert manifests.scan(tmp_path / "x.tar") == []


@pytest.mark.parametrize("damage", ["absent", "cut", "garbage", "other shard", "other version"])
def test_unusable_index_is_rebuilt_from_the_tar(shard_set: Manifest, tmp_path: Path, damage: str) -> None:
    name = shard_set.shards[0].name
    source = shard_set.root / name
    (tmp_path / name).write_bytes(source.read_bytes())
    index = manifests.index_path(source).read_text()
    texts = {
        "cut": index[:-30],
        "garbage": "\0\0\0",
        "other shard": index.replace(name, "y.tar"),
        "other version": index.replace('"format_version": 2', '"format_version": 3'),
    }
    if damage != "absent":
        manifests.index_path(tmp_path / name).write_text(texts[damage])
    places = [(entry.key, entry.members) for entry in manifests.read_index(source)]
    assert [(entry.key, entry.members) for entry in manifests.read_index(tmp_path / name)] == places


@pytest.mark.parametrize(
    "line", ['["k",{"png":[-5,10]}]', '["k",{"png":[0,99999999]}]', '["k"]', "nonsense", "[1,2,3]"]
)
def test_index_lines_are_checked_against_the_tar(shard_set: Manifest, tmp_path: Path, line: str) -> None:
    first = shard_set.shards[0]
    (tmp_path / first.name).write_bytes((shard_set.root / first.name).read_bytes())
    header = json.dumps({"format_version": 1, "shard": first.name})
    manifests.index_path(tmp_path / first.name).write_text(f"{header}\n{line}\n")
    reader = ShardReader(Manifest(tmp_path, (first,)))
    with pytest.raises(BadImage):
        reader.image(0, reader.entry(0, 0))


def test_open_files_are_bounded(tmp_path: Path, shard_set: Manifest) -> None:
    first = shard_set.shards[0]
    names = [f"s{i}.tar" for i in range(OPEN_FILES + 20)]
    for name in names:
        (tmp_path / name).symlink_to(shard_set.root / first.name)
    reader = ShardReader(Manifest(tmp_path, tuple(first._replace(name=name) for name in names)))
    gc.collect()  # files of earlier tests
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        for shard_number in range(len(names)):
            assert reader.image(shard_number, reader.entry(shard_number, 3))
    assert len(list(Path("/proc/self/fd").iterdir())) - before == OPEN_FILES
    reader.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
