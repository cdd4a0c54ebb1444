"""What a trunk sees, as pictures: attention and token components of one image, correspondences between two views."""

import argparse
from pathlib import Path
from typing import Any

from esvit_scale.commands.parser import add_checkpoint, command, count, positive


def add_to(evaluate: Any) -> None:
    """Adds `attention` and `correspondence` to the group `evaluate`."""
    attention = command(evaluate, "attention", _attention, "attention maps and token components of one image")
    attention.add_argument("image", type=Path, metavar="IMAGE", help="a picture file")
    add_checkpoint(attention)
    attention.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the pictures and arrays")
    attention.add_argument(
        "--size", type=positive, metavar="N", help="pixels of the short side (default: the run's global crops)"
    )

    correspondence = command(evaluate, "correspondence", _correspondence, "do tokens of two views find each other")
    add_checkpoint(correspondence)
    correspondence.add_argument(
        "--data", type=Path, required=True, metavar="D", help="shards, a folder of images, or one image"
    )
    correspondence.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for correspondence.json")
    correspondence.add_argument(
        "--images", type=positive, default=500, metavar="N", help="at most so many of the data (default: 500)"
    )
    correspondence.add_argument("--workers", type=count, default=4, metavar="N", help="loader processes (default: 4)")


def _attention(options: argparse.Namespace) -> int:
    from esvit_scale.evaluate import attention
    from esvit_scale.report import evaluation_figures

    o = options
    seen = attention.run_attention(o.checkpoint, o.image, o.out, o.size)
    for path in [o.out / "attention.npz", *evaluation_figures.write_attention(seen, o.out)]:
        print(path)
    return 0


def _correspondence(options: argparse.Namespace) -> int:
    from esvit_scale.evaluate import correspondence
    from esvit_scale.report import evaluation_figures

    o = options
    result = correspondence.run_correspondence(o.checkpoint, o.data, o.out, o.images, o.workers)
    print(correspondence.table(result.summary))
    for path in [o.out / "correspondence.json", *evaluation_figures.write_correspondences(result, o.out)]:
        print(path)
    return 0
