"""Sets that are written to and read from a real S3 server (SeaweedFS on 127.0.0.1)."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from esvit_scale import cli
from esvit_scale.data.remote import store, upload
from esvit_scale.data.remote.store import Store
from tests import object_store
from tests.data.source_helpers import classes

object_store.requires_s3()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object_store.Proxy]:
    seed = tmp_path_factory.mktemp("seed")
    (seed / "x.json").write_text("{}")
    with object_store.s3_server(tmp_path_factory.mktemp("server")) as port:
        object_store.upload(port, seed, "bucket", "seed")
        proxy = object_store.Proxy(port)
        yield proxy
        proxy.close()


@pytest.fixture(autouse=True)
def _environment(server: object_store.Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.reset()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(store, "FIRST_DELAY_S", 0.05)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setattr("fsspec.config.conf", {"s3": {"anon": True, "endpoint_url": server.url}})


def puts(server: object_store.Proxy, suffix: str) -> list[str]:
    return [path for method, path, _ in server.log if method == "PUT" and path.endswith(suffix)]


def test_created_in_the_bucket_with_faults_and_read_back(server: object_store.Proxy, tmp_path: Path) -> None:
    images = classes(tmp_path / "images", ["a", "b"], n=8)
    assert cli.main(["shards", "create", str(images), str(tmp_path / "local"), "--samples-per-shard", "7"]) == 0
    server.reset(share=0.1, seed=3, kinds=("503", "reset"))
    arguments = ["shards", "create", str(images), "s3://bucket/made", "--samples-per-shard", "7"]
    assert cli.main(arguments) == 0
    assert server.errors
    server.reset()
    assert cli.main(arguments) == 0  # finished: nothing is sent
    assert not puts(server, "")
    assert cli.main(["shards", "verify", "s3://bucket/made"]) == 0
    with_records = Store("s3://bucket/made", {}, tmp_path)
    there = with_records.infos("")
    assert set(there) == {path.name for path in (tmp_path / "local").iterdir()}
    for path in (tmp_path / "local").iterdir():
        assert with_records.read(path.name) == path.read_bytes()
    with_records.close()


def test_sources_in_the_bucket_are_written_to_the_bucket(server: object_store.Proxy, tmp_path: Path) -> None:
    images = classes(tmp_path / "images", ["a", "b"], n=8)
    to = Store("s3://bucket/images", {}, tmp_path)
    for path in images.rglob("*.png"):
        to.put(path, path.relative_to(images).as_posix())
    to.close()
    names = [path.relative_to(images).as_posix() for path in sorted(images.rglob("*.png"))]
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in names))
    split, two = ["--val-fraction", "0.3"], ["--workers", "2", "--samples-per-shard", "7"]
    for root, where in ((str(images), str(tmp_path / "local")), ("s3://bucket/images", "s3://bucket/listed")):
        create = ["shards", "create", str(tmp_path / "list.txt"), where, "--root", root, "--label", "parent", *two]
        assert cli.main(create) == 0
        assert cli.main(["shards", "split", where, f"{where}-divided", *split, *two]) == 0
    for name in ("", "-divided/train", "-divided/val"):
        there = Store(f"s3://bucket/listed{name}", {}, tmp_path)
        for path in (tmp_path / f"local{name}").glob("*.tar"):
            assert there.read(path.name) == path.read_bytes()
        there.close()


def test_damage_on_the_way_of_a_file_in_parts_is_seen_by_its_etag(server: object_store.Proxy, tmp_path: Path) -> None:
    large = tmp_path / "large.tar"
    large.write_bytes(os.urandom(1 << 20) * 101)
    to = Store("s3://bucket/parts", {}, tmp_path)
    to.put(large)
    found = to.info(large.name)
    assert found["ETag"].strip('"').endswith("-3")
    assert upload._etag_fits(found, large)
    data = large.read_bytes()
    large.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert not upload._etag_fits(found, large)
    to.close()
