"""Images per second of `embed` on one core beside the official evaluation pipeline, and how much its features differ.

    python benchmarks/embed.py [--data SHARDS] [--images 24] [--rounds 5] [--batch 64] [--precision fp32] [--no-trunk] [--json]

Official: Pillow decodes the whole JPEG, torchvision resizes and crops it, ToTensor and Normalize follow, and timm's
Swin-T of the same weights runs in fp32 on batches of --batch, as EsViT's eval_knn.py does. Both sides take turns on the
same JPEGs in one process with one thread, in processor time, and the median round counts. The JPEGs are those of input.py.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms as T

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from input import bundled, pillow, read
from step import machine

from esvit_scale import config as configs
from esvit_scale.data import photometric
from esvit_scale.data.evaluation_crop import decode_centre_crop, evaluation_side
from esvit_scale.data.pixel_format import RGB8
from esvit_scale.evaluate.features import CPU_BATCH, encode_batch
from esvit_scale.models.initialize import initialize
from esvit_scale.models.registry import build_trunk

SIZE = 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an indexed shard set of JPEGs instead of the bundled photographs")
    parser.add_argument("--images", type=int, default=24, help="JPEGs of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64, help="images per batch, of both sides")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of our trunk; official is fp32")
    parser.add_argument("--no-trunk", action="store_true", help="measure decoding and resizing only")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sets = {str(options.data): read(options.data, options.images)} if options.data else bundled(options.images)
    found: dict[str, Any] = {"machine": machine()}
    for name, files in sets.items():
        found[name] = pixels(files, options.rounds)
    if not options.no_trunk:
        name, files = next(iter(sets.items()))
        found[name] |= whole((files * options.batch)[: options.batch], options.rounds, options.precision)
    print(json.dumps(found, indent=2) if options.json else table(found, list(sets)))


def pixels(files: list[bytes], rounds: int) -> dict[str, Any]:
    """Rates of decoding and resizing, and the differences of the crops in levels of 255."""
    crop = T.Compose([T.Resize(evaluation_side(SIZE), T.InterpolationMode.BICUBIC), T.CenterCrop(SIZE)])

    def official() -> list[Any]:
        return [np.asarray(crop(pillow(data))) for data in files]

    def ours() -> list[Any]:
        return [decode_centre_crop(data, SIZE, RGB8) for data in files]

    differences = np.abs(np.stack(official()).astype(int) - np.stack(ours()))
    rates = in_turns(official, ours, len(files), rounds)
    return {"decoding and resizing": rates, "mean difference": differences.mean(), "largest": int(differences.max())}


def whole(files: list[bytes], rounds: int, precision: str) -> dict[str, Any]:
    """Rates from the files to the features of a Swin-T, and how much the features differ."""
    import timm

    trunk = build_trunk(configs.resolve("swin_t")).eval()
    initialize(trunk, 0)
    form = trunk.timm_form(SIZE)
    assert form is not None
    norm = partial(torch.nn.LayerNorm, eps=float(form.norm_eps))
    reference = timm.create_model(form.architecture, num_classes=0, norm_layer=norm, **form.arguments).eval()
    reference.load_state_dict(form.tensors(trunk.state_dict()), strict=False)
    transform = T.Compose(
        [
            T.Resize(evaluation_side(SIZE), T.InterpolationMode.BICUBIC),
            T.CenterCrop(SIZE),
            T.ToTensor(),
            T.Normalize(photometric.MEAN, photometric.STD),
        ]
    )

    @torch.no_grad()
    def official(batch: int = len(files)) -> Tensor:
        images = torch.stack([transform(pillow(data)) for data in files])
        return torch.cat([reference(part) for part in images.split(batch)])

    @torch.no_grad()
    def ours() -> Tensor:
        crops = np.stack([decode_centre_crop(data, SIZE, RGB8) for data in files])
        images = photometric.normalize_(photometric.unit(torch.from_numpy(crops).permute(0, 3, 1, 2)))
        return encode_batch(lambda x: trunk([x]).view, images, torch.device("cpu"), precision)

    cosine = F.cosine_similarity(official(), ours())
    return {
        f"the whole, batch {len(files)}": in_turns(official, ours, len(files), rounds),
        f"the whole, official in batches of {CPU_BATCH}": in_turns(
            partial(official, CPU_BATCH), ours, len(files), rounds
        ),
        "smallest cosine": cosine.min().item(),
    }


def in_turns(official: Callable[[], Any], ours: Callable[[], Any], images: int, rounds: int) -> list[float]:
    """Images/s of both sides by their median rounds, and the smallest and largest ratio of a round."""
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for side, taken in zip((official, ours), times, strict=True):
            began = time.process_time()
            side()
            taken.append(time.process_time() - began)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    return [*(images / statistics.median(taken) for taken in times), min(ratios), max(ratios)]


def table(found: dict[str, Any], sets: list[str]) -> str:
    lines = [
        found["machine"],
        "",
        "| JPEGs | stage | official | ours | ratio | of the rounds |",
        "|---|---|---|---|---|---|",
    ]
    for name in sets:
        for stage, value in found[name].items():
            if isinstance(value, list):
                theirs, ours, low, high = value
                lines.append(
                    f"| {name} | {stage} | {theirs:.1f} | {ours:.1f} | {ours / theirs:.2f} | {low:.2f}–{high:.2f} |"
                )
    lines += ["", *(f"{name}: {k} {v:.6g}" for name in sets for k, v in found[name].items() if not isinstance(v, list))]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
