#!/usr/bin/env bash
# DeepSpeed 0.19.8 with torch 2.13.0: at ZeRO 3 a parameter that a step does not use is moved by its previous gradient.
#
# Expected: a layer that takes no part in a step (layer drop, an unused head, a branch chosen by the data) has no
# gradient, and plain SGD without momentum or decay leaves it where it is, as ZeRO 1 and 2 do.
# Observed: at stage 3 the partition's gradient buffer still holds the gradient of the last step that used the
# parameter, and it is applied again, at full size, in every following step. Nothing is logged.
#
# Output (norm of the change of the unused layer in three steps): ZeRO 1: 0, 0, 0 · ZeRO 2: 0, 0, 0 · ZeRO 3: 0.018, 0.018,
# 0.018 (the size of its first, real step).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
export DS_BUILD_OPS=0 DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6 setuptools==80.9.0 wheel==0.45.1
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8
cat > "$work/run.py" <<'PY'
import os
import sys

os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a C++ operator is compiled at the first collective


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x, use_second):
        x = self.first(x)
        return (self.second(x) if use_second else x).square().mean()


torch.manual_seed(0)
net = Net()
engine, *_ = deepspeed.initialize(
    model=net,
    optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
    config={
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": int(sys.argv[1])},
    },
)
values = []
for step in range(4):
    engine.backward(engine(torch.randn(4, 8), step == 0))  # only the first step uses `second`
    engine.step()
    values.append(safe_get_full_fp32_param(engine.module.second.weight).clone())
print(*(f"{float((b - a).norm()):.6f}" for a, b in zip(values, values[1:], strict=False)))
PY
for stage in 1 2 3; do
  moved[stage]=$("$work/venv/bin/python" "$work/run.py" "$stage" $((29610 + stage)) 2>"$work/log" | tail -n 1) || { tail -n 5 "$work/log"; exit 1; }
  echo "ZeRO $stage: the unused layer moves by ${moved[stage]}"
done
still="0.000000 0.000000 0.000000"
if [ "${moved[1]}" != "$still" ] || [ "${moved[2]}" != "$still" ]; then echo "ZeRO 1 or 2 has changed"; exit 1; fi
[ "${moved[3]}" != "$still" ] || { echo "ZeRO 3 leaves the layer alone now: the behaviour has changed"; exit 1; }
