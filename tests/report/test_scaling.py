"""The report of a fit: every figure in both formats, and a page that stands alone."""

import io
import re

import pytest
from PIL import Image

from esvit_scale import cli
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
