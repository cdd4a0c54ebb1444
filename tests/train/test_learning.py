"""Whether a run says that it learned nothing, and why; the checkpoint with the best k-NN; the early end; a longer run."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from esvit_scale import cli
from esvit_scale import config as configs
from esvit_scale.checkpoint import convert, step_folders
from esvit_scale.errors import UserError
from esvit_scale.evaluate.features import load_frozen_trunk
from esvit_scale.train import learning, pretraining, run_dir, run_records
from esvit_scale.train.learning import KnnHistory, RunFacts
from esvit_scale.train.online_knn import OnlineKnn
from tests import launcher, tiny

FACTS = RunFacts(steps=400, steps_per_epoch=40, images=2_600, tokens={64: 4, 32: 1})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("data") / "held-out", first=100)


def history(*accuracies: float, pixels: float | None = 0.3, images: int = 1024) -> KnnHistory:
    return KnnHistory([(100 * i, accuracy) for i, accuracy in enumerate(accuracies)], pixels, images)


def said(found: KnnHistory, facts: RunFacts = FACTS, **changes: Any) -> str:
    return "\n".join(learning.verdict(tiny.config(Path("run"), Path("shards"), **changes), found, facts))


def test_a_gain_is_reported_beside_both_baselines_without_reasons() -> None:
    text = said(history(0.40, 0.55, 0.52))
    assert text == (
        "k-NN on 1,024 held-out images: 52.0 % trained (step 200), 55.0 % at best (step 100), 40.0 % untrained, "
        "30.0 % raw pixels"
    )


def test_no_gain_is_said_with_its_likeliest_reasons() -> None:
    facts = replace(FACTS, prototypes=65_536)
    text = said(history(0.40, 0.37, 0.38), facts, objective__ema_momentum=0.996)
    assert "nothing was gained: 2.0 points below the untrained trunk at best" in text
    assert "65,536 prototypes for 2,600 images" in text
    assert "objective.prototypes=1024" in text
    assert "too few steps: 400 (3,200 images, 10 epochs)" in text
    assert "averages over about 250 of 400 steps" in text
    assert "the learning rate" in text
    assert "crop scales" in text


def test_a_gain_within_chance_is_called_so() -> None:
    text = said(history(0.40, 0.41, 0.42))
    assert "nothing was gained" not in text
    assert (
        "\n2.0 points above the untrained trunk at best, which may be chance: 1,024 images tell differences above 3.1 "
        "points\n"  # two standard errors of 42 % on 1,024 images
    ) in text
    assert "the likeliest reasons:" in text
    assert "\nnothing was gained: as good as the untrained trunk at best\n" in said(history(0.40, 0.40))


def test_features_below_the_largest_class_are_said_to_be_useless() -> None:
    """Unequal classes: 29.8 % with the untrained trunk was less than always guessing the largest class, unnoticed."""
    text = said(replace(history(0.2, 0.3), largest_class=0.35))
    assert "30.0 % raw pixels, 35.0 % always guessing the largest class" in text
    assert "always guessing the largest class does as well or better (35.0 %)" in text
    assert "does as well or better" not in said(replace(history(0.2, 0.5), largest_class=0.35))


def test_verdict_on_other_images_compares_with_raw_pixels() -> None:
    """A run that goes on with another data.held_out has no accuracy of its untrained trunk on it."""
    found = history(0.4, 0.382, pixels=0.393)
    found.measured = found.trained
    text = said(found)
    assert "39.3 % raw pixels, untrained not measured on these images" in text
    assert "raw pixels do as well or better (39.3 %)" in text
    assert "nothing was gained" not in text
    assert "the likeliest reasons:" in text


@pytest.mark.parametrize(("momentum", "noted"), [(0.996, True), (0.9, False)])
def test_teacher_that_averages_over_much_of_the_planned_run_is_noted_at_the_start(momentum: float, noted: bool) -> None:
    config = tiny.config(Path("run"), Path("shards"), objective__ema_momentum=momentum, train__steps=400)
    notes = learning.notes_at_start(config, RunFacts(0, 4, 36, {}))
    assert (
        notes == ["the teacher averages over about 250 of 400 steps (objective.ema_momentum 0.996); try 0.975"] * noted
    )


def test_features_below_raw_pixels_are_said_to_be_useless() -> None:
    text = said(history(0.40, 0.55, pixels=0.6))
    assert "nothing was gained" not in text
    assert "raw pixels do as well or better (60.0 %)" in text
    assert "the likeliest reasons:" in text


def test_run_without_measurements_is_told_commands_that_parse() -> None:
    lines = said(KnnHistory()).splitlines()
    commands = [line.partition("esvit-scale ")[2] for line in lines if "esvit-scale " in line]
    parsed = [cli.build_parser().parse_args(shlex.split(command)) for command in commands]
    assert [str(one.checkpoint) for one in parsed] == ["run", "untrained:run", "pixels"]
    assert len({one.out for one in parsed}) == 3
    assert "train.knn_every=500 with data.held_out=LABELLED" in lines[-1]


def test_run_of_several_modalities_is_told_how_to_evaluate_these() -> None:
    config = configs.resolve("vatt_small", ["run_dir=a run"])
    lines = [line.partition("esvit-scale ")[2] for line in learning.how_to_measure(config)]
    parsed = [cli.build_parser().parse_args(shlex.split(line)) for line in lines]
    assert [str(one.checkpoint) for one in parsed] == ["a run", "untrained:a run"]
    assert all(line.startswith("evaluate modalities") for line in lines)


def test_number_of_images_and_margin_are_left_out_when_unknown() -> None:
    text = said(history(0.40, 0.39, images=0))
    assert text.startswith("k-NN on held-out images: 39.0 % trained")
    assert "nothing was gained: 1.0 points below the untrained trunk at best\n" in text
    assert KnnHistory([(0, 0.4)]).summary()["images"] is None


@pytest.mark.parametrize(("momentum", "tried"), [(0.9, None), (0.996, "try 0.9"), (0.5, None)])
def test_advice_on_momentum_lowers_it(momentum: float, tried: str | None) -> None:
    text = said(history(0.4, 0.4), replace(FACTS, steps=50), objective__ema_momentum=momentum)
    assert ("the teacher averages over" in text) == (tried is not None)
    assert tried is None or tried in text


@pytest.mark.parametrize(
    ("scales", "tried"),
    [
        ([(0.05, 0.4)], "data.local_crops.0.scale=[0.2,0.6]"),
        ([(0.3, 0.6), (0.1, 0.9)], "data.local_crops.1.scale=[0.2,0.9]"),
        ([(0.3, 0.6)], None),
        ([], None),
    ],
)
def test_advice_on_crop_scales_raises_the_lowest(scales: list[tuple[float, float]], tried: str | None) -> None:
    crops = [{"size": 16, "count": 1, "scale": scale} for scale in scales]
    text = said(history(0.4, 0.4), data__local_crops=crops)
    assert ("crop scales" in text) == (tried is not None)
    assert tried is None or tried in text


@pytest.mark.parametrize(
    ("tokens", "regions", "expected"),
    [
        ({32: 1, 16: 1}, True, "so the region loss has nothing to match"),
        ({32: 4, 16: 1}, True, "crops of 16 pixels have one region token each, which"),
        ({32: 4, 16: 4}, True, None),
        ({32: 1, 16: 1}, False, None),
        ({}, True, None),
    ],
)
def test_one_region_token_per_crop_is_noted_at_the_start(
    tokens: dict[int, int], regions: bool, expected: str | None
) -> None:
    config = tiny.config(Path("run"), Path("shards"), objective__regions=regions, objective__ema_momentum=0.5)
    notes = learning.notes_at_start(config, RunFacts(0, 4, 36, tokens))
    assert len(notes) == (expected is not None)
    assert expected is None or expected in notes[0]


def test_history_knows_best_patience_and_roll_back() -> None:
    found = history(0.9, 0.4, 0.6, 0.6, 0.5)  # step 0 is no training result
    assert found.best == (200, 0.6)
    assert found.is_best(200)
    assert not found.is_best(300)
    assert found.since_best() == 2
    found.counts_from = 300  # where the run was made longer
    assert found.since_best() == 1
    found.cut(100)
    assert found.best == (100, 0.4)
    assert found.since_best() == 0
    assert found.untrained == 0.9


class Script:
    """Stands in for the measured accuracies."""

    values = (0.1, 0.2, 0.5, 0.3, 0.4, 0.2)  # at steps 0, 2, 4, …

    @classmethod
    def install(cls, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = iter(cls.values)
        monkeypatch.setattr(OnlineKnn, "accuracy", lambda *_: next(calls))


SETTINGS = {"train__knn_every": 2, "train__log_every": 2, "train__keep_best": True, "train__keep_checkpoints": 1}


def test_best_checkpoint_is_kept_and_patience_ends_the_run(
    data: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Script.install(monkeypatch)
    run = tmp_path / "run"
    config = tiny.config(run, data, data__held_out=str(held_out), train__patience=3, **SETTINGS)
    assert pretraining.pretrain(config) == 0
    assert [row["knn_top1"] for row in tiny.rows(run)] == list(Script.values)
    assert tiny.rows(run)[-1]["step"] == 10  # of 20
    assert (run / "checkpoints" / "best").read_text() == "step-00000004\n"
    assert [folder.name for folder in step_folders.list_step_folders(run)] == ["step-00000004", "step-00000010"]
    summary = run_records.read_summary(run)
    assert summary["finished"]
    assert summary["knn"]["best"] == {"step": 4, "top1": 0.5}
    assert summary["knn"]["untrained"] == 0.1
    assert summary["knn"]["images"] == 36
    assert "finished: 10 steps, 3 k-NN accuracies without a new best" in (run / "log.txt").read_text()
    # The pointer can be given where a checkpoint is asked for.
    assert load_frozen_trunk(run / "checkpoints" / "best").step == 4
    assert load_frozen_trunk(run / "checkpoints" / "latest").step == 10
    assert convert.read(run / "checkpoints" / "best").config == config
    (run / "checkpoints" / "best").write_text("step-00000099\n")
    with pytest.raises(UserError, match="names step-00000099, which is not there"):
        load_frozen_trunk(run / "checkpoints" / "best")


def test_run_that_ended_early_goes_on_when_longer_or_more_patient(
    data: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS | {"train__steps": 10, "train__patience": 1, "data__held_out": str(held_out)}
    measured = iter((0.9, 0.5))  # at steps 0 and 2, and 0.4 after them
    monkeypatch.setattr(OnlineKnn, "accuracy", lambda *_: next(measured, 0.4))

    def last_step(**changes: Any) -> int:
        assert pretraining.pretrain(tiny.config(tmp_path / "run", data, **settings | changes)) == 0
        assert run_records.read_summary(tmp_path / "run")["finished"]
        return tiny.rows(tmp_path / "run")[-1]["step"]

    assert last_step() == 4
    assert run_dir.open_run(tiny.config(tmp_path / "run", data, **settings))[1]  # finished
    assert last_step(train__steps=14) == 6  # one measurement more, since the run was made longer
    assert last_step(train__steps=14, train__patience=2) == 8
    endless = settings | {"train__steps": 14, "train__patience": None}
    assert not run_dir.open_run(tiny.config(tmp_path / "run", data, **endless))[1]


def test_history_survives_a_start_that_does_not_measure_and_begins_anew_on_other_images(
    data: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnlineKnn, "accuracy", lambda self, *_: 0.9 if self.images == 36 else 0.5)
    run, other = tmp_path / "run", tiny.shards(tmp_path / "other", samples=28, first=200)

    def knn(steps: int, labelled: Path, every: int | None) -> dict[str, Any]:
        settings = {"train__steps": steps, "train__knn_every": every, "data__held_out": str(labelled)}
        assert pretraining.pretrain(tiny.config(run, data, **settings)) == 0
        return run_records.read_summary(run)["knn"]

    first = knn(2, held_out, 1)
    assert (first["images"], first["untrained"], first["best"]) == (36, 0.9, {"step": 1, "top1": 0.9})
    assert knn(3, held_out, None) == first
    assert (
        "k-NN on 36 held-out images"
        in (run / "log.txt").read_text().rpartition("nothing was gained")[0].splitlines()[-2]
    )
    moved = shutil.copytree(held_out, tmp_path / "moved")
    assert knn(4, moved, 1) == first | {"last": {"step": 4, "top1": 0.9}}
    found = knn(5, other, 10)  # measured at the last step
    assert (found["images"], found["untrained"], found["best"]) == (28, None, {"step": 5, "top1": 0.5})
    assert knn(6, other, None) == found


def test_k_nn_is_measured_again_by_a_start_without_a_checkpoint(data: Path, held_out: Path, tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "run", data, data__held_out=str(held_out), train__steps=4, **SETTINGS)
    path = tmp_path / "run"
    path.mkdir()
    run_dir.record_start(path, config)
    (path / "metrics.jsonl").write_text(json.dumps({"step": 0, "images_seen": 0, "knn_top1": 0.0}) + "\n")
    assert pretraining.pretrain(config) == 0
    assert [row["step"] for row in tiny.rows(path)] == [0, 2, 4]


def test_longer_run_goes_on_as_if_planned_so_where_schedules_do_not_depend_on_it(
    data: Path, held_out: Path, tmp_path: Path
) -> None:
    same = {
        "optim__schedule": "constant",
        "optim__cooldown": 0.0,
        "data__held_out": str(held_out),
        "train__knn_every": 4,
    }
    assert pretraining.pretrain(tiny.config(tmp_path / "long", data, train__steps=16, **same)) == 0
    run = tmp_path / "run"
    assert pretraining.pretrain(tiny.config(run, data, train__steps=8, **same)) == 0
    assert pretraining.pretrain(tiny.config(run, data, train__steps=16, **same)) == 0
    assert tiny.rows(run) == tiny.rows(tmp_path / "long")
    assert json.loads((run / "lengthened.jsonl").read_text()) == {"step": 8, "from": {"steps": 8}, "to": {"steps": 16}}
    assert "lengthened from 8 to 16 steps at step 8" in (run / "log.txt").read_text()
    assert run_records.read_summary(run)["finished"]
    assert run_records.read_summary(run)["knn"]["untrained"] is not None


def opened(run: Path, data: Path, **overrides: Any) -> bool:
    """Start a run as far as its files; return whether it is finished."""
    config = tiny.config(run, data, **overrides)
    path, finished = run_dir.open_run(config)
    path.mkdir(exist_ok=True)
    run_dir.record_start(path, config)
    return finished


def test_finished_run_can_be_made_longer_but_not_shorter(tmp_path: Path) -> None:
    run, epochs = tmp_path / "run", {"train__steps": None}
    opened(run, tmp_path, train__epochs=2, **epochs)
    (run / "summary.json").write_text('{"finished": true}')
    assert not opened(run, tmp_path, train__epochs=3, **epochs)
    # A start that is killed before it writes its own summary leaves a run that is not finished.
    assert not opened(run, tmp_path, train__epochs=3, **epochs)
    with pytest.raises(UserError, match=r"train\.epochs: 3 → 2.*; a run can be made longer, not shorter"):
        opened(run, tmp_path, train__epochs=2, **epochs)
    with pytest.raises(
        UserError, match=r"train\.steps: None → 400.*raise train\.steps if the run counts steps, else train\."
    ):
        opened(run, tmp_path, train__epochs=3, train__steps=400)
    with pytest.raises(UserError, match="seed: 0 → 1"):
        opened(run, tmp_path, train__epochs=4, seed=1, **epochs)


@pytest.mark.slow
def test_two_ranks_agree_on_the_best_checkpoint_and_on_the_end(data: Path, held_out: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = SETTINGS | {"train__patience": 2, "train__steps": 60, "train__ds_config": "zero3"}
    config = tiny.config(run, data, data__held_out=str(held_out), **settings)
    done = launcher.run(*launcher.CLI, "pretrain", tiny.write_config(tmp_path / "c.yaml", config), ranks=2)
    summary, rows = run_records.read_summary(run), tiny.rows(run)
    best = summary["knn"]["best"]["step"]
    assert summary["finished"]
    assert rows[-1]["step"] == min(60, best + 4)  # two measurements, two steps apart, after the best
    assert (run / "checkpoints" / "best").read_text() == f"step-{best:08d}\n"
    assert (run / "checkpoints" / f"step-{best:08d}").is_dir()
    for line in ("importing PyTorch and DeepSpeed", "building student and teacher", "with the untrained trunk;"):
        assert done.stderr.count(line) == 1, done.stderr
