"""Shard sets in a real S3 server (SeaweedFS on 127.0.0.1), behind a proxy that counts requests and makes faults."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_scale import config as configs
from esvit_scale.config import Config
from esvit_scale.data import manifest as manifests
from esvit_scale.data import stream
from esvit_scale.data.remote import place, room, shard_cache, store, working_set
from esvit_scale.errors import RestartCanHelp, UserError
from esvit_scale.train import pretraining, row_file
from tests import object_store, tiny

object_store.requires_s3()
pytestmark = pytest.mark.slow

SAMPLES = 200  # in 20 shards: 25 batches of 8


class Bucket:
    """A set in the bucket, its local original, and the proxy before the server."""

    def __init__(self, local: Path, url: str, proxy: object_store.Proxy) -> None:
        self.local, self.url, self.proxy = local, url, proxy
        self.expected = list(read(self.config(local)))

    def config(self, train: object = None, cache: Path = Path("unused"), **data: Any) -> Config:
        options = {"anon": True, "endpoint_url": self.proxy.url}
        values = {**tiny.VALUES["data"], "shuffle_window": 2, "cache_dir": str(cache), "storage_options": options}
        values |= {"train": str(train or self.url), "workers": 2, **data}
        return configs.validate({**tiny.VALUES, "data": values}, where="test")

    def check(self, batches: Iterator[stream.Batch], start: int = 0) -> None:
        """Compare batches bit for bit with those of the local set."""
        found = list(batches)
        assert len(found) == len(self.expected) - start
        for a, b in zip(self.expected[start:], found, strict=True):
            assert a.keys == b.keys
            assert not b.bad
            assert all(torch.equal(p, q) for p, q in zip(a.crops, b.crops, strict=True))


def read(c: Config, rank: int = 0, world_size: int = 1, start: int = 0) -> Iterator[stream.Batch]:
    place._attached.cache_clear()
    data = stream.open_data(c)
    return stream.batches(c, data, rank, world_size, start, 2 * stream.steps_per_epoch(c, data))


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    local = tiny.shards(tmp_path_factory.mktemp("local") / "set", samples=SAMPLES)
    with object_store.s3_server(tmp_path_factory.mktemp("server")) as port:
        url = object_store.upload(port, local, "bucket")
        proxy = object_store.Proxy(port)
        yield Bucket(local, url, proxy)
        proxy.close()


@pytest.fixture(autouse=True)
def _quick(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.proxy.reset()
    monkeypatch.setattr(store, "FIRST_DELAY_S", 0.05)
    monkeypatch.setattr(shard_cache, "CHANGED_DELAY_S", 0.05)


def names(bucket: Bucket) -> list[str]:
    return [shard.name for shard in manifests.load(bucket.local).shards]


def test_no_byte_is_fetched_twice_and_a_second_run_reads_nothing(bucket: Bucket, tmp_path: Path) -> None:
    bucket.check(read(bucket.config(cache=tmp_path)))
    assert bucket.proxy.gets() == dict.fromkeys(names(bucket), 1)
    assert bucket.proxy.bytes_of() == sum(shard.bytes for shard in manifests.load(bucket.local).shards)
    # Documented in docs/object_stores.md: requests of an epoch = shards + 2 for the manifest.
    assert len(bucket.proxy.log) == len(names(bucket)) + 2
    bucket.proxy.reset()
    bucket.check(read(bucket.config(cache=tmp_path), start=30), start=30)
    assert [(method, path.rpartition("/")[2]) for method, path, _ in bucket.proxy.log] == [("HEAD", "manifest.json")]


def test_one_in_five_requests_failing_changes_nothing(bucket: Bucket, tmp_path: Path) -> None:
    bucket.proxy.reset(share=0.2, seed=3, kinds=("503", "429", "reset", "truncate", "short", "flip"))
    bucket.check(read(bucket.config(cache=tmp_path)))
    assert sum(bucket.proxy.errors.values()) >= 3


def test_start_needs_no_request_per_shard(bucket: Bucket, tmp_path: Path) -> None:
    """Before the first batch only its shards are asked for, however many there are."""
    batches = read(bucket.config(cache=tmp_path, workers=0, slots=1))
    bucket.proxy.reset(latency=0.2)
    next(batches)
    assert len(bucket.proxy.gets()) <= 12  # of 20: those of the first window, and what 4 threads fetched meanwhile
    del batches


WORKER = """
import json, sys
from pathlib import Path
from tests.data import test_remote_s3 as test
from esvit_scale import config as configs
rank, stop = int(sys.argv[2]), int(sys.argv[3])
c = configs.load(Path(sys.argv[1]))
for batch in test.read(c, rank, 2):
    print(json.dumps([batch.batch_index, batch.keys]), flush=True)
    if batch.batch_index == stop:
        sys.stdin.read()
"""


def test_two_ranks_from_the_bucket_killed_then_one_with_an_empty_cache(bucket: Bucket, tmp_path: Path) -> None:
    c = bucket.config(cache=tmp_path / "shared", workers=1)
    (tmp_path / "config.yaml").write_text(configs.dump(c))
    environment = {**os.environ, "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-c", WORKER, str(tmp_path / "config.yaml")]
    ranks = [
        subprocess.Popen(
            [*command, str(r), "20"], env=environment, stdin=-1, stdout=-1, text=True, start_new_session=True
        )
        for r in (0, 1)
    ]
    try:
        for index in range(21):
            halves = []
            for rank in ranks:
                assert rank.stdout is not None
                number, keys = json.loads(rank.stdout.readline())
                assert number == index
                halves += keys
            assert halves == bucket.expected[index].keys
    finally:
        for rank in ranks:
            os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()
    assert set(bucket.proxy.gets().values()) == {1}  # both ranks share what one of them fetched
    bucket.check(read(bucket.config(cache=tmp_path / "empty"), start=21), start=21)


def test_store_that_stays_away_is_exit_75_and_changed_object_exit_2(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "BUDGET_S", 0.5)
    batches = read(bucket.config(cache=tmp_path / "a"))
    bucket.proxy.reset(share=1.0, kinds=("503",), match=lambda path: path.endswith(".tar"))
    with pytest.raises(RestartCanHelp, match=r"s3://bucket/set/shard-\d+\.tar: .*after \d+ attempts"):
        list(batches)
    bucket.proxy.reset(share=1.0, kinds=("short",), match=lambda path: path.endswith("000007.tar"))
    with pytest.raises(UserError, match=r"s3://bucket/set/shard-000007\.tar: \d+ bytes came; the manifest says"):
        list(read(bucket.config(cache=tmp_path / "b")))


def test_denied_or_missing_set_is_refused_at_once(bucket: Bucket, tmp_path: Path) -> None:
    began = time.monotonic()
    bucket.proxy.reset(share=1.0, kinds=("403",))
    with pytest.raises(UserError, match=r"s3://bucket/set/manifest\.json: access denied.*AWS_ACCESS_KEY_ID"):
        read(bucket.config(cache=tmp_path))
    bucket.proxy.reset()
    with pytest.raises(UserError, match="not a finished shard set"):
        read(bucket.config("s3://bucket/nothing", cache=tmp_path))
    assert time.monotonic() - began < 10


def test_run_from_the_bucket_learns_the_same_and_records_no_secret(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "hush-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-key")
    place._attached.cache_clear()
    data = bucket.config(cache=tmp_path / "cache").data
    for name, train in (("local", str(bucket.local)), ("remote", bucket.url)):
        c = tiny.config(tmp_path / name, Path("x"), train__steps=3, train__checkpoint_every=3)
        assert pretraining.pretrain(c.model_copy(update={"data": data.model_copy(update={"train": train})})) == 0
    losses = [
        [row["loss"] for row in row_file.read_rows(tmp_path / name / "metrics.jsonl")] for name in ("local", "remote")
    ]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]
    assert "slots on a node read from" in (tmp_path / "remote" / "log.txt").read_text()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"hush" not in path.read_bytes(), path


def test_small_cache_in_two_workers(bucket: Bucket, tmp_path: Path) -> None:
    limit = sum(s.bytes for s in manifests.load(bucket.local).shards) * 0.6 / 1e9
    c = bucket.config(cache=tmp_path, cache_gb=limit, slots=2)
    local = read(bucket.config(bucket.local, slots=2))
    for a, b in zip(local, read(c), strict=True):
        assert a.keys == b.keys
        assert not b.bad
    assert room.Room(tmp_path, None).held() <= limit * 1e9


def test_ranges_are_fetched_once_and_failures_change_nothing(bucket: Bucket, tmp_path: Path) -> None:
    """A cache without room for the shards: single images, counted at the proxy, then with one in five requests failing."""
    wide = bucket.config(cache=tmp_path / "a")
    least = working_set.working_set(wide, stream.open_data(wide), 1).least_by_ranges  # type: ignore[arg-type]
    for cache in ("a", "b"):
        faults = {"share": 0.2, "seed": 3, "kinds": ("503", "reset", "short", "flip")} if cache == "b" else {}
        bucket.proxy.reset(**faults)
        bucket.check(read(bucket.config(cache=tmp_path / cache, cache_gb=least / 1e9)))
        assert room.Room(tmp_path / cache, None).held() <= least
        if cache == "b":
            assert sum(bucket.proxy.errors.values()) >= 10
            continue
        indexes = bucket.proxy.gets(".index.jsonl")
        assert indexes == dict.fromkeys((manifests.index_path(Path(name)).name for name in names(bucket)), 1)
        # Two epochs of 25 batches of 8; less than all bytes of the tars, whose padding is left out.
        assert sum(bucket.proxy.gets().values()) <= 2 * SAMPLES
        assert bucket.proxy.bytes_of() <= 2 * sum(shard.bytes for shard in manifests.load(bucket.local).shards)


def test_commands_upload_and_verify_with_options_from_the_environment(bucket: Bucket, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "AWS_ENDPOINT_URL": bucket.proxy.url,
        "FSSPEC_S3_ANON": "true",
        "TMPDIR": str(tmp_path),
    }
    bucket.proxy.reset(share=0.1, seed=1, kinds=("503", "reset"))
    for command, place_ in (("upload", [str(bucket.local)]), ("verify", ["--workers=2"])):
        told = subprocess.run(
            [sys.executable, "-m", "esvit_scale", "shards", command, *place_, "s3://bucket/again"],
            env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert told.returncode == 0, told.stderr
    assert "every shard agrees with the manifest" in told.stdout
    puts = [path.rpartition("/")[2] for method, path, _ in bucket.proxy.log if method == "PUT"]
    assert puts[-1] == "manifest.json"
    assert len(set(puts)) == 2 * len(names(bucket)) + 1
