"""Bytes that the fused prototype loss reads and writes per logit, by counting the tensors of every operation.

    python benchmarks/loss_traffic.py [--dtype bfloat16 float32]

One logit is one (token, prototype) pair; student and teacher tokens are counted apart, by running the loss with many of
the one and few of the other. Only tensors of the size of a tile of logits are counted, each time an operation reads or
writes them: this is what passes through memory on a GPU, whose caches hold no tile. On a CPU a tile stays in the caches.
The count includes the matrix products' reading and writing of tiles, and not that of tokens and prototypes. Products in
bf16 are counted as a GPU computes them, also on a CPU that would compute them in fp32.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ["ESVIT_PRODUCTS"] = "bf16"

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from esvit_scale.objective.prototype_tiles import TilePasses
from esvit_scale.objective.prototypes import prototype_cross_entropy

D, K, TILE = 16, 1024, 256
MANY, FEW = 2000, 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    options = parser.parse_args()
    print("| products in | a student's logit, read + written | a teacher's logit, read + written |")
    print("|---|---|---|")
    for dtype in options.dtype:
        cells = [bytes_per_logit(getattr(torch, dtype), *counts) for counts in ((MANY, FEW), (FEW, MANY))]
        print(f"| {dtype} | " + " | ".join(f"{r:.0f} + {w:.0f} bytes" for r, w in cells) + " |")


def bytes_per_logit(dtype: torch.dtype, students: int, teachers: int) -> tuple[float, float]:
    """Return the bytes read and written per logit of the loss with its gradients, for so many tokens of each side."""
    z_s, rows_s = (torch.randn(n, D, dtype=dtype, requires_grad=True) for n in (students, K))
    z_t, rows_t = torch.randn(teachers, D, dtype=dtype), torch.randn(K, D, dtype=dtype)
    match, weight = torch.zeros(students, 1, dtype=torch.int64), torch.full((students, 1), 1 / students)
    with Traffic(at_least=max(students, teachers) * TILE) as traffic:
        loss, _ = prototype_cross_entropy(
            z_s, rows_s, z_t, rows_t, torch.zeros(K), match, weight, 0.1, 0.04, TilePasses(TILE)
        )
        loss.backward()
    logits = max(students, teachers) * K
    return traffic.read / logits, traffic.written / logits


class Traffic(TorchDispatchMode):
    """A context that adds up the bytes of large tensors which operations read and write; views cost nothing.

    Attributes:
        read, written: bytes so far.
    """

    def __init__(self, at_least: int) -> None:
        """Args:
        at_least: number of elements from which a tensor counts.
        """
        super().__init__()
        self._at_least = at_least
        self.read = self.written = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        schema = operator._schema
        name = schema.name.removeprefix("aten::")
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if is_view or name.startswith(("empty", "new_empty", "detach")):
            return result
        given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
        overwritten = "self" if name == "copy_" or (name == "addmm" and kwargs.get("beta") == 0) else "out"
        for argument, value in given.items():
            if argument not in ("out", overwritten):
                for tensor in value if isinstance(value, list | tuple) else [value]:
                    self.read += self._bytes(tensor)
        results = result if isinstance(result, list | tuple) else [result]
        self.written += sum(map(self._bytes, results))
        return result

    def _bytes(self, tensor: Any) -> int:
        large = isinstance(tensor, torch.Tensor) and tensor.numel() >= self._at_least
        return tensor.numel() * tensor.element_size() if large else 0


if __name__ == "__main__":
    main()
