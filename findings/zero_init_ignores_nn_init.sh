#!/usr/bin/env bash
# DeepSpeed 0.19.8 with torch 2.13.0: a model's own initialisation has no effect under deepspeed.zero.Init.
#
# Expected: `zero.Init` partitions parameters when a module has been built, and the constructor's own nn.init calls, which
# every vision transformer makes on its children (trunc_normal_ of 0.02, zero bias), give the initial values.
# Observed: each child is partitioned as soon as it exists. What the parent's constructor then writes into it goes
# to an empty placeholder. The parameters keep torch's default of nn.Linear, without an error or a warning, so training
# starts from another distribution than on one GPU.
#
# Output: asked for weight 7 and bias 0; without zero.Init 7.0 and 0.0, with it values below 0.36 (1/sqrt(8)) for both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
export DS_BUILD_OPS=0 DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6 setuptools==80.9.0 wheel==0.45.1
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8
cat > "$work/run.py" <<'PY'
import os

os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29621")
import deepspeed
import torch

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a C++ operator is compiled at the first collective
deepspeed.init_distributed("gloo")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)
        torch.nn.init.constant_(self.layer.weight, 7.0)
        torch.nn.init.zeros_(self.layer.bias)


plain = Net()
with deepspeed.zero.Init(config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}):
    partitioned = Net()
with deepspeed.zero.GatheredParameters(list(partitioned.parameters())), torch.no_grad():
    weight, bias = partitioned.layer.weight.abs().max(), partitioned.layer.bias.abs().max()
print(f"plain: weight {plain.layer.weight.max():.3f}, bias {plain.layer.bias.abs().max():.3f}")
print(f"zero.Init: largest weight {weight:.3f}, largest bias {bias:.3f}")
assert plain.layer.weight.max() == 7 and plain.layer.bias.abs().max() == 0
assert weight < 0.36 and bias > 0, "the constructor's values arrive now: the behaviour has changed"
PY
"$work/venv/bin/python" "$work/run.py" 2>"$work/log" || { tail -n 5 "$work/log"; exit 1; }
