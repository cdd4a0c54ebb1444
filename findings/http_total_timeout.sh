#!/usr/bin/env bash
# fsspec 2026.9.0 with aiohttp 3.14.5, HTTP file system: a transfer ends after 300 seconds however well it goes, and the
# seconds in which the caller does not read count too.
#
# Expected: a time-out ends connections that are silent, as in s3fs, whose read_timeout is for each read. A stream from
# a fast server that is read at the speed of training stays open.
# Observed: fsspec leaves aiohttp its default: 300 s in all, from the request to the last byte, and no limit for
# silence. get_file of a large file over a slow link fails although bytes keep arriving, and leaves a fragment at the
# destination. A stream (block_size=0, or a server without ranges) breaks off under a reader that pauses between its
# reads. The FSTimeoutError has no text. client_kwargs={"timeout": aiohttp.ClientTimeout(total=None, sock_read=60)}
# avoids it.
#
# The script reads the default from the library's own session, and then shows its effect with 2 s in its place.
#
# Output: the default: total 300, sock_read None
#   total=2: get_file, 10,000 bytes each 0.1 s: 190000 of 500000 bytes, FSTimeoutError('') after 2.0 s
#   total=2: reader that pauses for 0.05 s: 13290000 of 20000000 bytes, FSTimeoutError('') after 2.0 s
#   sock_read=2: all bytes of both
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check fsspec==2026.9.0 aiohttp==3.14.5
cd "$work"
"$work/venv/bin/python" - <<'PY'
import contextlib
import http.server
import os
import threading
import time

import aiohttp
import fsspec
from fsspec.asyn import sync

PIECES = {"/slow.tar": (50, 10_000, 0.1), "/fast.tar": (2000, 10_000, 0)}  # number, bytes, seconds after each


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        count, size, pause = PIECES[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(count * size))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for _ in range(count):
                self.wfile.write(bytes(size))
                time.sleep(pause)

    def log_message(self, *args):
        pass


def download(files):
    """Fetch a file to which a slow link adds 10,000 bytes each 0.1 s."""
    try:
        files.get_file(f"{address}/slow.tar", "local.tar")
    finally:
        print(f"  get_file: {os.path.getsize('local.tar')} of 500000 bytes")


def read_with_pauses(files):
    """Read a stream of which every byte can be had at once, and work for 0.05 s after each read."""
    received = 0
    try:
        with files.open(f"{address}/fast.tar", block_size=0) as stream:
            while part := stream.read(400_000):
                received += len(part)
                time.sleep(0.05)
    finally:
        print(f"  paused reader: {received} of 20000000 bytes")


def failure(run, **limits):
    """Return the exception of a transfer and the seconds that it took; None for no exception."""
    files = fsspec.filesystem("http", client_kwargs={"timeout": aiohttp.ClientTimeout(**limits)})
    began = time.monotonic()
    try:
        run(files)
    except Exception as error:
        seconds = time.monotonic() - began
        print(f"  {type(error).__name__}({str(error)!r}) after {seconds:.1f} s")
        return type(error).__name__, round(seconds)
    return None


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
server.daemon_threads = True
threading.Thread(target=server.serve_forever, daemon=True).start()
address = f"http://127.0.0.1:{server.server_port}"

files = fsspec.filesystem("http")
default = sync(files.loop, files.set_session).timeout
print(f"the default: total {default.total}, sock_read {default.sock_read}")
assert (default.total, default.sock_read) == (300, None), "the default has changed"
for run in (download, read_with_pauses):
    print("with total=2:")
    assert failure(run, total=2) == ("FSTimeoutError", 2), "the transfer goes on now: the behaviour has changed"
    print("with sock_read=2:")
    assert failure(run, total=None, sock_read=2) is None, "bytes did not keep arriving"
PY
