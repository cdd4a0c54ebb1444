"""The documentation as a site, in a real browser: nothing comes from a server, nothing sticks out, the search works."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
WIDTHS = (1400, 390)
# What a page with a fault shows: the side of an element that is wider than the page and that nothing scrolls.
STICKING_OUT = """() => [...document.querySelectorAll('.md-content *')]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
    .filter(e => { for (let p = e.parentElement; p; p = p.parentElement)
        if (['auto', 'scroll'].includes(getComputedStyle(p).overflowX)) return false
        return !['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX) && e.offsetParent })
    .map(e => e.tagName + ': ' + e.textContent.slice(0, 60))"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning (a dead link, a page that docs/README.md does not list) is an error."""
    if importlib.util.find_spec("material") is None or importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs-material is not installed (the extra `docs`)")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def addresses(site: Path) -> list[str]:
    return sorted(str(page.relative_to(site)) for page in site.rglob("*.html") if page.name != "404.html")


def opened(browser: Any, site: Path, width: int = 1400) -> tuple[Any, list[str]]:
    """A window of this width, and what its pages ask of others or say on the console from now on."""
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
    page, events = context.new_page(), []
    page.on("console", lambda message: events.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: events.append(f"error: {error}"))
    page.on("requestfailed", lambda request: events.append(f"failed: {request.url}"))
    own = (site.as_uri() + "/", "data:", "blob:", "about:")
    page.on("request", lambda r: None if r.url.startswith(own) else events.append(f"request: {r.url}"))
    return page, events


def test_every_page_fits_the_screen_and_loads_nothing(browser: Any, site: Path) -> None:
    page, events = opened(browser, site)
    everything = addresses(site)
    sources = [address for address in everything if address.startswith("source/")]
    looked_at = [address for address in everything if address not in sources[2:]]  # these are all alike
    assert len(looked_at) > 27
    wrong = []
    for address in looked_at:
        page.goto((site / address).as_uri())
        page.add_style_tag(content="* { transition: none !important }")  # a menu that slides away is too wide
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            too_wide = page.evaluate("document.documentElement.scrollWidth > innerWidth")
            if too_wide or (out := page.evaluate(STICKING_OUT)):
                wrong.append(f"{address}: at {width} pixels {'it scrolls sideways' if too_wide else out}")
        images = page.evaluate("[...document.images].map(i => [i.src, i.complete && i.naturalWidth > 0])")
        wrong += [f"{address}: {source} is not shown" for source, is_shown in images if not is_shown]
    assert wrong == []
    assert events == []


def test_navigation_leads_from_first_steps_to_reference(browser: Any, site: Path) -> None:
    page, _ = opened(browser, site)
    page.goto((site / "index.html").as_uri())
    sections = page.locator(".md-nav--primary > .md-nav__list > .md-nav__item--section > label").all_inner_texts()
    assert sections[0] == "First steps"
    assert sections[-1] == "Reference"


def test_code_inside_a_numbered_list_stays_in_its_item(browser: Any, site: Path) -> None:
    """Python-Markdown wants it indented by four spaces, CommonMark by three."""
    page, _ = opened(browser, site)
    page.goto((site / "slurm.html").as_uri())
    assert page.locator("ol > li:has-text('Write shards') pre").count() == 1
    assert page.locator(".md-content ol").first.locator("> li").count() == 7


def test_search_works_without_a_server(browser: Any, site: Path) -> None:
    page, events = opened(browser, site)
    page.goto((site / "source/constraints.html").as_uri())  # from a page that lies deeper
    page.click("input[name=query]")
    page.keyboard.type("quarantine.jsonl")
    page.locator(".md-search-result__item").first.wait_for(timeout=10_000)
    found = page.locator(".md-search-result__link").evaluate_all("all => all.map(a => a.href)")
    assert any("runs.html" in link for link in found)
    assert not any("changelog.html" in link or "/source/" in link for link in found)
    assert events == []


def test_links_out_of_docs_lead_to_pages_of_the_site(site: Path) -> None:
    assert 'href="source/esvit_scale/__init__.py.html"' in (site / "pages.html").read_text()
    assert "_LAZY" in (site / "source/esvit_scale/__init__.py.html").read_text()
    assert 'href="slurm_scripts.html"' in (site / "slurm.html").read_text()


def test_faults_are_found(browser: Any, site: Path) -> None:
    """The checks above on a page that breaks them."""
    bad = site / "bad.html"
    bad.write_text(
        "<div class='md-content'><p style='width: 2000px'>wide</p></div><img src='http://localhost:9/x.png'>"
        "<script src='https://unpkg.com/mermaid'></script>"
    )
    page, events = opened(browser, site, 390)
    page.goto(bad.as_uri())
    bad.unlink()
    assert page.evaluate(STICKING_OUT) == ["P: wide"]
    assert sum(event.startswith("request: http") for event in events) == 2
