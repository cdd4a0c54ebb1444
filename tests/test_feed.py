"""doctor --data: what it measures is there, and its advice follows from the figures."""

from pathlib import Path

import pytest

from esvit_scale import cli, feed
from esvit_scale.config import Config, validate
from esvit_scale.feed import Supply, advice
from tests import tiny


def config(**data: object) -> Config:
    return validate({"data": data}, "test")


def test_doctor_data_measures_a_shard_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "SECONDS", 0.2)
    shards = tiny.shards(tmp_path / "set")
    assert cli.main(["doctor", "--data", str(shards), "swin_t", "data.global_crops.size=32"]) == 0
    text = capsys.readouterr().out
    assert "MB/s" in text
    assert "one process" in text
    assert f"data.workers={feed.usable_cpus()}" in text


def test_of_a_run_with_training_stages_the_first_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = list[int]()
    rate = lambda config, *_: measured.append(config.data.global_crops.size) or 1.0  # noqa: E731
    monkeypatch.setattr(feed, "_rate", rate)
    shards = tiny.shards(tmp_path / "set")
    stages = "stages=[{train.epochs: 1, data.global_crops.size: 48}, {train.epochs: 1, data.global_crops.size: 64}]"
    assert cli.main(["doctor", "--data", str(shards), "swin_t", stages]) == 0
    assert set(measured) == {48}
    assert "0 of 2; for another" in capsys.readouterr().out


def test_config_without_data_asks_for_the_data_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "swin_t"]) == 2
    assert "add --data SHARDS" in capsys.readouterr().err


def test_advice_for_sufficient_supply_states_the_margin() -> None:
    (line,) = advice(config(), Supply(500, 16 * 500, 16), demand=2000, gpus=2, pixels=2e5)
    assert "4.0 times what the GPUs need" in line
    assert "data.workers=3 " in line  # 1.2 · 1000 images/s a rank, 500 a process


def test_advice_for_insufficient_supply_lists_every_remedy() -> None:
    text = "\n".join(advice(config(workers=4, photometric="workers"), Supply(300, 2000, 16), 8000, 2, 4e6))
    for says in (
        "25%",
        "data.workers=8",
        "photometric=device",
        "4.0 megapixels",
        "slow each other",
        "4.0 times as many",
    ):
        assert says in text
    text = "\n".join(advice(config(workers=8), Supply(130, 2000, 16), 8000, 2, 2e5))
    for says in ("data.workers", "photometric", "megapixels", "slow each other"):
        assert says not in text
