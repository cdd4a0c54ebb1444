#!/usr/bin/env bash
# tensorboard 2.21.0: one write that fails ends the event writer for good.
#
# Expected: when a disk is full for a moment, this event is lost, or add_event raises once; writing continues when there is
# room again.
# Observed: the writing thread dies with a traceback on the console. From then on add_event and flush raise the same OSError
# in the thread that calls them (with torch.utils.tensorboard in the training loop, at any later add_scalar), also when there
# is room again. Here a limit on the size of files (EFBIG) takes the place of the full disk, because it can be lifted without
# root.
#
# Output: "limit reached: raises OSError 27; 3 of 3 later calls without the limit raise OSError 27"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install 'tensorboard==2.21.0' 'setuptools<81'
"$folder/venv/bin/python" - "$folder/logs" 2>"$folder/console" <<'PY'
import resource, signal, sys, time

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.event_file_writer import EventFileWriter

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails with EFBIG instead of ending the process


def attempt():
    try:
        writer.add_event(Event(step=1, file_version="x" * 500))
        writer.flush()
    except OSError as error:
        return error.errno
    return None


writer = EventFileWriter(sys.argv[1])
assert attempt() is None
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
first = next(error for error in (attempt() for _ in range(100)) if error)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))  # there is room again
time.sleep(0.5)
later = [attempt() for _ in range(3)]
print(f"limit reached: raises OSError {first}; {sum(map(bool, later))} of 3 later calls without the limit raise OSError {later[0]}")
assert later == [first] * 3
PY
grep -q '^Traceback' "$folder/console"
