"""Autocast as a GPU does it: more operators are computed and returned in fp32 than on a CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from esvit_scale.models.layer_norm import LayerNorm
from tests.models.test_parameter_gradients import SHAPES, narrow_trunk

# Operators that torch's CUDA autocast widens and its CPU autocast does not, as far as networks here use them
# (AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE in ATen/autocast_mode.h).
WIDENED = {"exp", "log", "reciprocal", "rsqrt", "pow", "layer_norm", "group_norm", "logsumexp", "norm", "normalize"}
WIDENED_WITHOUT_DTYPE = {"softmax", "log_softmax", "sum", "cumsum", "prod", "vector_norm"}


class CudaAutocast(TorchFunctionMode):
    """A mode in which these operators return fp32 for bf16 inputs wherever CPU autocast is on, as CUDA autocast's do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "").removeprefix("linalg_")
        with_dtype = name in WIDENED_WITHOUT_DTYPE and kwargs.get("dtype") is None
        widens = (with_dtype or name in WIDENED) and kwargs.get("out") is None
        if widens and torch.is_autocast_enabled("cpu"):
            args = tuple(x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x for x in args)
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", SHAPES)
def test_trunks_train_in_the_autocast_of_a_gpu(name: str, tmp_path: Any) -> None:
    """The backward runs outside of autocast, as DeepSpeed's does: what the forward saved must fit its gradients."""
    trunk = narrow_trunk(name, tmp_path).float()
    for module in trunk.modules():
        if type(module) is LayerNorm:  # which is torch's on a GPU
            module.__class__ = nn.LayerNorm
    torch.manual_seed(0)
    crops = [torch.randn(4, 3, 64, 64), torch.randn(4, 3, 32, 32)]
    with torch.autocast("cpu", torch.bfloat16), CudaAutocast():
        features = trunk(crops)
    sum(f.float().square().mean() for f in (features.view, features.regions) if len(f)).backward()  # type: ignore[union-attr]
    assert all(bool(p.grad.isfinite().all()) for p in trunk.parameters() if p.grad is not None)
