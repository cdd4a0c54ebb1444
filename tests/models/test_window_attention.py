"""Implementations of window attention on the CPU: SDPA, FlexAttention uncompiled, and Triton's kernels interpreted.

Kernels are interpreted in a process of their own, because Triton reads TRITON_INTERPRET when it is imported.
"""

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from esvit_scale.models import window_attention_implementations
from esvit_scale.models.swin import Swin
from esvit_scale.models.swin_v2 import SwinV2
from esvit_scale.models.window_attention import attend_math
from esvit_scale.models.windows import window_plan
from tests import launcher

CPU = torch.device("cpu")
GRIDS = ((1, 9, 9), (2, 7, 4))  # with windows of 3: 9 + 2·6 windows, all four kinds, and padding


class Case(NamedTuple):
    """Arguments of `results`, with few windows: a program of the interpreter takes milliseconds."""

    window: int
    shift: int
    dtype: str
    heads: int
    depth: int
    grids: tuple[tuple[int, int, int], ...]


CASES = {
    "L 49, d 32, fp32, shifted": Case(7, 3, "float32", 2, 32, ((1, 14, 13), (1, 5, 7))),
    "L 49, d 64, bf16": Case(7, 0, "bfloat16", 2, 64, ((1, 14, 20), (1, 7, 7))),
    "L 49, d 64, fp16, shifted": Case(7, 3, "float16", 1, 64, ((3, 7, 7), (1, 14, 14))),
    "L 144, d 32, bf16, shifted": Case(12, 6, "bfloat16", 1, 32, ((1, 24, 12), (1, 3, 3))),
    "L 144, d 64, fp32": Case(12, 0, "float32", 1, 64, ((1, 12, 12),)),
    "L 196, d 32, fp16, shifted": Case(14, 7, "float16", 1, 32, ((1, 6, 6),)),
    "L 196, d 64, bf16": Case(14, 0, "bfloat16", 1, 64, ((1, 14, 14),)),
    "L 9, d 16, fp32, shifted": Case(3, 1, "float32", 2, 16, GRIDS),
}


def results(attend, window, shift, dtype, heads=2, depth=8, grids=GRIDS, inputs=None):
    """Output, and gradients of qkv and table, from the same random numbers for every implementation and type."""
    plan = window_plan(grids, window, shift, CPU)
    generator = torch.Generator().manual_seed(1)
    slots = len(plan.slots.tokens)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    qkv, table, grad = draw(slots, 3 * heads * depth), draw((2 * window - 1) ** 2, heads), draw(slots, heads * depth)
    # Through `inputs`, so that float64 gets the same numbers as the type it is compared with.
    qkv, grad = qkv.to(inputs or dtype).to(dtype).requires_grad_(), grad.to(inputs or dtype).to(dtype)
    table = table.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    out = attend(qkv, table, plan)
    return [out, *torch.autograd.grad(out, (qkv, table), grad)]


@pytest.mark.parametrize("shift", [0, 1])
def test_sdpa_equals_math(shift):
    for found, expected in zip(
        results(window_attention_implementations.attend_sdpa, 3, shift, torch.float64),
        results(attend_math, 3, shift, torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shift", [0, 1])
def test_output_of_flex_equals_math(shift):
    """torch has no backward of FlexAttention on a CPU; on a GPU the check at a run's start compares gradients."""
    plan = window_plan(GRIDS, 3, shift, CPU)
    qkv, table = torch.randn(len(plan.slots.tokens), 3 * 32), torch.randn(25, 2)
    found, expected = (
        window_attention_implementations.flex(flex_attention, qkv, table, plan),
        attend_math(qkv, table, plan),
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [Swin, SwinV2])
def test_a_trunk_uses_the_implementation_it_is_given(make):
    trunk = make(embed_dim=16, depths=(1, 2), heads=(1, 2), window=3, size=32).double()
    crops = [torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.randn(3, 3, 20, 20, dtype=torch.float64)]
    expected, seen = trunk(crops), []

    def sdpa(qkv, table, plan):
        seen.append(plan.shift)
        return window_attention_implementations.attend_sdpa(qkv, table, plan)

    trunk.use_attention(sdpa)
    found = trunk(crops)
    assert seen == [0, 0, 1]
    torch.testing.assert_close(found.regions, expected.regions, rtol=0, atol=1e-12)
    layouts = trunk.window_layouts([(2, 32), (3, 20)], CPU)
    assert [(x.plan.shift, x.heads, x.depth, x.blocks) for x in layouts] == [
        (0, 1, 16, 1),
        (0, 2, 16, 1),
        (1, 2, 16, 1),
    ]


@cache
def interpreted(tiles: str) -> dict[str, list[float]]:
    """Relative errors of the interpreted kernels against float64, of output, qkv's and table's gradient, by case."""
    command = [sys.executable, "-m", "tests.models.interpreted_attention", tiles]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=launcher.REPOSITORY)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)


# fp32: sums of up to 600 terms. fp16, bf16: weights and outputs are rounded to 11 and 8 bits, and the interpreter
# truncates to bf16 where a GPU rounds. The table's gradient is summed in fp32 from products of rounded numbers.
LARGEST_ERROR = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
@pytest.mark.parametrize("tiles", ["one", "several"])
def test_triton_kernels_equal_float64(tiles):
    errors = interpreted(tiles)
    assert len(errors) >= 3
    for name in errors.keys() & CASES.keys():
        assert max(errors[name]) < LARGEST_ERROR[CASES[name].dtype], name


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
def test_triton_operator_composes_with_compile_and_checkpointing():
    """torch.library.opcheck (in the same process) passed; compiled and checkpointed gradients equal the plain ones."""
    interpreted_ones = interpreted("one")
    assert interpreted_ones["compiled"] == [0, 0, 0]
    assert interpreted_ones["checkpointed"] == [0, 0, 0]
    assert interpreted_ones["saved per slot"] == [3 * 16, 0, 0]  # qkv alone: no output, no probabilities
