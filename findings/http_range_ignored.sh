#!/usr/bin/env bash
# fsspec 2026.9.0, HTTP file system: a ranged read from a server without ranges returns the whole file.
#
# Expected: cat_file(url, start, end) returns end − start bytes or raises, as opening the file and seeking does
# ("doesn't appear to support range requests").
# Observed: a server may ignore a Range header (RFC 9110, section 14.2); it answers 200 with everything, as Python's
# own http.server does. cat_file and cat_ranges pass all of it on without an error. Reading one member of a tar shard by
# its offset then yields the first bytes of the shard.
#
# Output: file of 100,000 bytes; cat_file(1000, 1512) 100,000 bytes; cat_ranges [100000, 100000]; seek: ValueError.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check fsspec==2026.9.0 aiohttp==3.14.5
mkdir "$work/served"
"$work/venv/bin/python" - "$work/served" <<'PY'
import functools
import http.server
import os
import pathlib
import sys
import threading

import fsspec

content = os.urandom(100_000)
pathlib.Path(sys.argv[1], "shard.tar").write_bytes(content)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=sys.argv[1]))
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/shard.tar"
files = fsspec.filesystem("http")
one = files.cat_file(url, start=1000, end=1512)
several = files.cat_ranges([url, url], [0, 5000], [512, 5512])
print(f"asked for 512 bytes: cat_file gave {len(one)}, cat_ranges {[len(part) for part in several]}")
assert one == content and all(part == content for part in several), "ranges are checked now: the behaviour has changed"
try:
    with files.open(url) as file:
        file.seek(1000)
        file.read(512)
except ValueError as error:
    print(f"open and seek: ValueError: {error}")
else:
    raise AssertionError("seeking no longer raises: the behaviour has changed")
PY
