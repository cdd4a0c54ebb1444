"""What a long evaluation says where there is no terminal."""

import pytest

from esvit_scale.evaluate import progress


def test_a_line_says_rate_and_eta(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 11))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(progress.progress([22, 22], "features of photos", 88, "images", int)) == [22, 22]
    assert "features of photos: 22/88 images · 2 images/s · ETA 33 s" in capsys.readouterr().err
