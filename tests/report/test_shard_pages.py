"""Pictures of shard sets: that they show the samples they say."""

import html
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esvit_scale.data import shard_stats
from esvit_scale.data.shard_writer import Sample, write_samples
from esvit_scale.report import shard_pages

COLOURS = ["red", "lime", "blue", "yellow", "cyan", "magenta"]


@pytest.fixture
def plain_set(tmp_path: Path) -> Path:
    """One plain image of each colour, its key the colour's name, two classes with hostile names."""
    samples = []
    for i, name in enumerate(COLOURS):
        out = io.BytesIO()
        Image.new("RGB", (40, 30), name).save(out, "PNG")
        samples.append(Sample(name, i % 2, "png", out.getvalue()))
    samples.append(Sample("broken", 0, "png", b"no image"))
    write_samples(samples, tmp_path / "set", ("<b>&", "日本"), 3)
    return tmp_path / "set"


def test_contact_sheet_shows_every_sample(plain_set: Path) -> None:
    from esvit_scale.data import manifest as manifests

    shown = shard_pages.draw_samples(manifests.load(plain_set), 100, seed=0)
    assert {s.key for s in shown} == {*COLOURS, "broken"}
    assert [s.key for s in shown if s.image is None] == ["broken"]
    assert len(shard_pages.draw_samples(manifests.load(plain_set), 3, seed=0)) == 3
    sheet = Image.open(io.BytesIO(shard_pages.contact_sheet(shown, columns=3))).convert("RGB")
    step_x, step_y = shard_pages.SIDE + shard_pages.MARGIN, shard_pages.SIDE + shard_pages.CAPTION + shard_pages.MARGIN
    assert sheet.size == (3 * step_x + shard_pages.MARGIN, 3 * step_y + shard_pages.MARGIN)
    for at, sample in enumerate(shown):
        if sample.image is not None:
            centre = (
                shard_pages.MARGIN + at % 3 * step_x + shard_pages.SIDE // 2,
                shard_pages.MARGIN + at // 3 * step_y + shard_pages.SIDE // 2,
            )
            assert sheet.getpixel(centre) == Image.new("RGB", (1, 1), sample.key).getpixel((0, 0))
    page = shard_pages.contact_page(shown, "a <set>")
    assert page.count("<img ") == 6
    assert page.count('alt="') == 6
    assert "does not decode" in page
    assert html.escape("<b>&") in page
    assert "<b>&<" not in page
    assert "a &lt;set&gt;" in page


def test_overview_is_an_image(plain_set: Path) -> None:
    picture = np.asarray(Image.open(io.BytesIO(shard_pages.overview(shard_stats.gather(plain_set)))).convert("RGB"))
    assert picture.shape[0] > 300
    blue = (np.abs(picture.astype(int) - (0x3B, 0x82, 0xF6)).sum(-1) < 30).any(0)
    third = len(blue) // 3
    assert all(blue[i * third : (i + 1) * third].any() for i in range(3))  # something is drawn in every panel
