"""The report is one file that needs nothing else, says what is missing, and never trusts a name."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esvit_scale import config as configs
from esvit_scale.data import shard_writer
from esvit_scale.errors import UserError
from esvit_scale.report.html import write_report

EVIL = 'cat <script>alert("x")</script> & co'
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Tags are balanced; collects the text, and every attribute that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.tags: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def parse(path: Path) -> Page:
    text = path.read_text()
    page = Page(text)
    assert not page.open
    assert all(load.startswith("data:") for load in page.loads)
    assert "url(" not in text
    assert "@import" not in text
    return page


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    root = tmp_path / "photographs"
    rng = np.random.default_rng(0)
    for c, name in enumerate((EVIL.replace("/", "-"), "dog")):
        (root / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 80, (40, 40, 3)) + 150 * c
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def run(tmp_path: Path, photographs: Path) -> Path:
    """A run dir with everything in it."""
    run = tmp_path / "run"
    run.mkdir()
    shard_writer.create(photographs, run / "shards")
    crops = "data.global_crops.size=32"
    overrides = [crops, f"data.train={run / 'shards'}", "data.local_crops.0.count=3", "name=named-run"]
    (run / "config.yaml").write_text(configs.dump(configs.resolve("swin_t", overrides)))
    rows = [{"step": i, "images_seen": 64 * i, "loss": 6.5, "loss_view": 6.4, "lr": 1e-3} for i in range(1, 9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 9, "lo')
    (run / "summary.json").write_text(json.dumps({"finished": True, "nested": {"key": EVIL}}))
    (run / "environment.json").write_text(json.dumps({"host": EVIL}))
    (run / "knn.json").write_text(json.dumps(knn_result(run / "shards", photographs)))
    return run


def knn_result(train: Path, test: Path) -> dict:
    from esvit_scale.evaluate.features import raw_pixels
    from esvit_scale.evaluate.knn import evaluate, labelled

    sets = [labelled(raw_pixels(source, 16, workers=0), source) for source in (train, test)]
    return {"checkpoint": "x", "step": 8, "train": str(train), "test": str(test)} | evaluate(*sets)


def test_full_report(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    page = parse(path)
    assert "script" not in page.tags
    assert EVIL.replace("/", "-") in page.text  # shown as text
    assert EVIL in page.text
    for words in (
        "named-run",
        "k-NN accuracy",
        "teacher at step 8",
        "Nearest neighbours",
        "One batch of crops",
        "Loss",
    ):
        assert words in page.text
    crops, neighbours, curves = 5 * 5, 10 * 6, 2  # loss and learning rate are what was logged
    assert sum(load.startswith("data:image") for load in page.loads) == crops + neighbours + curves
    assert "Gradient norm: not logged" in page.text


def test_neighbours_are_marked_right_or_wrong(run: Path) -> None:
    result = json.loads((run / "knn.json").read_text())
    neighbours = []
    for example in result["examples"]:
        neighbours += example["neighbours"]
        for n in example["neighbours"]:
            n["class"] = example["class"]
    neighbours[0]["class"] = neighbours[7]["class"] = "another"
    (run / "knn.json").write_text(json.dumps(result))
    path = write_report(run)
    assert "48 of 50 neighbours are of the query's class" in parse(path).text
    marks = re.findall(r'<figure class="(right|wrong)">', path.read_text())
    assert [i for i, mark in enumerate(marks) if mark == "wrong"] == [0, 7]
    assert len(marks) == 50


@pytest.mark.parametrize(
    "lost", ["summary.json", "environment.json", "metrics.jsonl", "config.yaml", "knn.json", "shards"]
)
def test_a_missing_part_is_named_and_costs_only_itself(run: Path, lost: str) -> None:
    (run / lost).rename(run.parent / "elsewhere")
    page = parse(write_report(run))
    assert "Not in this report" in page.text
    expected = {"knn.json": "k-NN: no knn*.json", "shards": "crops: "}.get(lost, lost)
    assert expected in page.text
    assert ("One batch of crops" in page.text) == (lost not in ("config.yaml", "shards"))


def test_results_of_several_checkpoints_stand_in_order(run: Path) -> None:
    result = json.loads((run / "knn.json").read_text())
    (run / "later").mkdir()
    (run / "later" / "knn.json").write_text(json.dumps(result | {"step": 16}))
    (run / "knn-raw.json").write_text(json.dumps(result | {"step": None, "name": "raw pixels"}))
    text = parse(write_report(run)).text
    assert text.index("raw pixels") < text.index("teacher at step 8") < text.index("teacher at step 16")


def test_damaged_json_is_said(run: Path) -> None:
    (run / "summary.json").write_text("{")
    assert "summary.json: not valid JSON" in parse(write_report(run)).text
    (run / "knn.json").write_text("{")
    with pytest.raises(UserError, match=r"knn\.json: not valid JSON"):
        write_report(run)


def test_not_a_run_dir(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run dir"):
        write_report(tmp_path / "nothing")
    with pytest.raises(UserError, match="not a run dir"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())
