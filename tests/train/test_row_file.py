"""metrics.jsonl and quarantine.jsonl after power failures, full disks and editors."""

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from esvit_scale.errors import UserError
from esvit_scale.train import metrics
from esvit_scale.train.row_file import MAX_LINE, RowFile, cut, read_rows

ROWS = [b'{"step": %d, "loss": 0.5}\n' % step for step in range(1, 5)]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("esvit_scale"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.mark.parametrize(
    ("bad", "lines"),
    [
        (b"\xff\xfe{\x80\n", 1),
        (b'{"step": 2, "lo\n', 1),
        (bytes(4096) + b"\n", 1),
        (b"[1, 2]\n12\nnull\n", 3),
        (b'{"loss": 1}\n{"step": "2"}\n', 2),
        (b"[" * 100_000 + b"\n", 1),
        (b"x" * (3 * MAX_LINE) + b"\n", 1),
        (b"\n\r\n", 0),
    ],
    ids=["bytes", "torn", "NULs", "no objects", "no step", "deep", "huge", "blank"],
)
def test_reading_skips_only_damaged_lines(
    tmp_path: Path, bad: bytes, lines: int, said: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(ROWS[0] + ROWS[1] + bad + ROWS[2] + ROWS[3])
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]
    metrics.cut(path, 3)
    assert path.read_bytes() == b"".join(ROWS[:3])
    words = "1 damaged line was" if lines == 1 else f"{lines} damaged lines were"
    assert (f"{words} left out, 3 rows kept" in said.text) == (lines > 0)


def test_rows_after_nuls_or_an_unfinished_row_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(ROWS[0] + bytes(5 * MAX_LINE) + ROWS[1] + b'{"step": 3, "lo' + ROWS[3] + bytes(512))
    metrics.cut(path, 9)
    assert path.read_bytes() == ROWS[0] + ROWS[1] + ROWS[3]


@pytest.mark.parametrize("end", [b"", b'{"step": 3', ROWS[2].strip(), bytes(100)])
def test_unfinished_last_line_is_not_reported_as_damage(
    tmp_path: Path, end: bytes, said: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(ROWS[0] + ROWS[1] + end)
    metrics.cut(path, 9)
    whole = end == ROWS[2].strip()
    assert path.read_bytes() == b"".join(ROWS[: 3 if whole else 2])
    assert not said.text


def test_cut_truncates_in_place(tmp_path: Path) -> None:
    """A full disk has no space for a second copy."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(ROWS))
    before = path.stat().st_ino
    metrics.cut(path, 2)
    assert (path.stat().st_ino, path.read_bytes()) == (before, b"".join(ROWS[:2]))
    metrics.cut(tmp_path / "absent.jsonl", 2)


def test_folder_in_place_of_a_file_is_one_error_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be read: Is a directory"):
        cut(tmp_path / "metrics.jsonl", lambda row: True)


def test_rows_wait_while_the_disk_is_full_and_stay_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    room, write = [20], os.write

    def limited(handle: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(handle, data[: room[0]])
        room[0] -= count
        return count

    file = RowFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", limited)
        file.append({"step": 2})  # 13 bytes fit, and then 7 of the next
        file.append({"step": 3})
        file.append({"step": 4})
        assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    file.append({"step": 5})
    file.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert said.text.count("cannot be written: No space left on device; training continues") == 1
    assert said.text.count("the 3 rows that waited are in it") == 1


def test_close_logs_the_number_of_lost_rows(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    file = RowFile(tmp_path / "gone" / "metrics.jsonl")
    file.append({"step": 1})
    file.append({"step": 2})
    file.close()
    assert "2 rows could not be written" in said.text


def test_full_disk_disables_tensorboard_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    board = metrics.TensorBoard(tmp_path / "tensorboard", 0)
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", full)
        for step in range(1, 60):
            board.add({"step": step, "loss": 1.0})
    monkeypatch.setattr(board, "_retry_at", 0.0)
    board.add({"step": 60, "loss": 1.0})
    board.close()
    assert said.text.count("tensorboard: cannot be written: No space left on device; metrics.jsonl holds") == 1
    assert "Traceback" not in capfd.readouterr().err
    assert len(list((tmp_path / "tensorboard").iterdir())) >= 1


def test_row_format_is_unchanged(tmp_path: Path) -> None:
    row = {"step": 1, "loss": float("nan"), "key": "ü"}
    file = RowFile(tmp_path / "r.jsonl")
    file.append(row)
    file.close()
    assert (tmp_path / "r.jsonl").read_text() == json.dumps(row) + "\n"
