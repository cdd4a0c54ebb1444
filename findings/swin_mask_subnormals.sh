#!/usr/bin/env bash
# torch 2.14.1 on x86: the mask of shifted windows in Swin's published code (−100) makes attention on a CPU several times
# slower than no mask, or than a mask of −10⁴, although all three do the same arithmetic on tensors of the same shapes.
#
# Expected: adding a mask to the scores costs nothing but the addition, whatever its values are.
# Observed: exp(−100) = 3.7e-44 is a subnormal fp32 number. The softmax returns thousands of them, and they go on into the
# two products with the probabilities in forward and backward, where each costs the processor an assist of about a
# hundred cycles. With −10⁴ they are exactly zero and nothing else changes. GPUs compute with subnormals at full speed.
#
# Output (one thread, Intel Xeon with AVX-512, fp32, half of the windows masked; milliseconds of forward and backward):
#   no mask: 38, mask of -100: 283, mask of -10000: 36
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.2.6
cat > "$work/run.py" <<'PY'
import time

import torch

torch.set_num_threads(1)
torch.manual_seed(0)
windows, length, depth = 1024, 49, 32
q, k, v = (torch.randn(windows, length, depth, requires_grad=True) for _ in range(3))
grad = torch.randn(windows, length, depth)
apart = torch.rand(length) < 0.4


def milliseconds(value: float) -> float:
    mask = torch.zeros(windows, length, length)
    mask[windows // 2 :] = torch.where(apart[:, None] == apart[None], 0.0, value)
    times = []
    for _ in range(5):
        began = time.process_time()
        scores = q @ k.transpose(1, 2) * depth**-0.5 + mask
        torch.autograd.grad(scores.softmax(-1) @ v, (q, k, v), grad)
        times.append(time.process_time() - began)
    return 1000 * min(times)


none, swin, zero = (milliseconds(value) for value in (0.0, -100.0, -10000.0))
print(f"no mask: {none:.0f}, mask of -100: {swin:.0f}, mask of -10000: {zero:.0f}")
if swin < 2 * zero:
    raise SystemExit("the behaviour has changed: subnormals are no longer slow")
PY
"$work/venv/bin/python" "$work/run.py"
