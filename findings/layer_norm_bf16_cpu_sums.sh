#!/usr/bin/env bash
# torch 2.13.0, CPU: layer_norm's backward in bf16 adds up the gradients of weight and bias in bf16, also for fp32 weights.
#
# Expected: as in torch's matrix products, convolutions and `sum`, whose bf16 kernels accumulate in fp32 and round once
# (0.2 % off), the gradients of a layer norm's weight and bias are right to one rounding. With fp32 weights, as under
# autocast, they are summed in fp32, since that is their precision.
# Observed: both are running sums in bf16, where a sum stops growing at 256 times its terms. At 100,000 tokens nearly
# all of the bias's gradient is lost, in both cases. The gradient of the input is right, so a network goes on training, and
# there is no error. The same sums by `grad.sum(0)` are right.
#
# Output (relative error against fp64 of the same bf16 inputs):
#   bf16 weights: input 0.002, weight 0.29, bias 0.96; grad.sum(0) 0.001
#   fp32 weights: input 0.002, weight 0.29, bias 0.96; grad.sum(0) 0.001
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$work/run.py" <<'PY'
import torch
from torch.nn import functional as F

torch.manual_seed(0)
torch.set_num_threads(1)
tokens, width = 100_000, 96
x = torch.randn(tokens, width).bfloat16()
grad = (torch.randn(tokens, width) + 0.3).bfloat16()
weight, bias = (torch.rand(width) + 1).bfloat16(), torch.randn(width).bfloat16()


def gradients(of_x: torch.dtype, of_weights: torch.dtype) -> list[torch.Tensor]:
    leaves = [t.detach().to(d, copy=True).requires_grad_() for t, d in ((x, of_x), (weight, of_weights), (bias, of_weights))]
    out = F.layer_norm(leaves[0], (width,), leaves[1], leaves[2])
    out.backward(grad.to(out.dtype))
    return [leaf.grad.double() for leaf in leaves]


def error(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found - true).norm() / true.norm())


true = gradients(torch.float64, torch.float64)
by_sum = error(grad.sum(0).double(), true[2])
for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
    of_x, of_weight, of_bias = (error(a, b) for a, b in zip(gradients(torch.bfloat16, dtype), true))
    print(f"{name} weights: input {of_x:.3f}, weight {of_weight:.2f}, bias {of_bias:.2f}; grad.sum(0) {by_sum:.3f}")
    as_seen = of_x < 0.005 and by_sum < 0.005 and of_weight > 0.1 and of_bias > 0.5
    if not as_seen:
        raise SystemExit("the behaviour has changed")
PY
"$work/venv/bin/python" "$work/run.py"
