"""Bytes that one optimizer step reads and writes outside of matrix products, by kind of operator and by call site.

    python benchmarks/traffic.py [--preset swin_t] [--batch 4] [--precision bf16] [--rows 20]

A call site is the innermost line of this package, or else of DeepSpeed, that called the operator; what autograd computes
by itself in the backward has the site "autograd". Bytes are those of an operator's tensors, so they depend neither on the
machine nor on its load. Views are free and left out.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
PACKAGES = ("/esvit_scale/", "/deepspeed/")


class Traffic(TorchDispatchMode):
    """Within the context, adds up the bytes of every operator's inputs and outputs, by (operator, call site)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[str, str], int] = defaultdict(int)
        self.bytes: dict[tuple[str, str], int] = defaultdict(int)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        out = function(*args, **given)
        if not function.is_view:
            key = function.overloadpacket.__name__, call_site()
            tensors = [t for t in tree_leaves((args, given, out)) if isinstance(t, Tensor)]
            self.calls[key] += 1
            self.bytes[key] += sum(t.numel() * t.element_size() for t in tensors)
        return out


def call_site() -> str:
    """Return "file:line" of the innermost frame in one of PACKAGES."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        for package in PACKAGES:
            if package in path:
                return f"{path.rsplit(package, 1)[1]}:{frame.f_lineno} {frame.f_code.co_name}"
        if path.endswith("torch/autograd/graph.py"):
            return "autograd"
        frame = frame.f_back  # type: ignore[assignment]
    return "autograd"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="swin_t", help="a preset or a config file")
    parser.add_argument("--batch", type=int, default=4, help="images a step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rows", type=int, default=20, help="call sites to print")
    options = parser.parse_args()
    from step import our_step, random_crops

    from esvit_scale import config as configs
    from esvit_scale.parallel import world as worlds

    overrides = [f"train.global_batch={options.batch}", f"train.precision={options.precision}"]
    config, world = configs.resolve(options.preset, overrides), worlds.start()
    step = our_step(config, world, random_crops(config, options.batch, world.device))
    step()
    with Traffic() as traffic:
        step()
    print(f"torch {torch.__version__}, {options.preset}, batch {options.batch}, {options.precision}\n")
    kinds: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for (kind, _), amount in traffic.bytes.items():
        kinds[kind][1] += amount
    for (kind, _), calls in traffic.calls.items():
        kinds[kind][0] += calls
    print("| operator | calls | GB |\n|---|---|---|")
    for kind, (calls, amount) in sorted(kinds.items(), key=lambda item: -item[1][1])[: options.rows]:
        print(f"| {kind} | {calls} | {amount / 1e9:.2f} |")
    print("\n| call site | operator | calls | GB |\n|---|---|---|---|")
    rest = [key for key in traffic.bytes if key[0] not in PRODUCTS]
    for key in sorted(rest, key=lambda key: -traffic.bytes[key])[: options.rows]:
        print(f"| {key[1]} | {key[0]} | {traffic.calls[key]} | {traffic.bytes[key] / 1e9:.2f} |")
    print(f"\n{sum(traffic.bytes[key] for key in rest) / 1e9:.1f} GB outside of matrix products")
    worlds.stop()


if __name__ == "__main__":
    main()
