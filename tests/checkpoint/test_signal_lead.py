"""A save that takes longer than the time between a job's signal and its end is warned of."""

import logging
import time

import pytest

from esvit_scale.checkpoint import signal_lead


@pytest.mark.parametrize(("seconds", "warned"), [("0", True), ("5", False), ("", False)])
def test_save_slower_than_the_signal_lead_gives_a_warning(monkeypatch, caplog, seconds: str, warned: bool) -> None:
    monkeypatch.setenv("ESVIT_SIGNAL_LEAD", seconds)
    monkeypatch.setattr(signal_lead.log, "propagate", True)

    @signal_lead.warn_if_longer()
    def save() -> int:
        time.sleep(0.01)
        return 7

    with caplog.at_level(logging.WARNING, logger=signal_lead.log.name):
        assert save() == 7
    assert ("--signal-lead 60" in caplog.text) is warned
