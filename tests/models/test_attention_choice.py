"""The choice between implementations of window attention, on the CPU with real and with broken candidates."""

import pytest
import torch

from esvit_scale.models import attention_choice
from esvit_scale.models.window_attention import attend_math
from esvit_scale.models.window_attention_implementations import implementation
from esvit_scale.models.windows import WindowLayout, window_plan

CPU = torch.device("cpu")
LAYOUTS = [WindowLayout(window_plan(((2, 8, 8),), 4, shift, CPU), 2, 16, 1) for shift in (0, 2)]


def without_mask(qkv, table, plan):
    return attend_math(qkv, table, plan._replace(masks=()))


def with_wrong_bias_gradient(qkv, table, plan):
    return attend_math(qkv, 1.01 * table - (0.01 * table).detach(), plan)


def in_tf32(qkv, table, plan):
    """Products of numbers with 11 bits, as tensor cores compute fp32 ones by default."""
    return attend_math(qkv.half().float(), table, plan)


def not_a_number(qkv, table, plan):
    return attend_math(qkv, table, plan) * float("nan")


def raising(qkv, table, plan):
    raise RuntimeError("CUDA error: no kernel image\nand a long trace")


def missing():
    raise ModuleNotFoundError("No module named 'triton'")


def choose(candidates, dtype=torch.float32):
    loaders = {name: (lambda c=c: c) if c is not missing else missing for name, c in candidates.items()}
    return attention_choice.choose(loaders, LAYOUTS, LAYOUTS, dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_math_is_accurate_in_every_precision(dtype):
    assert attention_choice.inaccuracy(attend_math, LAYOUTS, dtype, CPU) is None


def test_sdpa_is_accurate_in_fp32():
    assert attention_choice.inaccuracy(implementation("sdpa"), LAYOUTS, torch.float32, CPU) is None


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (without_mask, "its output is off by"),
        (with_wrong_bias_gradient, "its gradient of the bias table is off by 1.0e-02"),
        (in_tf32, "its output is off by"),
        (not_a_number, "its output is off by nan"),
        (raising, "RuntimeError: CUDA error: no kernel image"),
        (missing, "ModuleNotFoundError: No module named 'triton'"),
    ],
)
def test_a_wrong_or_raising_candidate_is_not_used(wrong, problem):
    outcome = choose({"math": attend_math, "triton": wrong})
    assert outcome.chosen == "math"
    assert list(outcome.milliseconds) == ["math"]
    assert outcome.refused["triton"].startswith(problem)
    assert "\n" not in outcome.refused["triton"]


def test_the_fastest_accurate_candidate_is_used(monkeypatch):
    times = {attend_math: 3.0, implementation("sdpa"): 2.0, without_mask: 1.0}
    monkeypatch.setattr(attention_choice, "_milliseconds", lambda attend, *_: times[attend])
    outcome = choose({"math": attend_math, "sdpa": implementation("sdpa"), "triton": without_mask})
    assert outcome.chosen == "sdpa"
    assert outcome.milliseconds == {"math": 6.0, "sdpa": 4.0}


def test_math_is_used_when_no_candidate_passes():
    assert choose({"math": raising, "sdpa": without_mask}).chosen == "math"
