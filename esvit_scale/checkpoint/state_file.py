"""Reading and writing a step folder's state.json, and checking the folder's other files against it.

state.json records a checkpoint's cursor, shapes and config, the size and SHA-256 of every other file in the folder, and
the SHA-256 of its own content (all other fields), so that a resume can verify everything it reads.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from esvit_scale import files
from esvit_scale.checkpoint import storage
from esvit_scale.errors import UserError

FORMAT_VERSION = 2  # version 1 had no checksum of state.json itself
READABLE_VERSIONS = (1, 2)
STATE = "state.json"
OWN_CHECKSUM = "sha256"


def read_state(folder: Path) -> dict[str, Any]:
    """Return the content of a step folder's state.json after verifying the file's own checksum.

    Raises:
        UserError: the folder has no state.json, or the file is damaged or was written by a newer version.
        OSError: the file exists but cannot be read.
    """
    path = folder / STATE
    try:
        state = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder}: not a checkpoint (no {STATE}); give a run dir or one of its step folders") from None
    except (IsADirectoryError, NotADirectoryError):
        raise UserError(f"{path}: damaged: it is not a file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged: {' '.join(str(error).split())[:200]}") from None
    version = state.get("format_version") if isinstance(state, dict) else None
    if not isinstance(state, dict) or (version in READABLE_VERSIONS and not _is_well_formed(state)):
        raise UserError(f"{path}: damaged: fields that every checkpoint has are missing or of the wrong type")
    if version not in READABLE_VERSIONS:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise UserError(f"{path}: format version {version}; this version of esvit-scale reads {readable}")
    if (version > 1 or OWN_CHECKSUM in state) and state.get(OWN_CHECKSUM) != _checksum(state):
        raise UserError(f"{path}: damaged: its content has changed since it was written")
    return state


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` as state.json, adding the format version and a checksum of the content."""
    state = {"format_version": FORMAT_VERSION, **state}
    files.write_json(folder / STATE, state | {OWN_CHECKSUM: _checksum(state)})


def commit(tmp: Path, folder: Path, state: dict[str, Any]) -> None:
    """Write state.json into the temporary folder `tmp` and rename it to `folder`, replacing an existing folder."""
    write_state(tmp, state)
    files.commit_folder(tmp, folder, replace=True)  # a replaced folder that is left over is removed at the next start


def check_files(folder: Path) -> None:
    """Verify the size and SHA-256 of every file in a step folder against state.json.

    Raises:
        UserError: a file is missing or has changed since it was written.
    """
    recorded = read_state(folder)["files"]
    found = [problem for name, entry in recorded.items() for problem in storage.file_problems(folder / name, entry)]
    if found:
        raise UserError(f"{folder}: damaged: {'; '.join(found)}")


def check_index(folder: Path, state: dict[str, Any]) -> None:
    """Verify the SHA-256 of the tensor index and the sizes of all other files: cheap, for reading only a few tensors.

    Args:
        state: the content of the folder's state.json.

    Raises:
        UserError: a file is missing or has another size, or the index has changed since it was written.
    """
    found = []
    for name, entry in state["files"].items():
        check = storage.file_problems if name == storage.INDEX_FILE else storage.size_problems
        found += check(folder / Path(name).name, entry)
    if found:
        raise UserError(f"{folder}: damaged: {'; '.join(found[:3])}")


def _checksum(state: dict[str, Any]) -> str:
    content = {key: value for key, value in state.items() if key != OWN_CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_well_formed(state: dict[str, Any]) -> bool:
    """Return whether the fields that all format versions have are there, of the right types and consistent."""
    cursor, recorded, steps = state.get("cursor"), state.get("files"), state.get("optimizer_steps")
    if not (isinstance(cursor, dict) and isinstance(recorded, dict) and isinstance(steps, dict)):
        return False
    if not (isinstance(state.get("shapes"), dict) and isinstance(state.get("config"), dict)):
        return False
    numbers = [*cursor.values(), *steps.values(), *(e.get("bytes") for e in recorded.values() if isinstance(e, dict))]
    if not all(type(number) is int and number >= 0 for number in numbers):
        return False
    if not all(isinstance(entry, dict) and isinstance(entry.get("sha256"), str) for entry in recorded.values()):
        return False
    if {"step", "data_offset", "batch_index"} <= cursor.keys():
        return bool(cursor["step"] + cursor["data_offset"] == cursor["batch_index"])
    return "step" in cursor
