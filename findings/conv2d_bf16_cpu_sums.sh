#!/usr/bin/env bash
# torch 2.14.1, CPU without oneDNN's bf16 convolutions: conv2d's backward in bf16 adds up the weight's gradient over images in bf16.
#
# Expected: as in torch's bf16 matrix products, and in its bf16 convolutions on a CPU with AVX-512, which accumulate in fp32
# and round once (0.2 % off), whatever the batch.
# Observed: the error grows with the batch: the images are taken one after the other, and the gradient of each is added to
# a running sum in bf16. So it is wherever oneDNN does not take the convolution: on every x86 CPU without AVX-512 (AMD
# before Zen 4, most desktops), and elsewhere with oneDNN switched off, as here, so that any machine shows it. Outputs, and the gradients of
# input and bias, are right, so a network goes on training, and there is no error. Under autocast it is the same.
#
# Output (relative error against fp64 of the same bf16 inputs):
#   8 images: input 0.004, weight 0.004
#   100 images: input 0.004, weight 0.012
#   1600 images: input 0.004, weight 0.047
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.2.6
cat > "$work/run.py" <<'PY'
import torch
from torch.nn import functional as F

torch.manual_seed(0)
torch.set_num_threads(1)
torch._C._set_mkldnn_enabled(False)
kernel = (torch.randn(16, 16, 3, 3) * 0.1).bfloat16()


def gradients(x: torch.Tensor, grad: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (x, kernel)]
    F.conv2d(*leaves, padding=1).backward(grad.to(dtype))
    return [leaf.grad.double() for leaf in leaves]


found = {}
for images in (8, 100, 1600):
    x, grad = torch.randn(images, 16, 8, 8).bfloat16(), (torch.randn(images, 16, 8, 8) + 0.5).bfloat16()
    pairs = zip(gradients(x, grad, torch.bfloat16), gradients(x, grad, torch.float64))
    of_x, of_weight = (float((a - b).norm() / b.norm()) for a, b in pairs)
    print(f"{images} images: input {of_x:.3f}, weight {of_weight:.3f}")
    found[images] = of_weight
    if of_x > 0.01:
        raise SystemExit("the behaviour has changed: the gradient of the input is off too")
if not (found[8] < 0.005 and found[100] > 2 * found[8] and found[1600] > 2 * found[100]):
    raise SystemExit("the behaviour has changed")
PY
"$work/venv/bin/python" "$work/run.py"
