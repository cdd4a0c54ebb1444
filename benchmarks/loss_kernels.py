"""What the Triton kernels of the prototype loss need on a GPU: registers, spills, shared memory, and bytes and FLOPs.

The kernels are compiled for GPUs that need not be there (sm_80: A100; sm_90: H100), so this runs on any machine. Bytes
are counted from the launches, beside those of the passes in torch's operations (loss_traffic.py), for the region loss
of Swin-T.

    python benchmarks/loss_kernels.py [--bottleneck 256] [--images 64]
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from attention_kernels import TARGETS, Needs, compiled_needs
from loss_traffic import FEW, MANY, bytes_per_logit

from esvit_scale.objective import prototype_kernels as kernels
from esvit_scale.objective.prototype_triton import splits, tiles_of

K, D, ELEMENT = 65536, 256, 2  # prototypes, numbers of a token or prototype, bytes of a number
STUDENT_REGIONS, TEACHER_REGIONS = 2 * 49 + 8 * 9, 2 * 49  # of an image in 2×224 + 8×96 crops
PROCESSORS = {80: 108, 90: 132}  # multiprocessors of an A100 and an H100

# The kernels as they are launched, with the compile-time arguments of each launch.
VARIANTS: dict[str, tuple[Any, dict[str, bool]]] = {
    "over_columns, student": (kernels.over_columns, {"MEANS": True, "OTHER_VALUES": False}),
    "over_columns, teacher": (kernels.over_columns, {"MEANS": True, "OTHER_VALUES": True}),
    "over_columns, Sinkhorn": (kernels.over_columns, {"MEANS": False, "OTHER_VALUES": False}),
    "gradient_of_rows": (kernels.gradient_of_rows, {"GRADIENT": True}),
}
MATRICES = (
    "rows_of",
    "columns_of",
    "values_of",
    "z_s",
    "z_t",
    "rows_s",
    "rows_t",
    "towards_s",
    "towards_t",
    "grad_rows",
)
VECTORS = ("bias", "log_sums", "entropies", "means", "log_sums_s", "log_sums_t", "mass")
FACTORS = ("scale", "scale_s", "scale_t")


def main() -> None:
    """Print both tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bottleneck", type=int, default=D, help="numbers of a token")
    parser.add_argument("--images", type=int, default=64, help="images of a micro-batch")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, triton {triton.__version__}\n")
    print("| kernel | registers sm_80 / sm_90 | spilled | shared memory |\n|---|---|---|---|")
    for name in VARIANTS:
        a, b = (needs(name, target, options.bottleneck) for target in TARGETS)
        both = f"{a.registers} / {b.registers} | {a.spilled} / {b.spilled} | {a.shared} / {b.shared}"
        print(f"| `{name}` | {both} |", flush=True)
    print()
    for row in traffic_rows(options.images):
        print(row)


def needs(name: str, target: int, bottleneck: int = D) -> Needs:
    """Compile a launch of VARIANTS for sm_`target` in bf16 and return what a program needs."""
    kernel, meta = VARIANTS[name]
    tiles = tiles_of((target // 10, target % 10))
    rows = tiles.gradient_rows if kernel is kernels.gradient_of_rows else tiles.rows
    sizes = {"D": bottleneck, "D_TILE": triton.next_power_of_2(bottleneck), "ROWS": rows, "COLUMNS": tiles.columns}
    types = dict.fromkeys(MATRICES, "*bf16") | dict.fromkeys(VECTORS, "*fp32") | dict.fromkeys(FACTORS, "fp32")
    return compiled_needs(kernel, {**sizes, "WIDE": False, **meta}, types, target, tiles.warps, tiles.stages)


class Moved(NamedTuple):
    """Bytes per logit of one side, read and written, in a forward and backward."""

    logits: float  # of tensors of the size of tokens × prototypes, or a tile of them
    operands: float  # tokens, prototypes and their means, each time a program loads or stores them


def by_kernels(students: int, teachers: int, target: int) -> tuple[Moved, Moved]:
    """Return the bytes per logit of the student and of the teacher that the kernels move."""
    tiles, row = tiles_of((target // 10, target % 10)), D * ELEMENT
    found = []
    for tokens, matrices in ((students, 1), (teachers, 2)):  # the teacher's means are of the student's prototypes
        parts, _ = splits(tokens, K, tiles, PROCESSORS[target])
        prototypes = matrices * row / tiles.rows  # each block of tokens loads all prototypes
        means = (2 * parts - 1 if parts > 1 else 1) * 4 * D / K  # fp32; written, and read where they are combined
        both = 2 * row / tiles.gradient_rows  # each block of prototypes loads all tokens and what they pull towards
        found.append(Moved(0.0, prototypes + means + both))
    return found[0], found[1]


def traffic_rows(images: int) -> Iterator[str]:
    """Yield the rows of a table of bytes per logit, and GB of the region loss of a micro-batch."""
    students, teachers = images * STUDENT_REGIONS, images * TEACHER_REGIONS
    yield "| bf16 | of logits, student | of logits, teacher | logits, GB | of operands, student | teacher | operands, GB |"
    yield "|---|---|---|---|---|---|---|"
    torch_passes = [sum(bytes_per_logit(torch.bfloat16, *counts)) for counts in ((MANY, FEW), (FEW, MANY))]
    total = (students * torch_passes[0] + teachers * torch_passes[1]) * K / 1e9
    yield f"| tiles | {torch_passes[0]:.0f} | {torch_passes[1]:.0f} | {total:.0f} | not counted | | |"
    for target in TARGETS:
        s, t = by_kernels(students, teachers, target)
        total = (students * s.operands + teachers * t.operands) * K / 1e9
        yield f"| triton, sm_{target} | 0 | 0 | 0 | {s.operands:.1f} | {t.operands:.1f} | {total:.1f} |"


if __name__ == "__main__":
    main()
