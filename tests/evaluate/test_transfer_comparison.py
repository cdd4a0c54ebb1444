"""What `evaluate transfer` compares: outcomes over seeds, published scores, and the table; without any network."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from esvit_scale.errors import UserError
from esvit_scale.evaluate import comparison, published
from esvit_scale.evaluate.published import PublishedScore


def test_outcome_is_that_of_a_paired_t_test() -> None:
    rng, outcomes = np.random.default_rng(), set()
    for shift in (-3.0, 0.0, 0.5, 3.0):
        theirs = rng.normal(80, 5, 6)
        ours = theirs + shift + rng.normal(0, 0.5, 6)
        found = comparison.compare_runs(ours.tolist(), theirs.tolist())
        test = stats.ttest_rel(ours, theirs)
        assert (found["outcome"] == "undecided") == (test.pvalue > 0.05)
        assert found["difference"] == pytest.approx(float((ours - theirs).mean()))
        assert found["interval"] == pytest.approx(list(test.confidence_interval(0.95)))
        outcomes.add(found["outcome"])
    assert {"win", "loss"} <= outcomes
    assert comparison.compare_runs([1.0], [2.0]) == {"difference": -1.0, "interval": None, "outcome": "loss"}
    assert comparison.compare_runs([2.0, 2.0], [2.0, 2.0])["outcome"] == "undecided"


def result(runs: list[float], shots: list[float], **more: Any) -> dict[str, Any]:
    few = {"5": {"score": sum(shots) / len(shots), "runs": shots}, "50": {"why_not": "too few"}}
    return {"metric": "accuracy", "score": sum(runs) / len(runs), "runs": runs, "few_shot": few} | more


def test_table_counts_wins_and_marks_published_scores() -> None:
    ours = {"digits": result([90.0, 91.0], [70.0, 74.0]), "pets": result([50.0, 50.2], [20.0, 30.0])}
    theirs = {"digits": result([80.0, 81.0], [71.0, 73.0], zero_shot=33.3), "pets": result([60.0, 60.2], [25.0, 25.0])}
    scores = [
        PublishedScore("CLIP", "digits", "zero-shot", 40.0),
        PublishedScore("CLIP", "pets", "full", 50.0),
        PublishedScore("CLIP", "mean of 18", "full", 80.86),
    ]
    backbone = {"name": "timm:x", "datasets": theirs, "comparison": comparison.compare_backbone(ours, theirs)}
    assert backbone["comparison"]["settings"]["full"] == {"wins": 1, "losses": 1, "undecided": 0, "gain": 0.0}
    assert backbone["comparison"]["settings"]["5-shot"]["undecided"] == 2
    model = {
        "name": "CLIP",
        "scores": [score._asdict() for score in scores],
        "comparison": comparison.compare_published(ours, scores),
    }
    assert model["comparison"]["settings"] == {
        "full": {"wins": 1, "losses": 0, "undecided": 0, "gain": pytest.approx(0.1)}
    }
    text = comparison.win_table({"datasets": ours, "backbones": [backbone], "published": [model]})
    lines = [line.split("  ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[0] == ["data set", "setting", "ours", "[1]", "[2] published"]
    assert ["digits", "zero-shot", "–", "33.3", "40.0"] in cells
    assert ["digits", "5-shot", "72.0 ± 2.8", "72.0 ± 1.4 =", "–"] in cells
    assert ["digits", "full", "90.5 ± 0.7", "80.5 ± 0.7 W", "–"] in cells
    assert ["pets", "full", "50.1 ± 0.1", "60.1 ± 0.1 L", "50.0 W"] in cells
    assert ["mean of 18", "full", "–", "–", "80.9"] in cells
    assert text.splitlines()[-2].startswith("[1] timm:x: 5-shot 0 wins, 0 losses, 2 undecided")


HEADER = "model,dataset,setting,score,source\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model,data,setting,score\n", "line 1: unknown column 'data'; did you mean 'dataset'"),
        ("model,dataset,score\n", "line 1: missing setting; expected the header model,dataset,setting,score,source"),
        ("", "line 1: missing model, dataset, setting, score"),
        (HEADER + "A,pet,full,1,\n", "line 2: 'pet' is no data set of the list; did you mean 'pets'"),
        (HEADER + "A,pets,ful,1,\n", "line 2: unknown setting 'ful'; did you mean 'full'"),
        (HEADER + "A,pets,full,much,\n", "line 2: score 'much' is no percentage"),
        (HEADER + "A,pets,full,nan,\n", "line 2: score 'nan' is no percentage"),
        (HEADER + "A,pets,full\n", "line 2: 3 cells, the header has 5"),
        (HEADER + "A,pets,full,1,\n\nA,pets,full,2,\n", "line 4: A, pets, full is given a second time"),
        (HEADER + ",pets,full,1,\n", "line 2: model is empty"),
    ],
)
def test_errors_in_published_scores_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        published.read(tmp_path / "p.csv", ["pets", "digits"])
    assert "\n" not in str(error.value)


def test_published_scores_are_read_in_any_order_of_columns(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(
        'score,setting,model,dataset\n80.99,full,"EsViT, Swin-T",mean of 18\n7,5-shot,A,pets\n'
    )
    found = published.read(tmp_path / "p.csv", ["pets"])
    assert found == [
        PublishedScore("EsViT, Swin-T", "mean of 18", "full", 80.99),
        PublishedScore("A", "pets", "5-shot", 7.0),
    ]
    with pytest.raises(UserError, match="No such file"):
        published.read(tmp_path / "q.csv", ["pets"])
