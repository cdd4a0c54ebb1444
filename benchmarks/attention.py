"""Window attention with its bias and masks, forward and backward: written out (ours) and by torch's SDPA.

    python benchmarks/attention.py [--preset swin_t] [--batch 4] [--precision fp32 bf16] [--rounds 5]

One row a stage and shift, at the packed layout of the preset's crops. The two take turns on the same tensors; both give
the gradients of q, k, v and of the bias, which is what rules most fused kernels out. The largest difference of the outputs
stands beside the times.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from step import seconds
from torch import Tensor
from torch.nn import functional as F

from esvit_scale import config as configs
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.swin import WindowAttention
from esvit_scale.models.window_attention import Attention
from esvit_scale.models.windows import WindowPlan, merged, window_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="swin_t")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = configs.resolve(options.preset)
    with torch.device("meta"):
        trunk = build_trunk(config)
    sizes = dict.fromkeys(config.crop_sizes)
    grids = tuple((config.crop_sizes.count(s) * options.batch, -(-s // 4), -(-s // 4)) for s in sizes)
    print("| stage | shift | windows | heads | precision | ours, ms | SDPA, ms | SDPA / ours | largest difference |")
    print("|---|---|---|---|---|---|---|---|---|")
    for number, stage in enumerate(trunk.stages, start=1):  # type: ignore[arg-type]
        attention = stage.blocks[0].attn
        assert isinstance(attention, WindowAttention)
        for shift in dict.fromkeys(stage.shifts):
            plan = window_plan(grids, stage.window, shift, device)
            for precision in options.precision:
                row(number, shift, attention, plan, precision, options.rounds, device)
        grids = merged(grids)


def row(
    stage: int,
    shift: int,
    attention: WindowAttention,
    plan: WindowPlan,
    precision: str,
    rounds: int,
    device: torch.device,
) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    length, width = plan.window**2, attention.qkv.in_features
    slots = len(plan.slots.tokens)
    qkv = torch.randn(slots, 3 * width, device=device, dtype=dtype, requires_grad=True)
    bias = torch.randn(attention.heads, length, length, device=device, requires_grad=True)
    grad = torch.randn(slots, width, device=device, dtype=dtype)
    mask = torch.zeros(slots // length, 1, length, length, device=device)
    for first, end, values in plan.masks:
        mask[first:end] = values

    def ours() -> Tensor:
        return Attention.apply(qkv, bias, plan.masks)

    def sdpa() -> Tensor:
        q, k, v = qkv.view(-1, length, 3, attention.heads, width // attention.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=(bias + mask).to(dtype))
        return mixed.transpose(1, 2).reshape(slots, width)

    difference = (ours() - sdpa()).abs().max().item()
    times: dict[Callable[[], Tensor], list[float]] = {ours: [], sdpa: []}
    for _ in range(rounds + 1):
        for function, found in times.items():
            found.append(seconds(lambda f=function: f().backward(grad), device))  # type: ignore[misc]
    mine, torchs = (1e3 * statistics.median(found[1:]) for found in times.values())
    shape = f"| {stage} | {shift} | {slots // length} | {attention.heads} | {precision} "
    print(f"{shape}| {mine:.1f} | {torchs:.1f} | {torchs / mine:.2f} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    main()
