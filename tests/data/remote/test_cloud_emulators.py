"""Shard sets in Azure and Google Cloud Storage as their emulators on 127.0.0.1 serve them, through adlfs and gcsfs."""

import importlib
import os
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from esvit_scale import cli
from esvit_scale.data.remote import room, store
from tests.data.remote.conftest import check_joined, config, read, same
from tests.object_store import free_ports

pytestmark = pytest.mark.slow

# The account and key that every Azurite has.
AZURE = "DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;AccountKey="
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


class Emulator(NamedTuple):
    """How a store is emulated."""

    library: str
    program: str
    install: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    bucket: str
    options: dict[str, Any]  # data.storage_options


EMULATORS = {
    "azure": Emulator(
        "adlfs", "azurite-blob", "npm install azurite",
        ("--blobHost", "127.0.0.1", "--blobPort", "{port}", "--location", "{work}", "--silent", "--disableTelemetry", "--skipApiVersionCheck"),
        {"AZURE_STORAGE_CONNECTION_STRING": AZURE + KEY}, "az://box", {},
    ),
    "google": Emulator(
        "gcsfs", "gcp-storage-emulator", "pip install gcp-storage-emulator",
        ("start", "--host=127.0.0.1", "--port={port}", "--in-memory", "--default-bucket=box"),
        # Otherwise gcsfs asks for the kind of each bucket by gRPC first, for minutes.
        {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:{port}", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"},
        "gs://box", {"token": "anon"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(EMULATORS))
def bucket(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """A running emulator with an empty bucket; its address and credentials are in the environment."""
    found = EMULATORS[request.param]
    places = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))
    binary = shutil.which(found.program, path=places)
    if binary is None:
        pytest.skip(f"{found.program} is not installed ({found.install})")
    [port], work = free_ports(1), tmp_path_factory.mktemp("work")
    filled = [each.format(port=port, work=work) for each in found.arguments]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment.items():
            patch.setenv(name, value.format(port=port))
        # gcsfs reads the environment when it is imported.
        pytest.importorskip(found.library, reason=f"{found.library} is not installed (pip install {found.library})")
        with (work / "log").open("wb") as log:
            process = subprocess.Popen([binary, *filled], stdout=log, stderr=log)
        if found.options:
            patch.setenv("FSSPEC_GS_TOKEN", found.options["token"])
            importlib.import_module("fsspec.config").set_conf_env(importlib.import_module("fsspec.config").conf)
        try:
            wait_for(port, work / "log")
            opened, _ = store._file_system(found.bucket, found.options)
            if not opened.exists("box"):
                opened.mkdir("box")
            yield found
        finally:
            process.kill()
            process.wait()


def wait_for(port: int, log: Path) -> None:
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail(log.read_text())


def test_two_ranks_and_a_resume_from_the_bucket_equal_the_local_set(
    bucket: Emulator, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{bucket.bucket}/set"
    assert cli.main(["shards", "upload", str(shards), url]) == 0
    assert cli.main(["shards", "verify", url, "--workers", "1"]) == 0
    local = list(read(config(shards, tmp_path / "unused")))
    at = {"storage_options": bucket.options, "workers": 1}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_joined(local, [list(read(config(url, tmp_path / "cache", **at), rank, 2)) for rank in (0, 1)])
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert same(local[7:], list(read(config(url, tmp_path / "empty", **at), start=7)))


def test_images_by_ranges_equal_the_local_set(bucket: Emulator, shards: Path, tmp_path: Path) -> None:
    url = f"{bucket.bucket}/ranged"
    assert cli.main(["shards", "upload", str(shards), url]) == 0
    limit = sum(path.stat().st_size for path in shards.glob("*.tar")) * 0.45 / 1e9
    c = config(url, tmp_path / "cache", storage_options=bucket.options, cache_gb=limit)
    assert same(list(read(config(shards, tmp_path / "unused"))), list(read(c)))
    assert room.Room(tmp_path / "cache", None).held() <= limit * 1e9
