"""Requests to a store: retries, options, and the limits that the processes of a node share."""

import sys
import threading
import time
import types
from pathlib import Path

import fsspec.config
import pytest

from esvit_scale.data.remote import place, store
from esvit_scale.data.remote.store import Denied, Missing, Store, StoreUnreachable
from esvit_scale.errors import RestartCanHelp
from tests.data.remote.conftest import config


def test_transient_failures_are_retried_within_a_budget(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = place.open_set(f"file://{shards}", config("", tmp_path).data)
    opened = Store(f"file://{shards}", {}, manifest.root.parent)
    failures: list[Exception] = [OSError(5, "Input/output error"), TimeoutError(), ConnectionResetError(104, "reset")]
    get_file = opened._fs.get_file

    def flaky(source: str, target: str, callback: object) -> None:
        if failures:
            raise failures.pop()
        get_file(source, target)

    monkeypatch.setattr(opened._fs, "get_file", flaky)
    opened.fetch("shard-000000.tar", tmp_path / "got", urgent=True)
    assert (tmp_path / "got").read_bytes() == (shards / "shard-000000.tar").read_bytes()
    failures += [OSError(16, "SlowDown")] * 1000
    monkeypatch.setattr(store, "BUDGET_S", 0.2)
    with pytest.raises(StoreUnreachable, match=r"shard-000001\.tar: .*SlowDown, after \d+ attempts") as caught:
        opened.fetch("shard-000001.tar", tmp_path / "got", urgent=True)
    assert isinstance(caught.value, RestartCanHelp)
    assert 3 < 1000 - len(failures) < 40


def test_retry_after_is_obeyed_and_status_decides() -> None:
    class HttpError(Exception):
        def __init__(self, status: int, **headers: str) -> None:
            self.status, self.headers = status, headers

    HttpError.__module__ = "aiohttp.client_exceptions"
    boto = type("ClientError", (Exception,), {"__module__": "botocore.exceptions"})()
    boto.response = {"ResponseMetadata": {"HTTPStatusCode": 503, "HTTPHeaders": {"retry-after": "7"}}}
    wrapped = OSError(16, "Please reduce your request rate")
    wrapped.__cause__ = boto
    assert store._retry_after(HttpError(429, **{"Retry-After": "3"})) == 3
    assert store._retry_after(wrapped) == 7
    assert store._retry_after(HttpError(503, **{"Retry-After": "86400"})) == 60
    assert store._retry_after(OSError()) == 0
    kinds = {status: store._kind(HttpError(status)) for status in (429, 500, 503, 403, 401, 404)}
    assert kinds == {
        429: StoreUnreachable,
        500: StoreUnreachable,
        503: StoreUnreachable,
        403: Denied,
        401: Denied,
        404: Missing,
    }
    assert store._kind(wrapped) is StoreUnreachable
    assert store._kind(KeyError("x")) is None
    assert store._kind(OSError(28, "No space left on device")) is None


def test_options_of_ours_the_environment_and_the_user_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    addressing = {"addressing_style": "path"}
    joined = store._joined_options("s3", {"anon": True, "config_kwargs": {"s3": addressing, "read_timeout": 5}})
    assert joined["config_kwargs"] == {
        "retries": {"total_max_attempts": 1},
        "connect_timeout": 10,
        "read_timeout": 5,
        "s3": addressing,
    }
    assert joined["anon"]
    assert joined["max_concurrency"] == 1
    joined["config_kwargs"]["retries"]["mode"] = "legacy"  # as botocore does with what it is given
    assert store._joined_options("s3", {})["config_kwargs"]["retries"] == {"total_max_attempts": 1}
    monkeypatch.setitem(sys.modules, "aiohttp", types.SimpleNamespace(ClientTimeout=lambda **limits: limits))
    monkeypatch.setitem(fsspec.config.conf, "https", {"client_kwargs": {"headers": {"x": "y"}}})
    joined = store._joined_options("https", {"block_size": 0})
    assert joined["client_kwargs"]["headers"] == {"x": "y"}
    assert joined["client_kwargs"]["timeout"]["total"] is None  # otherwise every transfer ends after 5 minutes


def test_connections_of_a_node_are_bounded(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CONNECTIONS", 3)
    monkeypatch.setattr(store, "RESERVED", 1)
    stores, now, most = [Store(f"file://{shards}", {}, tmp_path) for _ in range(4)], [0], [0]
    mutex = threading.Lock()

    def slow(source: str, target: str, callback: object) -> None:
        with mutex:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.03)
        with mutex:
            now[0] -= 1

    for each in stores:
        monkeypatch.setattr(each._fs, "get_file", slow)
    jobs = [
        threading.Thread(target=lambda s=s: s.fetch("shard-000000.tar", tmp_path / "x", urgent=False))
        for s in stores for _ in range(3)
    ]  # fmt: skip
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(30)
    assert most[0] == 2  # one is left for a process that waits


def test_requests_of_a_node_are_paced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "REQUESTS_PER_SECOND", 50)
    began = time.monotonic()
    for _ in range(11):
        store._pace(tmp_path / ".pace", store.REQUESTS_PER_SECOND)
    assert 0.19 < time.monotonic() - began < 1
