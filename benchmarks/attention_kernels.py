"""What the Triton kernels of window attention need on a GPU: registers, spills, shared memory, bytes and FLOPs.

The kernels are compiled for GPUs that need not be there (sm_80: A100; sm_90: H100), so this runs on any machine. Bytes
and FLOPs are counted from shapes, per head and window, beside those of the written-out version.

    python benchmarks/attention_kernels.py
    python benchmarks/attention_kernels.py --dtypes bf16 fp16 fp32
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from esvit_scale.models import window_attention_kernels as kernels
from esvit_scale.models.window_attention import Attention
from esvit_scale.models.windows import window_plan

WINDOWS, DEPTHS, TARGETS = (7, 12, 14), (32, 64), (80, 90)


class Needs(NamedTuple):
    """What one program of a compiled kernel needs."""

    registers: int  # per thread
    spilled: int  # bytes per thread
    shared: int  # bytes


def main() -> None:
    """Print both tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--windows", nargs="+", type=int, default=WINDOWS, help="tokens along a side")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, triton {triton.__version__}, {kernels.WARPS} warps\n")
    print(
        "| window | head | type | kernel | registers sm_80 / sm_90 | spilled | shared memory |\n|---|---|---|---|---|---|---|"
    )
    for dtype in arguments.dtypes:
        for window in arguments.windows:
            for depth in DEPTHS:
                for kernel in kernels_of(window):
                    a, b = (needs(kernel, window, depth, dtype, target) for target in TARGETS)
                    name = f"`{kernel.fn.__name__}`"
                    both = f"{a.registers} / {b.registers} | {a.spilled} / {b.spilled} | {a.shared} / {b.shared}"
                    print(f"| {window}×{window} | {depth} | {dtype} | {name} | {both} |", flush=True)
    print("\n| window | head | | read and written, KB | FLOPs, millions |\n|---|---|---|---|---|")
    for row in traffic_rows(arguments.windows):
        print(row)


def kernels_of(window: int) -> list[Any]:
    """Return the kernels that run for windows of side `window`."""
    if window**2 <= kernels.LARGEST_TILE:
        return [kernels.forward, kernels.backward_whole]
    return [kernels.forward, kernels.backward_queries, kernels.backward_keys, kernels.backward_table]


def ptxas(target: int) -> str:
    """Return the path of the assembler that Triton takes for sm_`target`: since 3.9 it is not `ptxas` from sm_90 on."""
    found: Any = get_ptxas(target)
    return str(getattr(found, "path", None) or found[0])


def needs(
    kernel: Any,
    window: int,
    depth: int,
    dtype: str,
    target: int,
    warps: int = kernels.WARPS,
    stages: int = kernels.STAGES,
) -> Needs:
    """Compile a kernel for sm_`target` and return what it needs."""
    side = kernels.tile_side(window)
    meta = {"WINDOW": window, "SHIFT": window // 2, "D": depth, "S": side, "WIDE": False}
    types = dict.fromkeys(("qkv", "out", "grad", "grad_qkv"), f"*{dtype}")
    types |= {"table": "*fp32", "partials": "*fp32", "rowwise": "*fp32", "scale": "fp32"}
    return compiled_needs(kernel, meta, types, target, warps, stages)


def compiled_needs(
    kernel: Any, meta: dict[str, Any], types: dict[str, str], target: int, warps: int, stages: int
) -> Needs:
    """Compile a kernel for sm_`target` and return what it needs.

    Args:
        meta: values of its compile-time arguments.
        types: Triton's types of its other arguments; those that are not named are i32.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in meta else types.get(name, "i32") for name in names}
    aligned: Any = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=meta, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        architecture = "sm_90a" if target == 90 else f"sm_{target}"
        command = [ptxas(target), "-v", f"-arch={architecture}", str(ptx), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert registers, said
    assert spills, said
    return Needs(int(registers[1]), int(spills[1]) + int(spills[2]), compiled.metadata.shared)


class Traffic(TorchDispatchMode):
    """A mode that counts the bytes of all inputs and outputs of operators; views count as nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func not in ALLOCATIONS:
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            self.bytes += sum({id(x): x.numel() * x.element_size() for x in tensors}.values())
        return result


ALLOCATIONS = {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default}


def traffic_rows(windows: Sequence[int]) -> Iterator[str]:
    """Yield rows of KB and FLOPs per window and head, forward and backward, in bf16."""
    for window in windows:
        for depth in DEPTHS:
            for name, (moved, flops) in (
                ("written out", written_out(window, depth)),
                ("Triton", by_kernels(window, depth)),
            ):
                yield f"| {window}×{window} | {depth} | {name} | {moved / 1e3:.1f} | {flops / 1e6:.2f} |"


def written_out(window: int, depth: int) -> tuple[float, float]:
    """Return bytes and FLOPs of the written-out attention, counted as it runs: operators' inputs and outputs."""
    device, count = torch.device("meta"), 64
    plan = window_plan(((count, window, window),), window, 0, torch.device("cpu"))
    qkv = torch.empty(count * window**2, 3 * depth, dtype=torch.bfloat16, device=device, requires_grad=True)
    bias = torch.empty(1, window**2, window**2, device=device, requires_grad=True)
    flops, traffic = FlopCounterMode(display=False), Traffic()
    with flops, traffic:
        out = Attention.apply(qkv, bias, plan.masks)
        torch.autograd.grad(out, (qkv, bias), torch.empty_like(out))
    return traffic.bytes / count, flops.get_total_flops() / count


def by_kernels(window: int, depth: int) -> tuple[float, float]:
    """Return bytes and FLOPs of the kernels: each reads and writes a window once (again from the cache), in whole tiles.

    The table and its partial gradients are left out: they are shared by many windows.
    """
    length, side = window**2, kernels.tile_side(window)
    blocks = -(-length // side)
    if blocks == 1:  # q, k, v → o; q, k, v, do → dq, dk, dv
        values, numbers, products = 4 + 7, 0, 2 + 5
    else:  # the same forward; q, k, v, o, do → dq; q, k, v, do → dk, dv; q, k, v, do
        values, numbers, products = 4 + 6 + 6 + 4, 1 + 2 + 2 + 2, 2 + 3 + 4 + 2
    return 2 * values * length * depth + 4 * numbers * length, products * 2 * (blocks * side) ** 2 * depth


if __name__ == "__main__":
    main()
