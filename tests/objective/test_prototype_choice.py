"""The check of implementations of the passes over prototypes, on the CPU with broken ones."""

import pytest
import torch

from esvit_scale.objective import prototype_choice
from esvit_scale.objective.prototype_choice import Shape
from esvit_scale.objective.prototype_passes import Side, unavailable
from esvit_scale.objective.prototype_tiles import TilePasses

CPU = torch.device("cpu")


class WithoutCenter(TilePasses):
    def expectations(self, student, teacher, towards, with_grad_rows):
        return super().expectations(student, teacher._replace(center=0 * teacher.center), towards, with_grad_rows)


class WithoutLastTokens(TilePasses):
    def expectations(self, student, teacher, towards, with_grad_rows):
        towards = towards.clone()
        towards[-3:] = 0
        return super().expectations(student, teacher, towards, with_grad_rows)


class OverFewerTokens(TilePasses):
    def column_log_sum_exp(self, side, added):
        return super().column_log_sum_exp(side._replace(z=side.z[:-1]), added[:-1])


class Raising(TilePasses):
    def expectations(self, student, teacher, towards, with_grad_rows):
        raise RuntimeError("out of resource: shared memory\nand a long trace")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_are_accurate(dtype):
    assert prototype_choice.inaccuracy(TilePasses(), 32, dtype, CPU) is None


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (WithoutCenter, "its teacher's mean is off by"),
        (WithoutLastTokens, "its gradient of the prototypes is off by"),
        (OverFewerTokens, "its log-sum-exp over tokens is off by"),
    ],
)
def test_wrong_passes_are_found(wrong, problem):
    assert prototype_choice.inaccuracy(wrong(), 32, torch.bfloat16, CPU).startswith(problem)


def test_the_fastest_accurate_candidate_is_used(monkeypatch):
    kinds = {"tiles": TilePasses(), "triton": TilePasses(128), "raising": Raising()}
    monkeypatch.setattr(prototype_choice, "implementation", kinds.__getitem__)
    times = iter([2.0, 3.0, 1.0, 1.5])
    monkeypatch.setattr(prototype_choice, "median_milliseconds", lambda run, device: next(times))
    outcome = prototype_choice.choose(list(kinds), 2 * [Shape(4, 2, 8, 16)], torch.bfloat16, CPU)
    assert outcome.chosen == "triton"
    assert outcome.milliseconds == {"tiles": 5.0, "triton": 2.5}
    assert outcome.refused == {"raising": "RuntimeError: out of resource: shared memory"}


def test_wide_products_and_bottlenecks_stay_with_the_tiles(monkeypatch):
    pytest.importorskip("triton")
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert unavailable("triton", gpu, torch.bfloat16, 256) is None
    assert unavailable("triton", gpu, torch.float16, 256) is None
    assert (
        unavailable("triton", gpu, torch.float32, 256) == "multiplies in bf16, and this run's products are in float32"
    )
    assert unavailable("triton", gpu, torch.bfloat16, 512) == "needs objective.bottleneck ≤ 256"
    assert unavailable("tiles", gpu, torch.float32, 512) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert unavailable("triton", gpu, torch.bfloat16, 256) == "needs a GPU of compute capability 8.0 or newer"


def test_inputs_are_of_the_shape():
    inputs = prototype_choice._inputs(Shape(5, 3, 7, 4), torch.bfloat16, CPU)
    assert isinstance(inputs.student, Side)
    assert (inputs.student.z.shape, inputs.teacher.z.shape, inputs.teacher.rows.shape) == ((5, 4), (3, 4), (7, 4))
    assert inputs.towards.shape == (8, 4)
