"""Whether a run that starts from weights notices that its features get worse, with labels and without, and what it does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_scale import cli, run_status
from esvit_scale import config as configs
from esvit_scale.config import Train
from esvit_scale.errors import Diverged, UserError
from esvit_scale.train import guard, pretraining, run_records, structure
from esvit_scale.train.guard import Guard
from esvit_scale.train.online_knn import OnlineKnn
from tests import tiny

EVERY_2 = {"train__knn_every": 2, "train__log_every": 2, "train__steps": 12, "train__keep_checkpoints": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("data") / "held-out", first=100)


def watched(*accuracies: float, **settings: Any) -> Guard:
    found = Guard(Train(**settings))
    for i, accuracy in enumerate(accuracies):
        found.add(100 * i, {"knn_top1": accuracy})
    return found


@pytest.mark.parametrize(
    ("accuracies", "below"),
    [((0.6,), 0), ((0.6, 0.571), 0), ((0.6, 0.569), 1), ((0.6, 0.1, 0.6, 0.5), 1), ((0.6, 0.7, 0.5, 0.5, 0.2), 3)],
)
def test_a_fall_is_counted_from_the_start_and_not_from_the_best(accuracies: tuple[float, ...], below: int) -> None:
    assert watched(*accuracies).below == below  # 5 % of 0.6 are tolerated
    assert watched(*accuracies).has_fallen == (below >= 3)
    assert watched(*accuracies, guard_fall=1.0).below == 0


def test_sentence_is_said_once_and_names_the_figures() -> None:
    found = watched(0.6, 0.5, guard_checks=2)
    assert found.begins() is None
    found.add(200, {"knn_top1": 0.4})
    said = found.begins()
    assert said is not None
    assert "the k-NN accuracy is 40.0 % at step 200, 60.0 % at step 0, 2 measurements in a row" in said
    found.add(300, {"knn_top1": 0.4})
    assert found.has_fallen
    assert found.begins() is None
    found.cut(100)
    assert found.below == 1


def test_without_labels_either_measure_is_enough_and_a_nan_is_a_fall() -> None:
    start = {"held_out_rank": 40.0, "neighbours_kept": 1.0}
    for values, names in (
        ({"held_out_rank": 21.0, "neighbours_kept": 0.31}, []),
        ({"held_out_rank": 19.0, "neighbours_kept": 0.31}, ["rank"]),
        ({"held_out_rank": 90.0, "neighbours_kept": 0.29}, ["neighbours"]),
        ({"held_out_rank": float("nan"), "neighbours_kept": 0.1}, ["rank", "neighbours"]),
    ):
        found = Guard(Train(guard_checks=1), [(0, start), (100, values)])
        assert found.has_fallen == bool(names)
        assert found.holds_at(100) == (not names)
        assert all((name in found.sentence()) == (name in names) for name in ("rank", "neighbours")) or not names


def test_neighbours_and_rank_equal_a_slow_loop() -> None:
    features, other = torch.randn(30, 5), torch.randn(30, 5)
    lists = []
    for some in (features, other):
        unit = some.double() / some.double().norm(dim=1, keepdim=True)
        slow = [
            sorted((j for j in range(30) if j != i), key=lambda j: -float(unit[i] @ unit[j]))[:4] for i in range(30)
        ]
        lists.append(slow)
        rows = structure.neighbours_of(some, 4, torch.device("cpu"))
        assert [set(row) for row in rows.tolist()] == [set(row) for row in slow]
    common = sum(len(set(a) & set(b)) for a, b in zip(*lists, strict=True)) / 120
    now, before = (structure.neighbours_of(some, 4, torch.device("cpu")) for some in (features, other))
    assert structure.kept(now, before) == pytest.approx(common)
    assert structure.kept(now, now) == 1


class Falling:
    """Stands in for the measured accuracies: good at first, then bad for good."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        values = iter((0.9, 0.89, 0.5, 0.4))  # at steps 0, 2, 4, 6, and so on
        monkeypatch.setattr(OnlineKnn, "accuracy", lambda *_: next(values, 0.4))


@pytest.mark.slow
def test_stop_ends_the_run_with_exit_code_3_and_keeps_the_best(
    data: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Falling(monkeypatch)
    run = tmp_path / "run"
    config = tiny.config(run, data, data__held_out=str(held_out), train__guard="stop", train__guard_checks=2, **EVERY_2)
    assert cli.main(["pretrain", str(tiny.write_config(tmp_path / "c.yaml", config))]) == 3
    assert [row["guard_below"] for row in tiny.rows(run)] == [0, 0, 1, 2]
    assert (run / "checkpoints" / "best").read_text() == "step-00000002\n"
    assert (run / "checkpoints" / "latest").read_text() == "step-00000006\n"
    assert not run_records.read_summary(run)["finished"]
    assert not (run / "requeue").exists()
    last = capfd.readouterr().err.splitlines()[-1]
    assert "stopped at step 6: the features are worse than at the start: the k-NN accuracy is 40.0 % at step 6" in last
    found = run_status.status(run)
    assert (found.guard_below, found.state) == (2, "STOPPED")
    assert "the features are worse than at the start" in found.last_warning
    assert "guard     2 measurements in a row worse than at the start" in run_status.status_lines(found)
    # Again, it goes on to the next measurement; with warn, to the end.
    with pytest.raises(Diverged, match="stopped at step 8"):
        pretraining.pretrain(config)
    goes_on = tiny.config(run, data, data__held_out=str(held_out), train__guard="warn", **EVERY_2)
    assert pretraining.pretrain(goes_on) == 0
    assert tiny.rows(run)[-1]["guard_below"] == 5


@pytest.mark.slow
def test_without_labels_the_guard_compares_with_the_start_over_a_resume(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlabelled = tiny.shards(tmp_path / "pictures", first=100, labelled=False)
    settings = {"data__held_out": str(unlabelled), "train__guard": "warn", "train__checkpoint_every": 6}
    with pytest.raises(UserError, match=r"with labels .*; train\.guard also measures without labels"):
        pretraining.pretrain(tiny.config(tmp_path / "other", data, **EVERY_2, data__held_out=str(unlabelled)))
    run = tmp_path / "run"
    config = tiny.config(run, data, **EVERY_2 | settings | {"train__keep_checkpoints": 9})
    assert pretraining.pretrain(config) == 0
    whole = tiny.rows(run)
    first, *rows = whole
    assert (first["neighbours_kept"], first["knn_images"]) == (1.0, 36)
    assert all(0 < row["neighbours_kept"] < 1 and row["held_out_rank"] > 1 for row in rows)
    assert "knn_top1" not in first
    assert len(json.loads((run / "neighbours.json").read_text())["neighbours"]) == 36
    best = int((run / "checkpoints" / "best").read_text().strip().removeprefix("step-"))
    assert max(row["step"] for row in rows if not row["guard_below"]) == best
    (run / "summary.json").unlink()
    (run / "checkpoints" / "step-00000012").rename(tmp_path / "later")
    (run / "checkpoints" / "latest").write_text("step-00000006\n")
    assert pretraining.pretrain(config) == 0
    assert tiny.rows(run) == whole


def test_guard_needs_measurements() -> None:
    with pytest.raises(UserError, match=r"train\.guard: needs train\.knn_every"):
        configs.resolve("demo", ["train.guard=stop"])
    assert guard.measured_in([{"step": 1, "held_out_rank": 2.0}, {"step": 2, "loss": 1.0}]) == []
