"""The lines that long work prints where there is no terminal."""

import pytest

from esvit_scale import progress
from esvit_scale.evaluate.progress import progress as on_rank_0


def test_a_line_shows_rate_and_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 11))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(on_rank_0([22, 22], "features of photos", 88, "images", int)) == [22, 22]
    assert "features of photos: 22/88 images, 2 images/s, 33 s left" in capsys.readouterr().err
    with progress.Progress(100, "images") as display:
        display.to(50)
    assert capsys.readouterr().err == "50/100 images, 4.55 images/s, 11 s left\n"
