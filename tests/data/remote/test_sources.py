"""Sources in a store give the same shard sets, byte for byte, as local copies of them."""

import os
import shutil
from pathlib import Path

import pytest

from esvit_scale import cli
from esvit_scale.data import planned_shard
from esvit_scale.data.remote import source_files, url_files
from esvit_scale.data.remote.store import Denied, Store
from esvit_scale.data.shard_plan import Recipe
from esvit_scale.data.shard_writer import write_source
from esvit_scale.data.sources import SourceOptions, open_source
from esvit_scale.errors import RestartCanHelp, UserError
from tests.data.conftest import encoded, picture
from tests.data.remote.conftest import Counted
from tests.data.remote.test_outbox import files_of
from tests.data.source_helpers import as_parquet_of_bytes, as_tars, as_zip

RECIPE = Recipe(samples_per_shard=4)
IMAGES = {f"{kind}/{i}.png": encoded(picture(i + 10 * (kind == "b"))) for kind in "ab" for i in range(5)}


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(source_files, "SPARE", 0)
    for name, data in IMAGES.items():
        path = tmp_path / "bucket" / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "bucket"


def both(where: Path, tmp_path: Path, **options: object) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The tars and indexes made of a local source, and those made of the same source in a store."""
    found = []
    for name, source in (("local", str(where)), ("remote", f"file://{where}")):
        write_source(source, tmp_path / name, SourceOptions(**options), RECIPE)  # type: ignore[arg-type]
        found.append(files_of(tmp_path / name))
    assert not list(tmp_path.glob("esvit-scale-*/.reading-*"))
    return found[0], found[1]


@pytest.mark.parametrize("make", [as_tars, as_zip, as_parquet_of_bytes])
def test_archives_give_the_same_set(make: object, bucket: Path, tmp_path: Path) -> None:
    where, options = make(IMAGES, bucket)  # type: ignore[operator]
    local, remote = both(where, tmp_path, **options)
    assert local == remote
    assert any(name.endswith(".tar") for name in local)


def test_tars_named_by_braces(bucket: Path, tmp_path: Path) -> None:
    where, _ = as_tars(IMAGES, bucket)
    local, _ = both(where, tmp_path)
    write_source(f"file://{where}/{{0..1}}.tar", tmp_path / "braces", SourceOptions(), RECIPE)
    assert files_of(tmp_path / "braces") == local


def test_shard_sets_are_split_and_searched_for_duplicates(shards: Path, tmp_path: Path, bucket: Path) -> None:
    options = ["--val-fraction", "0.3", "--samples-per-shard", "20", "--workers", "1"]
    for name, source in (("local", str(shards)), ("remote", f"file://{shards}")):
        assert cli.main(["shards", "split", source, str(tmp_path / name), *options]) == 0
        assert cli.main(["shards", "duplicates", source, "--out", str(tmp_path / f"{name}.txt"), "--workers", "1"]) == 0
    assert files_of(tmp_path / "local") == files_of(tmp_path / "remote")
    assert (tmp_path / "local.txt").read_bytes() == (tmp_path / "remote.txt").read_bytes()


def test_lists_and_tables_of_urls_give_the_same_set(bucket: Path, tmp_path: Path) -> None:
    (bucket / "images.csv").write_text("path,kind\n" + "".join(f"images/{name},{name[0]}\n" for name in IMAGES))
    local, remote = both(bucket / "images.csv", tmp_path, label="kind")  # relative paths begin at the table's URL
    assert {k: v for k, v in local.items() if k != "manifest.json"} == {
        k: v for k, v in remote.items() if k != "manifest.json"
    }
    for name, start in (("paths", str(bucket)), ("urls", f"file://{bucket}")):
        (tmp_path / f"{name}.txt").write_text("".join(f"{start}/images/{image}\n" for image in IMAGES))
        write_source(str(tmp_path / f"{name}.txt"), tmp_path / name, SourceOptions(label="parent"), RECIPE, workers=2)
    tars = [{k: v for k, v in files_of(tmp_path / name).items() if k.endswith(".tar")} for name in ("paths", "urls")]
    assert tars[0] == tars[1]


def test_urls_are_read_together_and_missing_ones_are_counted(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bucket / "images" / "a" / "3.png").unlink()
    (bucket / "images" / "b" / "0.png").write_bytes(b"no image")
    (tmp_path / "x.txt").write_text("".join(f"file://{bucket}/images/{name}\n" for name in IMAGES))
    [manifest] = write_source(str(tmp_path / "x.txt"), tmp_path / "set", SourceOptions(), RECIPE).values()
    assert manifest.samples == 8
    assert sum(row["count"] for row in manifest.left_out) == 2
    monkeypatch.setattr(planned_shard, "MISSING_IN_A_ROW", 3)
    shutil.rmtree(bucket / "images")
    with pytest.raises(UserError, match="do these URLs begin where the files are"):
        write_source(str(tmp_path / "x.txt"), tmp_path / "none", SourceOptions(), RECIPE)
    (tmp_path / "x.txt").write_text("https://host/x.png?X-Amz-Signature=abc\n")
    with pytest.raises(UserError, match=r"row 1 of the list or table: the URL's query holds a secret"):
        open_source(str(tmp_path / "x.txt"), SourceOptions())


def test_denied_url_is_counted_as_unreadable(monkeypatch: pytest.MonkeyPatch, bucket: Path) -> None:
    def refused(self: Store, name: str, **_: object) -> bytes:
        raise Denied("no")

    monkeypatch.setattr(Store, "read", refused)
    with pytest.raises(PermissionError, match="access denied"):
        url_files.read(f"file://{bucket}/images/a/0.png")


def test_every_file_is_fetched_once_and_again_when_it_changed(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, _ = as_tars(IMAGES, bucket)
    counted = Counted(monkeypatch)
    here = source_files.fetch(f"file://{where}")
    assert here == source_files.fetch(f"file://{where}")
    assert sorted(counted.names) == ["0.tar", "1.tar"]
    with (where / "1.tar").open("ab") as file:
        file.write(b"\0" * 512)
    source_files.fetch(f"file://{where}")
    assert counted.names[2:] == ["1.tar"]
    assert files_of(here) == files_of(where)


def test_sources_that_cannot_be_fetched_end_in_one_line(
    bucket: Path, tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="a folder of single images is read by a list of URLs"):
        source_files.fetch(f"file://{bucket}/images")
    with pytest.raises(UserError, match="no such object"):
        source_files.fetch(f"file://{bucket}/none.tar")
    damaged = shutil.copytree(shards, bucket / "damaged")
    data = bytearray((damaged / "shard-000003.tar").read_bytes())
    data[700] ^= 1
    (damaged / "shard-000003.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"shard-000003\.tar: its sha256 differs"):
        source_files.fetch(f"file://{damaged}")
    where, _ = as_tars(IMAGES, bucket)
    fetch = Store.fetch

    def growing(self: Store, name: str, target: Path, *, urgent: bool, most: int | None = None) -> None:
        fetch(self, name, target, urgent=urgent, most=most)
        with (where / name).open("ab") as file:
            file.write(b"\0" * 512)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "fetch", growing)
        with pytest.raises(RestartCanHelp, match="changed during 3 transfers"):
            source_files.fetch(f"file://{where}")
    monkeypatch.setattr(source_files, "SPARE", 1 << 60)
    with pytest.raises(UserError, match="name a larger disk with --work-dir"):
        source_files.fetch(f"file://{where}", tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"shards": [{"name": "a.tar"}]}', '{"format_version": 1, "shards": [{"name": "../a.tar"}]}']
)
def test_manifest_of_a_set_in_a_store_is_not_trusted(text: str, bucket: Path) -> None:
    (bucket / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=f"^file://{bucket}/manifest.json: "):
        open_source(f"file://{bucket}", SourceOptions())


def test_shard_that_is_cut_on_its_way_is_fetched_again(
    shards: Path, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, cuts = Store.fetch, list[str]()

    def cutting(self: Store, name: str, target: Path, *, urgent: bool, most: int | None = None) -> None:
        fetch(self, name, target, urgent=urgent, most=most)
        if name == "shard-000001.tar" and len(cuts) < times:
            cuts.append(name)
            target.write_bytes(target.read_bytes()[:700])

    monkeypatch.setattr(Store, "fetch", cutting)
    times = 2
    here = source_files.fetch(f"file://{shards}", bucket)
    assert (here / "shard-000001.tar").read_bytes() == (shards / "shard-000001.tar").read_bytes()
    assert len(cuts) == 2
    times = 99
    with pytest.raises(UserError, match="its sha256 differs from the manifest's"):
        source_files.fetch(f"file://{shards}", bucket / "other")


def test_stores_of_many_hosts_leave_no_open_files(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_files, "MOST_STORES", 1)
    names = [f"file://{bucket}/images/{kind}/0.png" for kind in "ab"]
    opened = []
    for _ in range(3):
        for name in names:
            assert url_files.read(name)
        # Not all open files of the process: earlier tests' garbage may be collected meanwhile.
        opened.append(
            sum(os.path.realpath(file).startswith(f"{bucket.parent}/") for file in Path("/proc/self/fd").iterdir())
        )
    assert opened[-1] == opened[0] > 0


def test_fetched_files_stay_while_another_run_reads_them(bucket: Path, tmp_path: Path) -> None:
    where, _ = as_tars(IMAGES, bucket)
    url = f"file://{where}"
    here = source_files.fetch(url)
    other = source_files._held(source_files._kept(url, None))
    source_files.discard_if_remote(url)
    assert here.is_dir()
    os.close(other)
    source_files.discard_if_remote(url)
    assert not here.exists()
    assert source_files.fetch(url).is_dir()


def test_folder_that_lists_itself_ends_in_one_line(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "infos", lambda self, folder: {"x": {"type": "directory"}})
    with pytest.raises(UserError, match="more than 64 folders below each other"):
        list(source_files._below(Store(f"file://{bucket}", {}, tmp_path), ""))
