"""The report is one file that needs nothing else, says what is missing, and never trusts a name."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from esvit_scale import config as configs
from esvit_scale.data.remote.store import StoreUnreachable
from esvit_scale.errors import UserError
from esvit_scale.report.html import write_report
from esvit_scale.report.run_files import try_or_note
from tests.report.runs import EVIL

VOID = {"meta", "link", "img", "br", "wbr"}


class Page(HTMLParser):
    """Tags are balanced; collects the text, and every attribute that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.tags: set[str] = set()
        self.ids: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids |= {v for k, v in attrs if k == "id" and v}
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
    assert all(load.startswith(("data:", "#")) for load in page.loads)
    assert {load[1:] for load in page.loads if load.startswith("#")} <= page.ids
    assert len(page.ids) == text.count(" id=")
    assert "url(" not in text
    assert "@import" not in text
    return page


def test_full_report_has_every_section_and_escapes_names(run: Path) -> None:
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
    crops, neighbours, curves = 5 * 5, 10 * 6, 4  # loss, its view part, learning rate, and one that no group knows
    assert sum(load.startswith("data:image") for load in page.loads) == crops + neighbours + curves
    assert "Stability: not logged in metrics.jsonl: gradient norm" in page.text
    assert "Other" in page.text
    assert "drift" in page.text


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
def test_missing_part_is_named_and_the_rest_is_shown(run: Path, lost: str) -> None:
    (run / lost).rename(run.parent / "elsewhere")
    page = parse(write_report(run))
    assert "Not in this report" in page.text
    expected = {"knn.json": "k-NN: no knn*.json", "shards": "crops: "}.get(lost, lost)
    assert expected in page.text
    assert ("One batch of crops" in page.text) == (lost not in ("config.yaml", "shards"))


def test_results_of_several_checkpoints_are_in_order(run: Path) -> None:
    result = json.loads((run / "knn.json").read_text())
    (run / "later").mkdir()
    (run / "later" / "knn.json").write_text(json.dumps(result | {"step": 16}))
    (run / "knn-raw.json").write_text(json.dumps(result | {"step": None, "name": "raw pixels"}))
    text = parse(write_report(run)).text
    assert text.index("raw pixels") < text.index("teacher at step 8") < text.index("teacher at step 16")


def test_damaged_json_is_named_and_the_rest_is_shown(run: Path) -> None:
    for name in ("summary.json", "knn.json", "linear.json"):
        (run / name).write_text("{")
    (run / "transfer.json").write_text('{"step": 8, "other": 1}')
    (run / "correspondence.json").write_text("[1]")
    text = parse(write_report(run)).text
    for name in ("summary.json", "knn.json", "linear.json", "correspondence.json"):
        assert f"{name}: not valid JSON" in text
    assert "transfer table: not in the form expected (KeyError('datasets'))" in text
    assert "One batch of crops" in text


def test_report_of_a_run_without_rows(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(configs.dump(configs.resolve("demo")))
    (tmp_path / "metrics.jsonl").write_text("")
    text = parse(write_report(tmp_path)).text
    assert "curves: no step is logged" in text
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n5\n{"step": 2, "loss": 3.5, "note": "x"}\n{"st')
    assert "3.500" in parse(write_report(tmp_path)).text
    (tmp_path / "config.yaml").write_text("objective: [")
    assert "config.yaml: " in parse(write_report(tmp_path)).text


def test_retrieval_results_have_tables_and_a_picture(run: Path) -> None:
    score = {"value": 41.25, "interval": [37.5, 44.75]}
    labelled = {"kind": "labelled", "step": 8, "n_queries": 20, "n_bank": 30, "mean_per_class": {"map": 11.5}}
    labelled["results"] = {"recall": {"1": score}, "map": {"value": 20.5, "interval": [19.5, 21.5]}}
    revisited = {
        "kind": "revisited",
        "step": 8,
        "ground_truth": "gnd_roxford5k.json",
        "protocol": {"largest_side": 224},
    }
    revisited["results"] = {
        "easy": {"map": 33.25, "interval": [30.0, 36.5], "queries": 68},
        "hard": {"map": None, "interval": None, "queries": 0},
    }
    (run / "retrieval.json").write_text(json.dumps(labelled))
    (run / "oxford").mkdir()
    (run / "oxford" / "retrieval.json").write_text(json.dumps(revisited))
    Image.new("RGB", (8, 8)).save(run / "oxford" / "retrieval.png")
    text = parse(write_report(run)).text
    for words in ("R@1", "41.2", "19.5 – 21.5", "20 in 30", "gnd_roxford5k.json · easy", "33.2", "Retrieved images"):
        assert words in text


def test_copy_detection_is_shown_with_its_protocol(run: Path) -> None:
    score = {"uap": 52.25, "interval": [45.75, 58.25], "recall_at_p90": 33.5, "map": 61.5, "queries": 229}
    protocol = {"layout": "Copydays", "size": 320, "seed": 0}
    result = {"step": 8, "n_bank": 10157, "n_distractors": 10000, "protocol": protocol, "results": {"strong": score}}
    (run / "copies.json").write_text(json.dumps(result))
    Image.new("RGB", (8, 8)).save(run / "copies.png")
    (run / "other").mkdir()
    (run / "other" / "copies.json").write_text(json.dumps(result | {"protocol": protocol | {"size": 224}}))
    text = parse(write_report(run)).text
    for words in (
        "Copy detection",
        "52.2",
        "45.8 – 58.2",
        "33.5",
        "61.5",
        "229 in 10,157",
        "Distorted images on the left",
    ):
        assert words in text
    assert "copies of Copydays, searched in 10,157 images, of which 10,000 are distractors" in text
    assert "The protocols differ: not comparable." in text


def test_segmentation_is_shown_with_its_protocol(run: Path) -> None:
    score = {"miou": 52.25, "interval": [45.75, 58.25], "pixel_accuracy": 69.5, "mean_accuracy": 61.5}
    score["per_class"] = [{"class": EVIL, "iou": 33.25}, {"class": "absent", "iou": None}]
    protocol = {"layout": "ADE20K", "size": 512, "crop": 512, "stride": 341, "ignored": "0", "pixels_per_image": 64}
    protocol["linear"] = {"iterations": 2000, "batch": 16, "lr": 0.01, "rates": [1, 2], "held_out_images": 9}
    result = {"step": 8, "n_test": 20, "n_train": 90, "protocol": protocol, "results": {"linear": score}}
    result["largest_class"] = {"class": "sky", "miou": 1.5, "pixel_accuracy": 17.5}
    (run / "segmentation.json").write_text(json.dumps(result))
    Image.new("RGB", (8, 8)).save(run / "segmentation.png")
    text = parse(write_report(run)).text
    for words in ("52.2", "45.8 – 58.2", "always sky", "17.5", EVIL, "33.2", "Segmented images"):
        assert words in text
    assert "windows of 512 every 341, masks at their own resolution, 0 ignored" in text
    assert "2,000 iterations of 16 images, learning rate 0.01, selected of 2" in text
    assert "not comparable" not in text
    (run / "other").mkdir()
    (run / "other" / "segmentation.json").write_text(json.dumps(result | {"protocol": protocol | {"size": 640}}))
    assert "The protocols differ: not comparable." in parse(write_report(run)).text


def test_depth_is_shown_with_its_protocol(run: Path) -> None:
    score = {"rmse": 0.4525, "interval": [0.401, 0.502], "abs_rel": 0.1234, "delta1": 82.25}
    protocol = {
        "layout": "NYU Depth v2",
        "size": 480,
        "crop": 480,
        "stride": 320,
        "counted": "Eigen's crop",
        "bins": 256,
    }
    protocol |= {"range": [0.001, 10], "pixels_per_image": 64, "iterations": 2000, "batch": 16, "lr": 0.001}
    protocol |= {"rates": [1, 2], "held_out_images": 9}
    result = {"step": 8, "n_test": 654, "n_train": 90, "mean_depth": 2.75, "protocol": protocol}
    result["results"] = {"linear": score, "constant": score | {"rmse": 1.5, "delta1": 31.0}}
    (run / "depth.json").write_text(json.dumps(result))
    Image.new("RGB", (8, 8)).save(run / "depth.png")
    text = parse(write_report(run)).text
    for words in ("0.453", "0.401 – 0.502", "0.123", "82.2", "always 2.75 m", "1.500", "31.0", "Depth of images"):
        assert words in text
    assert "Eigen's crop, 0.001 to 10 m; 256 uniform bins" in text
    assert "not comparable" not in text


def test_label_propagation_is_shown_with_its_protocol(run: Path) -> None:
    score = {"jf": 52.25, "interval": [45.75, 58.25], "j": 50.5, "f": 54.0}
    protocol = {"size": 480, "stage": 3, "cell": 16, "k": 5, "radius": 12, "last_frames": 7}
    result = {"step": 8, "n_videos": 30, "n_objects": 61, "protocol": protocol}
    result["results"] = {"propagated": score, "static": score | {"jf": 21.5, "interval": None}}
    (run / "video.json").write_text(json.dumps(result))
    Image.new("RGB", (8, 8)).save(run / "video.png")
    text = parse(write_report(run)).text
    for words in ("52.2", "45.8 – 58.2", "50.5", "54.0", "first mask kept", "21.5", "Objects followed through videos"):
        assert words in text
    assert "61 objects of 30 videos, short side 480 pixels, stage 3 (cells of 16 pixels)" in text


LINEAR = {
    "step": 8,
    "n_train": 1000,
    "results": {
        "official": {"top1": 61.25, "interval": [57.1, 65.0], "top5": 90.0},
        "grid": {"top1": 63.5, "interval": [59.0, 67.0], "top5": None},
    },
}
TRANSFER = {
    "step": 8,
    "datasets": {"food": {"metric": "accuracy", "score": 71.5}, "voc": {"metric": "11-point mAP", "score": 60.0}},
    "failed": {"cars": "no such folder"},
    "baseline": {"scores": {"food": 70.0, "voc": 62.5}, "wins": 1, "losses": 1, "common": 2},
}
MEASURE = {"top_accuracy": 91.5, "top_distance_px": 3.5, "accuracy": 80.25, "distance_px": 9.0, "chance": 2.04}
CORRESPONDENCE = {"step": 8, "measures": {"mirrored": MEASURE, "stereo": MEASURE}}


def test_each_evaluation_has_a_table(run: Path) -> None:
    knn = json.loads((run / "knn.json").read_text())
    few = {"tries": 5, "results": {"1": {"5": {"top1": 33.25, "interval": [31.0, 35.5]}, "10": {"top1": 34.0}}}}
    (run / "knn.json").write_text(json.dumps(knn | {"few_shot": few}))
    (run / "probe").mkdir()
    for name, content in {"linear": LINEAR, "transfer": TRANSFER, "correspondence": CORRESPONDENCE}.items():
        (run / "probe" / f"{name}.json").write_text(json.dumps(content))
    Image.new("RGB", (4, 4)).save(run / "probe" / "correspondence-best.png")
    page = parse(write_report(run))
    for words in (
        "1 of each class",
        "33.2 ± 2.2",
        "step 8 · official",
        "57.1 – 65.0",
        "voc (11-point mAP)",
        "62.5",
        "65.8",
    ):
        assert words in page.text, words
    for words in (
        "mean of 2",
        "66.2",
        "Failed: cars.",
        "better on 1, worse on 1 of 2",
        "flipped, grey",
        "91.5",
        "Correspondences",
    ):
        assert words in page.text, words


def second(run: Path, **overrides: str) -> Path:
    """Another run beside `run`."""
    other = run.parent / "other"
    other.mkdir()
    config = configs.load(run / "config.yaml")
    values = config.model_dump(mode="json") | overrides
    values["optim"]["lr"] = 0.0123
    (other / "config.yaml").write_text(configs.dump(configs.validate(values, "test")))
    (other / "metrics.jsonl").write_text('{"step": 1, "images_seen": 64, "loss": 7.25, "images_per_s": 55.0}\n')
    return other


def test_several_runs_share_one_file(run: Path) -> None:
    other = second(run, name="second-run")
    (run / "linear.json").write_text(json.dumps(LINEAR))
    path = write_report([run, other])
    assert path == run.parent / "report.html"
    page = parse(path)
    assert "2 runs side by side" in page.text
    for words in (
        "named-run",
        "second-run",
        "Config differences",
        "optim.lr",
        "0.0123",
        "0.0005",
        "not finished",
        "7.250",
    ):
        assert words in page.text, words
    assert "named-run · teacher at step 8" in page.text
    assert "named-run · step 8 · grid" in page.text
    assert "second-run: k-NN: no knn*.json" in page.text
    assert "data.train" not in re.sub(r"<pre>.*?</pre>", "", path.read_text(), flags=re.S)  # the same in both
    assert not (run / "report.html").exists()
    assert write_report([run, other], run.parent / "new" / "both.html").is_file()


def test_runs_with_equal_names_are_labelled_by_folder(run: Path) -> None:
    other = second(run)
    text = parse(write_report([run, other])).text
    assert "other" in text
    assert "named-run" not in text.split("Config differences")[0]
    assert "run: " in text


def test_narrow_screens_break_keys_at_dots_and_give_names_of_classes_room(run: Path) -> None:
    page = write_report(run).read_text()
    assert "<th>data.<wbr>local_<wbr>crops.<wbr>0.<wbr>count</th>" in page
    narrow = page.split("@media (max-width: 560px)")[1].split("@media")[0]
    assert ".query { grid-template-columns: repeat(3, 1fr) !important; }" in narrow
    assert ".differences td { min-width: 72px; }" in narrow


def test_folder_that_is_no_run_dir_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run dir"):
        write_report(tmp_path / "nothing")
    with pytest.raises(UserError, match="not a run dir"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_contradictory_arguments_are_refused(run: Path) -> None:
    with pytest.raises(UserError, match="named twice"):
        write_report([run, run.parent / "run"])
    with pytest.raises(UserError, match="is a folder, but --out must name a file"):
        write_report(run, run.parent)


def test_store_that_does_not_answer_is_a_note() -> None:
    def unreachable() -> None:
        raise StoreUnreachable("s3://b/set/manifest.json: no route to host, after 9 attempts")

    missing: list[str] = []
    assert try_or_note("crops", missing, unreachable) is None
    assert missing == ["crops: s3://b/set/manifest.json: no route to host, after 9 attempts"]
