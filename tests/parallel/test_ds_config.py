import json
from pathlib import Path

import pytest

from esvit_scale.errors import UserError
from esvit_scale.parallel import ds_config
from tests import tiny


def filled(tmp_path: Path, content: dict[str, object] | None = None, world_size: int = 1, **overrides: object) -> dict:
    if content is not None:
        (tmp_path / "ds.json").write_text(json.dumps(content))
        overrides["train__ds_config"] = str(tmp_path / "ds.json")
    return ds_config.fill(tiny.config(tmp_path / "run", tmp_path, **overrides), world_size)


def test_the_run_config_fills_the_holes(tmp_path: Path) -> None:
    values = filled(tmp_path, train__ds_config="zero3", train__grad_accum=2, world_size=2)
    assert values["train_batch_size"] == 8
    assert values["train_micro_batch_size_per_gpu"] == 2
    assert values["gradient_accumulation_steps"] == 2
    assert values["bf16"]["enabled"] is False
    assert values["gradient_clipping"] == 0.0  # per tensor: our own hook does it
    assert values["zero_optimization"]["stage3_param_persistence_threshold"] == 0


def test_the_global_clip_is_deepspeeds(tmp_path: Path) -> None:
    assert filled(tmp_path, train__ds_config="zero1", optim__clip_by="global")["gradient_clipping"] == 0.3
    assert filled(tmp_path, train__ds_config="zero0", optim__clip_by="global")["gradient_clipping"] == 0.0


def test_every_mismatch_is_in_one_error(tmp_path: Path) -> None:
    content = {"train_batch_size": 16, "gradient_accumulation_steps": 4, "zero_optimization": {"stage": 1}}
    with pytest.raises(UserError) as error:
        filled(tmp_path, content)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert 'ds.json: train_batch_size: 16, but the run config says 8; write "auto"' in lines[0]
    assert "gradient_accumulation_steps: 4" in lines[1]


@pytest.mark.parametrize(
    ("section", "words"), [("optimizer", "optim section"), ("amp", "use bf16"), ("scheduler", "optim section")]
)
def test_sections_with_another_owner_are_refused(tmp_path: Path, section: str, words: str) -> None:
    with pytest.raises(UserError, match=rf"{section}: owned by .*{words}"):
        filled(tmp_path, {section: {}, "zero_optimization": {"stage": 1}})


def test_zero_0_in_bf16_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"ZeRO stage 0 is offered in fp32 and autocast only.*one step at start-up.*zero1"
    ):
        filled(tmp_path, train__ds_config="zero0", train__precision="bf16")


def test_a_batch_that_does_not_divide_over_the_ranks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"8 does not divide over 3 ranks × train.grad_accum=1; nearest: 9"):
        filled(tmp_path, world_size=3)


def test_json_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        filled(tmp_path, train__ds_config=str(tmp_path / "ds.json"))
