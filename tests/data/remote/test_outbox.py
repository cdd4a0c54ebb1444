"""Sets written to a store shard by shard: killed after any step, in parts, over other sets, and with a full disk."""

import errno
import json
import os
import shutil
import threading
from collections import Counter
from pathlib import Path

import pytest
from tqdm import tqdm

from esvit_scale import cli
from esvit_scale.data import manifest as manifests
from esvit_scale.data import shard_writer
from esvit_scale.data.remote import outbox as outboxes
from esvit_scale.data.remote import upload
from esvit_scale.data.remote.store import Denied, Store
from esvit_scale.data.shard_plan import Recipe
from esvit_scale.data.shard_writer import Part, write_source
from esvit_scale.data.sources import SourceOptions
from esvit_scale.errors import RestartCanHelp, UserError
from tests.data.source_helpers import classes

OPTIONS = SourceOptions(kind="folder")
RECIPE = Recipe(samples_per_shard=4)  # 12 images, one of them bad: three shards


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = classes(tmp_path_factory.mktemp("images") / "images", ["a", "b"], n=6)
    (root / "a" / "5.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def local(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local") / "set"
    write_source(str(images), folder, OPTIONS, RECIPE)
    return folder


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "bucket").mkdir()
    return f"file://{tmp_path}/bucket/set"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def place_of(url: str) -> Path:
    return Path(url.removeprefix("file://"))


def write(images: Path, place: str | Path, recipe: Recipe = RECIPE, **more: object) -> None:
    write_source(str(images), place, OPTIONS, recipe, **more)  # type: ignore[arg-type]


def killed_at(step: int, images: Path, url: str, recipe: Recipe = RECIPE) -> bool:
    """Write the set in another process that ends before a step which changes the store; return whether it came to that."""
    child = os.fork()
    if child == 0:
        tqdm.set_lock(threading.RLock())  # its own is shared with this process, and would stay locked
        steps = 0

        def counted(name: str) -> None:
            plain = getattr(Store, name)

            def with_count(self: Store, *arguments: object) -> None:
                nonlocal steps
                steps += 1
                if steps > step:
                    os._exit(9)
                plain(self, *arguments)

            setattr(Store, name, with_count)

        for name in ("put", "write", "remove"):
            counted(name)
        try:
            write(images, url, recipe)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_kill_before_any_step_loses_at_most_the_shards_in_work(
    images: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outboxes, "UPLOADS", 1)
    two = Recipe(
        samples_per_shard=6
    )  # plan, 2 × (index, tar, record), quarantine, manifest, removal of the plan: 10 steps
    write(images, tmp_path / "local", two)
    sent: list[str] = []
    put = Store.put
    for step in range(11):
        place = place_of(url).with_name(f"set-{step}")
        assert killed_at(step, images, f"file://{place}", two) == (step < 10)
        records = set((place / ".partial").glob("shard-*.json"))
        assert (place / "manifest.json").exists() == (step >= 9)
        with monkeypatch.context() as patched:
            patched.setattr(Store, "put", lambda self, path, name=None: (sent.append(path.name), put(self, path, name)))
            write(images, f"file://{place}", two)
        assert sum(name.endswith(".tar") for name in sent) == (2 - len(records) if step < 9 else 0)
        assert files_of(place) == files_of(tmp_path / "local")
        sent.clear()
    assert not list(tmp_path.glob("esvit-scale-*/.writing-*"))


def test_another_machine_continues(images: Path, local: Path, url: str, tmp_path: Path) -> None:
    assert killed_at(8, images, url)
    write(images, url, work_dir=tmp_path / "another" / "disk")
    assert files_of(place_of(url)) == files_of(local)
    assert not list((tmp_path / "another" / "disk").glob(".writing-*"))


def test_parts_are_merged_and_a_missing_one_is_named(
    images: Path, local: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in (1, 3):
        write(images, url, part=Part(part, 3))
    assert cli.main(["shards", "merge", url]) == 2
    assert f"{url}: 1 of 3 shards are not written yet (first: shard-000001.tar)" in capsys.readouterr().err
    write(images, url, part=Part(2, 3))
    assert not (place_of(url) / "manifest.json").exists()
    assert cli.main(["shards", "merge", url]) == 0
    assert files_of(place_of(url)) == files_of(local)
    assert cli.main(["shards", "merge", url]) == 0
    assert f"{url}: already holds this set (11 samples); nothing to do" in capsys.readouterr().err


def test_split_is_written_below_the_url_and_not_over_another_set(images: Path, url: str, local: Path) -> None:
    divided = Recipe(samples_per_shard=4, val_fraction=0.4)
    found = write_source(str(images), url, OPTIONS, divided)
    there = {name: manifests.load(place_of(url) / name).samples for name in found}
    assert sum(there.values()) == 11
    assert set(there) == {"train", "val"}
    with pytest.raises(UserError, match="set/train: already holds another shard set"):
        write(images, url)
    with pytest.raises(UserError, match="set/train: already holds another shard set"):
        write(images, f"{url}/train/inside")


def test_changed_destinations_are_refused_in_one_line(images: Path, url: str, tmp_path: Path) -> None:
    assert killed_at(8, images, url)
    with pytest.raises(UserError, match="holds an unfinished set of other images or options"):
        write_source(str(images), url, OPTIONS, Recipe(samples_per_shard=5))
    write(images, url)
    with pytest.raises(UserError, match="already holds another shard set"):
        write_source(str(images), url, OPTIONS, Recipe(samples_per_shard=5))
    (place_of(url) / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"its manifest is there, but shard-000001\.tar is missing"):
        write(images, url)
    (tmp_path / "bucket" / "x").mkdir()
    (tmp_path / "bucket" / "x" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"x: holds other files \(notes\.txt, …\)"):
        write(images, f"file://{tmp_path}/bucket/x")
    for address in ("https://host/set", "http://host/set"):
        with pytest.raises(UserError, match="a web server cannot be written to"):
            write(images, address)
    with pytest.raises(UserError, match=r"s3://…: the URL.s query holds a secret"):
        write(images, "s3://bucket/set?token=x")


def test_shard_that_vanishes_before_the_manifest_is_sent_again(
    images: Path, local: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = outboxes.Outbox.publish

    def vanishing(self: outboxes.Outbox) -> None:
        (place_of(url) / "shard-000002.tar").write_bytes(b"other")
        publish(self)

    monkeypatch.setattr(outboxes.Outbox, "publish", vanishing)
    with pytest.raises(UserError, match=r"shard-000002\.tar is not as it was sent \(1 of 3 shards\)"):
        write(images, url)
    assert not (place_of(url) / "manifest.json").exists()
    monkeypatch.setattr(outboxes.Outbox, "publish", publish)
    write(images, url)
    assert files_of(place_of(url)) == files_of(local)


def test_denied_at_once_and_full_disk_in_one_line(
    images: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(self: Store, path: Path, name: str | None = None) -> None:
        raise Denied(f"{self.url}/{name}: access denied (HTTP 403)")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "put", refused)
        patched.setattr(shard_writer, "write_planned", lambda *_: pytest.fail("worked before it knew"))
        assert cli.main(["shards", "create", str(images), url, "--workers", "1"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"esvit-scale: error: {url}/.partial/plan.json: access denied (HTTP 403); set ")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.tar")

    monkeypatch.setattr(shard_writer, "write_planned", full)
    assert cli.main(["shards", "create", str(images), url, "--workers", "1"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "x.tar: No space left on device; shards lie in this folder until" in line
    assert not list(place_of(url).rglob("*.json"))


def test_disk_holds_a_bounded_number_of_shards(
    images: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most, recipe, send = Counter[str](), Recipe(samples_per_shard=1), outboxes.Outbox._send

    def counted(self: outboxes.Outbox, *arguments: object) -> None:
        most["shards"] = max(most["shards"], partial(tmp_path) - partial(place_of(url)))
        send(self, *arguments)  # type: ignore[arg-type]

    def partial(root: Path) -> int:
        """Return the number of unfinished shards; os.walk, because files come and go meanwhile."""
        folders = (names for folder, _, names in os.walk(root) if folder.endswith("/.partial"))
        return sum(name.startswith("shard-") and name.endswith(".tar") for names in folders for name in names)

    monkeypatch.setattr(outboxes.Outbox, "_send", counted)
    write_source(str(images), url, OPTIONS, recipe, workers=1)
    assert 1 <= most["shards"] <= outboxes.UPLOADS + 2


def test_upload_that_arrives_damaged_is_sent_again(
    local: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, damaged = Store.put, Counter[str]()

    def flipping(self: Store, path: Path, name: str | None = None) -> None:
        put(self, path, name)
        if path.name == "shard-000001.tar" and damaged["times"] < limit:
            damaged["times"] += 1
            there = place_of(self.url) / path.name
            data = there.read_bytes()
            there.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    monkeypatch.setattr(Store, "put", flipping)
    local = shutil.copytree(local, tmp_path / "set")  # an upload leaves its record beside the set
    limit = 2
    upload.upload(local, url)
    assert damaged["times"] == 2
    assert (place_of(url) / "shard-000001.tar").read_bytes() == (local / "shard-000001.tar").read_bytes()
    limit = 99
    with pytest.raises(RestartCanHelp, match="not as it was sent, 3 times"):
        upload.upload(local, f"{url}2")


def test_etags_of_whole_objects_and_of_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    monkeypatch.setattr(upload, "PART", 10)
    data = os.urandom(25)
    (tmp_path / "x").write_bytes(data)
    whole = hashlib.md5(data).hexdigest()
    parts = hashlib.md5(b"".join(hashlib.md5(data[i : i + 10]).digest() for i in (0, 10, 20))).hexdigest()
    fits = {etag: upload._etag_fits({"ETag": etag}, tmp_path / "x") for etag in (f'"{whole}"', whole, f'"{parts}-3"')}
    assert all(fits.values())
    others = (parts, f"{parts}-2", f"{whole}-3", "0x8D4BCC2E4835CD0", "", f"{parts}-x")
    assert not any(upload._etag_fits({"ETag": etag}, tmp_path / "x") for etag in others)


def test_record_that_cannot_be_read_ends_in_one_line(images: Path, url: str) -> None:
    assert killed_at(8, images, url)
    [record, *_] = (place_of(url) / ".partial").glob("shard-*.json")
    record.write_text(json.dumps({"shard": 1}))
    [copy] = place_of(url).parent.parent.glob(f"esvit-scale-*/.writing-*/.partial/{record.name}")
    copy.unlink()
    with pytest.raises(UserError, match=r"a record is damaged.*remove all"):
        write(images, url)


@pytest.mark.parametrize("plan", ["[]", '{"shards": {}}', "[" * 100_000, "{"])
def test_damaged_plan_ends_in_one_line(plan: str, images: Path, url: str) -> None:
    (place_of(url) / ".partial").mkdir(parents=True)
    (place_of(url) / ".partial" / "plan.json").write_text(plan)
    with pytest.raises(UserError, match="the plan or a record is damaged"):
        write(images, url)


def test_shard_without_a_record_is_continued_after_an_error(
    images: Path, local: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Store, name: str, data: bytes) -> None:
        raise Denied(f"{name}: access denied")

    for _ in range(2):  # the second finds the first one's shard
        with monkeypatch.context() as patched:
            patched.setattr(Store, "write", failing)
            with pytest.raises(UserError, match="access denied"):
                write(images, url)
        assert (place_of(url) / ".partial" / "plan.json").exists()
    write(images, url)
    assert files_of(place_of(url)) == files_of(local)


def test_nothing_stays_of_a_set_without_usable_images(url: str, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of its 1 image files can be used"):
        write(tmp_path / "bad", url)
    assert not files_of(place_of(url))


def test_shards_on_their_way_arrive_after_ctrl_c(images: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    send, is_stopped, has_arrived = outboxes.Outbox._send, threading.Event(), threading.Event()

    def slow(self: outboxes.Outbox, *arguments: object) -> None:
        assert is_stopped.wait(10)
        send(self, *arguments)  # type: ignore[arg-type]
        has_arrived.set()

    def interrupted(self: outboxes.Outbox) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(outboxes.Outbox, "_send", slow)
    monkeypatch.setattr(outboxes.Outbox, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(images, url)
    is_stopped.set()
    assert has_arrived.wait(10)
    assert list((place_of(url) / ".partial").glob("shard-*.json"))
