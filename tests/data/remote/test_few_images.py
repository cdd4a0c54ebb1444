"""Images of a few samples of a remote set, without its tars: fsspec's local file system stands for the store."""

import shutil
from pathlib import Path

import pytest

from esvit_scale.data import manifest as manifests
from esvit_scale.data.remote import few_images, place, store
from esvit_scale.data.remote.store import Store
from esvit_scale.errors import UserError
from esvit_scale.report import sample_images
from tests import tiny


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("local") / "set", samples=30)  # 3 shards of 10


@pytest.fixture
def bucket(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(store, "REQUESTS_PER_SECOND", 5000)
    place._attached.cache_clear()
    shutil.copytree(shards, tmp_path / "bucket")
    return tmp_path / "bucket"


def keys_of(shards: Path) -> list[str]:
    return [entry.key for shard in sorted(shards.glob("*.tar")) for entry in manifests.read_index(shard)]


def test_images_of_a_remote_set_are_those_of_the_local_one_and_no_tar_is_fetched(shards: Path, bucket: Path) -> None:
    keys = set(keys_of(shards)[1::9])
    remote = place.open_set(f"file://{bucket}")
    found = few_images.encoded_images(remote, keys | {"unknown"})
    assert found == few_images.encoded_images(manifests.load(shards), keys)
    assert found.keys() == keys
    assert not list(remote.root.glob("*.tar"))


def test_shards_without_an_index_in_the_store_are_fetched_until_all_is_found(shards: Path, bucket: Path) -> None:
    for index in bucket.glob("*.index.jsonl"):
        index.unlink()
    keys, remote = set(keys_of(shards)[:15:7]), place.open_set(f"file://{bucket}")
    assert few_images.encoded_images(remote, keys) == few_images.encoded_images(manifests.load(shards), keys)
    assert len(list(remote.root.glob("*.tar"))) == 2
    shutil.rmtree(bucket)  # what is in the cache is not asked for again
    (few,) = few_images.encoded_images(remote, set(keys_of(shards)[:1]))
    assert few == keys_of(shards)[0]


def test_servers_without_ranges_send_more_and_cut_images_are_an_error(
    shards: Path, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, remote, read = set(keys_of(shards)[:2]), place.open_set(f"file://{bucket}"), Store.read
    monkeypatch.setattr(Store, "read", lambda self, name, *, at_start, start=None, stop=None: read(self, name))
    assert few_images.encoded_images(remote, keys) == few_images.encoded_images(manifests.load(shards), keys)

    def cut(self: Store, name: str, *, at_start: bool, start: int | None = None, stop: int | None = None) -> bytes:
        return read(self, name, start=start, stop=stop and stop - 1)

    monkeypatch.setattr(Store, "read", cut)
    with pytest.raises(UserError, match=r"shard-000000.tar: \d+ bytes came of an image of"):
        few_images.encoded_images(remote, keys)


def test_results_name_the_address_of_a_remote_set(shards: Path, bucket: Path) -> None:
    folder = place.local_folder(f"file://{bucket}")
    assert manifests.address(folder) == f"file://{bucket}"
    assert manifests.address(shards) == str(shards)
    key = keys_of(shards)[0]
    examples = [{"key": key, "class": "a", "neighbours": [{"key": key, "class": "a", "similarity": 1.0}]}]
    named = [{"examples": examples, "test": str(shards), "train": of} for of in (f"file://{bucket}", str(shards))]
    assert sample_images.neighbour_rows(named[0]) == sample_images.neighbour_rows(named[1])
