"""DeepSpeed configs as `ds_config.fill` completes them, and the files that it refuses."""

import json
from pathlib import Path

import pytest

from esvit_scale.errors import UserError
from esvit_scale.parallel import ds_config, ds_keys
from tests import tiny


def fill(tmp_path: Path, content: dict[str, object] | None = None, world_size: int = 1, **overrides: object) -> dict:
    if content is not None:
        (tmp_path / "ds.json").write_text(json.dumps(content))
        overrides["train__ds_config"] = str(tmp_path / "ds.json")
    return ds_config.fill(tiny.config(tmp_path / "run", tmp_path, **overrides), world_size)


def test_fill_writes_numbers_of_the_run_config(tmp_path: Path) -> None:
    values = fill(tmp_path, train__ds_config="zero3", train__grad_accum=2, world_size=2)
    assert values["train_batch_size"] == 8
    assert values["train_micro_batch_size_per_gpu"] == 2
    assert values["gradient_accumulation_steps"] == 2
    assert values["bf16"]["enabled"] is False
    assert values["gradient_clipping"] == 0.0  # parallel/gradients.py clips per tensor
    assert values["zero_optimization"]["stage3_param_persistence_threshold"] == 0


def test_deepspeed_clips_by_the_global_norm_at_stages_above_0(tmp_path: Path) -> None:
    assert fill(tmp_path, train__ds_config="zero1", optim__clip_by="global")["gradient_clipping"] == 0.3
    assert fill(tmp_path, train__ds_config="zero0", optim__clip_by="global")["gradient_clipping"] == 0.0


def test_one_error_lists_every_mismatch(tmp_path: Path) -> None:
    content = {"train_batch_size": 16, "gradient_accumulation_steps": 4, "zero_optimization": {"stag": 1}}
    with pytest.raises(UserError) as error:
        fill(tmp_path, content)
    unknown, *lines = str(error.value).splitlines()
    assert "did you mean 'stage'" in unknown
    assert len(lines) == 2
    assert 'ds.json: train_batch_size: 16, but the run config says 8; write "auto"' in lines[0]
    assert "gradient_accumulation_steps: 4" in lines[1]


@pytest.mark.parametrize(
    ("section", "words"), [("optimizer", "optim section"), ("amp", "use bf16"), ("scheduler", "optim section")]
)
def test_sections_owned_by_the_run_config_are_refused(tmp_path: Path, section: str, words: str) -> None:
    with pytest.raises(UserError, match=rf"{section}: owned by .*{words}"):
        fill(tmp_path, {section: {}, "zero_optimization": {"stage": 1}})


def test_zero_0_in_bf16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"ZeRO stage 0 is offered in fp32 and autocast only.*one step at start-up.*zero1"
    ):
        fill(tmp_path, train__ds_config="zero0", train__precision="bf16")


def test_batch_that_does_not_divide_over_the_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"8 does not divide over 3 ranks × train.grad_accum=1; nearest: 9"):
        fill(tmp_path, world_size=3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"zero_optimisation": {"stage": 3}},
            r"zero_optimisation: DeepSpeed has no such key; did you mean 'zero_optim",
        ),
        ({"zero_optimization": {"stage": 3, "ofload_param": {}}}, r"ofload_param: .*; did you mean 'offload_param'"),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}}, r"offload_param\.devise: .* mean 'device'"),
        ({"torch_autocast": {"dtyp": "bf16"}}, r"torch_autocast\.dtyp: .* mean 'dtype'"),
        ({"zero_optimization": {"stage": 4}}, r"zero_optimization\.stage: Input should be 0, 1, 2.*got 4"),
        ({"zero_optimization": 3}, r"zero_optimization: must be an object, got 3"),
        ({"bf16": True}, r"bf16: must be an object, got true"),
        ({"bfloat16": {"enabled": True}}, r'bfloat16: owned by train\.precision; the section is named "bf16"'),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
            r'offload_optimizer\.device: "nvme" is not offered, .*; use "cpu"$',
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}},
            r'offload_param\.device: "nvme" is not offered, .*; use "cpu"$',
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}},
            r"offload_optimizer\.ratio: must be 1, got 0\.3",
        ),
        ({"sparse_gradients": True}, r"sparse_gradients: this DeepSpeed has removed it"),
    ],
)
def test_unknown_keys_and_wrong_types_are_refused(tmp_path: Path, content: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        fill(tmp_path, content)


@pytest.mark.parametrize("stage", [None, "auto", "2", True, 2.0, -1])
def test_stage_that_is_no_integer_is_refused(tmp_path: Path, stage: object):
    with pytest.raises(UserError, match=r"zero_optimization\.stage: "):
        fill(tmp_path, {"zero_optimization": {"stage": stage}})


def test_duplicate_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 1, "stage": 3}}')
    with pytest.raises(UserError, match=r"ds\.json: 'stage' appears twice in one object"):
        fill(tmp_path, train__ds_config=str(path))


def test_every_key_that_deepspeed_reads_is_known() -> None:
    asked: set[str] = set()

    class Asked(dict):  # type: ignore[type-arg]
        def get(self, key: str, default: object = None) -> object:
            asked.add(key)
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            asked.add(str(key))
            return super().__contains__(key)

        def __copy__(self) -> "Asked":
            return self

    from deepspeed.runtime.config import DeepSpeedConfig

    DeepSpeedConfig(Asked(train_batch_size=1))
    assert len(asked) > 40
    assert asked - ds_keys.TOP_LEVEL - ds_keys.REMOVED == set()


def test_documented_config_is_accepted(tmp_path: Path) -> None:
    """It has buckets as in the Hugging Face examples, DeepSpeed's older names, and monitors."""
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": 5e7, "overlap_comm": True}
    offload = {"device": "cpu", "pin_memory": True, "buffer_count": 4}
    content = {
        "zero_optimization": {**zero, "offload_optimizer": offload, "leaf_module": {"classes": ["a.B"]}},
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 12, "hysteresis": 2, "min_loss_scale": 1},
        "comms_logger": {"enabled": True, "prof_ops": []},
        "tensorboard": {"enabled": False, "output_path": "x"},
        "flops_profiler": {"enabled": False, "profile_step": 1},
        "communication_data_type": "fp32",
        "steps_per_print": 100,
        "wall_clock_breakdown": False,
    }
    values = fill(tmp_path, content)
    assert values["zero_optimization"]["offload_optimizer"] == offload
    assert fill(tmp_path, {"zero_optimization": {"stage": 2, "cpu_offload": True}})


def test_file_cannot_switch_deepspeeds_checks_off(tmp_path: Path) -> None:
    zero = {"stage": 1, "compute_grad_norm": False}
    content = {"bf16": {"check_grad_overflow": False}, "zero_optimization": zero, "gradient_allreduce_op": "sum"}
    with pytest.raises(UserError) as error:
        fill(tmp_path, content, train__precision="bf16")
    keys = ("bf16.check_grad_overflow: false", "zero_optimization.compute_grad_norm: false", "gradient_allreduce_op")
    assert all(key in line for key, line in zip(keys, str(error.value).splitlines(), strict=True))
    assert "must be true" in str(error.value)
    values = fill(tmp_path, train__precision="bf16")
    assert (values["bf16"]["check_grad_overflow"], values["zero_optimization"]["compute_grad_norm"]) == (True, True)


def test_autocast_uses_bf16_and_averages_in_fp32(tmp_path: Path) -> None:
    values = fill(tmp_path, train__precision="autocast")
    assert values["torch_autocast"] == {"enabled": True, "dtype": "bf16", "lower_precision_safe_modules": []}
    section = {"dtype": "torch.float16", "lower_precision_safe_modules": ["torch.nn.Linear"]}
    with pytest.raises(UserError, match=r'dtype: "torch.float16", but the run config says "bf16"'):
        fill(tmp_path, {"torch_autocast": section}, train__precision="autocast")


@pytest.mark.parametrize(
    ("stage", "precision", "accum", "runs", "dtype"),
    [
        (1, "bf16", 1, 1, "bf16"),
        (1, "bf16", 2, 2, "fp32"),
        (2, "bf16", 2, 2, "fp32"),
        (3, "bf16", 2, 3, "fp32"),
        (1, "fp16", 2, 1, "fp32"),
        (1, "fp32", 2, 1, "fp32"),
        (0, "autocast", 2, 0, "fp32"),
    ],
)
def test_micro_batches_are_summed_in_fp32(
    tmp_path: Path, stage: int, precision: str, accum: int, runs: int, dtype: str
) -> None:
    values = fill(tmp_path, train__ds_config=f"zero{stage}", train__precision=precision, train__grad_accum=accum)
    assert (ds_config.zero_stage(values), values["data_types"]["grad_accum_dtype"]) == (runs, dtype)


def test_file_can_choose_fp32_gradients(tmp_path: Path) -> None:
    content = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "float32"}}
    assert ds_config.zero_stage(fill(tmp_path, content, train__precision="bf16")) == 2
    content["data_types"] = {"grad_accum_dtype": "bf16"}
    with pytest.raises(UserError, match='grad_accum_dtype: "bf16", but the run config says "fp32"'):
        fill(tmp_path, content, train__precision="bf16", train__grad_accum=2)


def test_invalid_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        fill(tmp_path, train__ds_config=str(tmp_path / "ds.json"))
