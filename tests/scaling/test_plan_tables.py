"""docs/plan_at_scale.md holds the tables that benchmarks/plan_tables.py computes."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("plan_tables")


def committed(tables, name):
    text = tables.PAGE.read_text(encoding="utf-8")
    begin, end = tables.between(text, name)
    return text[begin:end]


@pytest.mark.slow
def test_page_has_the_tables_of_the_smaller_preset(tables):
    assert committed(tables, "swinv2_1b-64") == tables.one("swinv2_1b-64")


@pytest.mark.slow
@pytest.mark.long
def test_page_has_all_tables(tables):
    for name, content in tables.sections().items():
        assert committed(tables, name) == content, name
    machine = tables.MACHINE
    text = tables.PAGE.read_text(encoding="utf-8")
    for said in (f"{machine.tflops:.0f} TFLOP/s", f"{machine.bandwidth:,.0f} GB/s", f"{machine.network:.0f} Gb/s"):
        assert said in text
