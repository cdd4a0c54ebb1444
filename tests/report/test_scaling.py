"""The report of a fit: every figure in both formats, and a page that stands alone."""

import io
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from esvit_scale import cli
from esvit_scale.report import scaling_figures
from esvit_scale.scaling import fit
from esvit_scale.scaling.table import Columns
from tests.scaling import laws


@pytest.fixture(scope="module")
def two_inputs(tmp_path_factory):
    folder, x = tmp_path_factory.mktemp("fit"), laws.isoflop()
    table = laws.write(folder / "f.csv", x, laws.measure(x, 0.01))
    fit.run(table, Columns(("N", "D"), "loss"), folder, fit.Options(resamples=60, predict=(5e21,)))
    return folder


def test_report_of_a_two_input_fit_has_every_figure(two_inputs, capsys):
    assert cli.main(["sweep", "report", str(two_inputs / "fit.json"), "--tflops", "400"]) == 0
    page = (two_inputs / "scaling.html").read_text()
    for section in ("curve", "isoflop", "frontier", "residuals"):
        picture = Image.open(io.BytesIO((two_inputs / f"scaling-{section}.png").read_bytes()))
        assert picture.width > 1500
        assert len(picture.convert("RGBA").resize((60, 40)).getcolors(2400)) > 20  # not empty
        assert (two_inputs / f"scaling-{section}.svg").read_text().startswith("<?xml")
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is fetched
    assert "Next, at 5e+21 FLOPs (5 × the largest measured)" in page
    assert "GPU hours at 400 TFLOP/s" in page


def test_report_of_a_one_input_fit(tmp_path):
    x = laws.isoflop()
    table = laws.write(tmp_path / "f.csv", 6 * x[:, :1] * x[:, 1:], laws.measure(x, 0.01), "flops,loss")
    fit.run(table, Columns(("flops",), "loss"), tmp_path, fit.Options("power", resamples=40))
    assert cli.main(["sweep", "report", str(tmp_path)]) == 0
    assert (tmp_path / "scaling.html").read_text().count("data:image/png;base64,") == 2


def test_missing_fit_is_one_line(tmp_path, capsys):
    assert cli.main(["sweep", "report", str(tmp_path)]) == 2
    assert "`sweep fit` makes it" in capsys.readouterr().err


@pytest.mark.parametrize("ratio", [1.3, 3.9, 29, 1e7])
def test_labels_of_ticks_do_not_overlap(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    """Every drawn label of every axis, over ranges from a third of a decade to seven."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: drawn.append(figure))
    compute = np.geomspace(4e18, 4e18 * ratio, 12)
    error = compute**-0.1
    band = scaling_figures.Band(compute, error, error * 0.9, error * 1.1)
    scaling_figures.curve(compute, error, np.geomspace(3.1e6, 3.1e6 * ratio, 12), band, band, "FLOPs", "error")
    scaling_figures.frontier(band, band, compute.max(), (compute[:3], error[:3]), "N", "D", "FLOPs")
    labels = 0
    for figure in drawn[::2]:
        figure.canvas.draw()
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            boxes = [t.label1.get_window_extent() for t in ticks if t.label1.get_text() and low <= t.get_loc() <= high]
            labels += len(boxes)
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    assert labels >= 10
