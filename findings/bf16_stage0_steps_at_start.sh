#!/usr/bin/env bash
# DeepSpeed 0.19.8 with torch 2.13.0: with bf16 at ZeRO 0, `deepspeed.initialize` itself takes an optimizer step.
#
# Expected: initialize() wraps model and optimizer; the optimizer's step count and moments are those of a new optimizer
# until the first engine.step().
# Observed: the wrapper (here FP16_UnfusedOptimizer, although the precision is bf16) makes the optimizer's state by a
# real step with zero gradients. Adam's step count is 1 before training, so its bias correction is one step ahead, and
# decoupled weight decay, which needs no gradient, has been applied once at the full learning rate. A restart that loads
# weights before initialize() decays them once more. ZeRO 1 does neither.
#
# Output (AdamW, lr 0.1, weight decay 0.5: one step multiplies a weight without gradient by 0.95):
#   ZeRO 0: FP16_UnfusedOptimizer: step counts [1, 1], fp32 weights x 0.950
#   ZeRO 1: DeepSpeedZeroOptimizer: step counts [], fp32 weights x 1.000
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

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a C++ operator is compiled at the first collective
torch.manual_seed(0)
net = torch.nn.Linear(64, 64)
before = net.weight.detach().clone()
optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
engine, *_ = deepspeed.initialize(
    model=net,
    optimizer=optimizer,
    config={
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": int(sys.argv[1])},
    },
)
counts = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
masters = torch.cat([p.detach().flatten() for group in optimizer.param_groups for p in group["params"]])
masters = masters[: before.numel()]  # the fp32 values that will be trained; the weight comes before the bias
ratio = float((masters * before.flatten()).sum() / before.square().sum())
print(f"{type(engine.optimizer).__name__}: step counts {counts}, fp32 weights x {ratio:.3f}")
PY
for stage in 0 1; do
  seen[stage]=$("$work/venv/bin/python" "$work/run.py" "$stage" $((29630 + stage)) 2>"$work/log" | tail -n 1) || { tail -n 5 "$work/log"; exit 1; }
  echo "ZeRO $stage: ${seen[stage]}"
done
case "${seen[1]}" in *"counts [], fp32 weights x 1.000") ;; *) echo "ZeRO 1 has changed"; exit 1 ;; esac
case "${seen[0]}" in *"counts [1, 1], fp32 weights x 0.950") ;; *) echo "the behaviour has changed"; exit 1 ;; esac
