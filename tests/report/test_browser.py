"""The report in a real browser: it opens offline, loads nothing, says nothing on the console, and everything is seen."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from esvit_scale import config as configs
from esvit_scale.evaluate import correspondence
from esvit_scale.evaluate.attention import AttentionResult, attention, components, to_trunk
from esvit_scale.evaluate.correspondence import CorrespondenceResult
from esvit_scale.evaluate.features import FrozenTrunk
from esvit_scale.models.swin import Swin
from esvit_scale.report import evaluation_figures
from esvit_scale.report.html import write_report

pytestmark = pytest.mark.slow
SCREENS = {"desk": (1400, "light"), "dark desk": (1400, "dark"), "phone": (390, "dark")}


@pytest.fixture
def full(run: Path) -> Path:
    """The run with long curves and with the pictures of `evaluate correspondence` and `evaluate attention`."""
    rng = np.random.default_rng(0)
    names = (
        "loss",
        "loss_view",
        "loss_region",
        "teacher_entropy_view",
        "grad_norm",
        "images_per_s",
        "mfu",
        "lr",
        "odd",
    )
    rows = [{"step": i, **dict(zip(names, (1 + rng.random(9)).tolist(), strict=True))} for i in range(600)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "log.txt").write_text("10:00:00 warning: " + "a_long_word_" * 30 + "\n10:00:01 warning: step 7: a spike\n")
    bad = [{"step": 3, "key": f"a/folder/image-{i}.jpeg", "reason": "x" * 200} for i in range(9)]
    (run / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    environment = {"host": "h" * 80, "starts": 3, "packages": {f"package{i}": "1.2.3+cu128" for i in range(20)}}
    (run / "environment.json").write_text(json.dumps(environment))
    trunk = Swin(8, (1, 1, 2), (1, 2, 4), window=4, size=64)
    picture = rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)
    case = correspondence.mirrored(
        trunk, correspondence.extract_view(trunk, picture), "a/rather/long/name/of/a/picture.jpeg"
    )
    evaluation_figures.write_correspondences(
        CorrespondenceResult({}, [case] * 3, [case] * 3, correspondence.stereo(trunk)), run
    )
    pixels = to_trunk(picture)
    seen = AttentionResult(FrozenTrunk(trunk, 64, 1), picture, attention(trunk, pixels), components(trunk, pixels), [])
    evaluation_figures.write_attention(seen, run)
    return run


def look(browser: Any, page_file: Path, width: int, scheme: str) -> tuple[Any, list[str]]:
    """The open page, and everything it said or asked for."""
    events: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    page.on("console", lambda message: events.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: events.append(f"error: {error}"))
    own = page_file.resolve().as_uri()
    page.on(
        "request", lambda r: None if r.url == own or r.url.startswith("data:") else events.append(f"request: {r.url}")
    )
    page.goto(own)
    return page, events


def examine(page: Any, scheme: str) -> None:
    images = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])")
    assert images
    assert all(complete and natural > 0 and shown > 0 for complete, natural, shown in images)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    alts = page.evaluate("[...document.images].map(i => i.alt)")
    assert [alt for alt in alts if not re.search(r"\d", alt)] == []
    # A table that is wider than the page scrolls in its box, as far as its end.
    tables = page.evaluate("""() => [...document.querySelectorAll('table')].filter(t => t.clientWidth).map(t => {
        const box = t.closest('.scroll'), inside = box && box.getBoundingClientRect().right <= innerWidth;
        if (inside) box.scrollLeft = 1e6;
        return inside && t.getBoundingClientRect().right <= box.getBoundingClientRect().right + 1;
    })""")
    assert all(tables)
    # No text sticks out of its box, none lies over another: captions, tiles, links and headings.
    overlaps = page.evaluate("""() => {
        const boxes = [...document.querySelectorAll('h1, h2, h3, nav a, figcaption, .tile b, .tile span, .legend span, .head')]
            .map(e => [e.textContent.slice(0, 40), e.getBoundingClientRect()]);
        return boxes.flatMap(([a, p], i) => boxes.slice(i + 1)
            .filter(([b, q]) => p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1)
            .map(([b]) => a + ' / ' + b));
    }""")
    assert overlaps == []
    pixels = np.asarray(Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("L")).astype(float)
    assert pixels.std() > 10
    assert (np.median(pixels) > 128) == (scheme == "light")


@pytest.mark.parametrize("screen", SCREENS)
def test_page_of_one_run_renders(browser: Any, full: Path, screen: str) -> None:
    page, events = look(browser, write_report(full), *SCREENS[screen])
    examine(page, SCREENS[screen][1])
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    examine(page, SCREENS[screen][1])
    for words in ("About this run", "Config", "Correspondences", "Attention", "Components of the tokens", "Other"):
        assert page.get_by_role("heading", name=words, exact=True).is_visible()
    assert events == []


def test_page_of_several_runs_renders(browser: Any, full: Path, tmp_path: Path) -> None:
    others = []
    for i in range(5):
        others.append(tmp_path / f"other-{i}")
        others[-1].mkdir()
        values = configs.load(full / "config.yaml").model_dump(mode="json") | {
            "name": f"a-run-of-a-longer-name-{i}",
            "seed": i,
        }
        (others[-1] / "config.yaml").write_text(configs.dump(configs.validate(values, "test")))
        (others[-1] / "metrics.jsonl").write_text((full / "metrics.jsonl").read_text()[: 20000 * (i + 1)])
    for width, scheme in SCREENS.values():
        page, events = look(browser, write_report([full, *others]), width, scheme)
        examine(page, scheme)
        assert events == []


def test_page_of_a_run_without_rows_renders(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    page, events = look(browser, write_report(tmp_path), 1280, "light")
    assert page.get_by_text("curves: no step is logged").is_visible()
    assert events == []


def test_page_checks_detect_faults(browser: Any, tmp_path: Path) -> None:
    """The checks above on a page that breaks them."""
    bad = tmp_path / "bad.html"
    bad.write_text("<h2 style='position:absolute'>over</h2><h2>each other</h2><img src='http://localhost:9/x.png'>")
    page, events = look(browser, bad, 1280, "light")
    assert any(event.startswith("request: http://localhost") for event in events)
    with pytest.raises(AssertionError):
        examine(page, "light")
