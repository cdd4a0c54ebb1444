"""The `convert` command: converts weights between file formats."""

import argparse
from pathlib import Path
from typing import Any

from esvit_scale.commands.parser import command, count
from esvit_scale.errors import UserError


def add(commands: Any) -> None:
    """Declare `convert`."""
    convert = command(commands, "convert", _convert, "convert weights from one file format into another")
    convert.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="official EsViT .pth file; or a run dir, step dir, exported folder or .safetensors file of esvit-scale",
    )
    convert.add_argument("destination", type=Path, metavar="DST", help="file or folder to write; must not exist")
    convert.add_argument(
        "--from",
        dest="source_format",
        required=True,
        choices=["esvit", "esvit-scale"],
        metavar="FORMAT",
        help="format of SRC: esvit (a checkpoint of the official code) or esvit-scale (weights of this program)",
    )
    convert.add_argument(
        "--to",
        dest="target_format",
        required=True,
        choices=[
            "esvit-scale",
            "safetensors",
            "esvit",
            "timm",
            "huggingface",
            "onnx",
            "mmdet",
            "detectron2",
            "torchvision",
        ],
        metavar="FORMAT",
        help="format of DST. With student, teacher and centres: esvit-scale (a step dir) or esvit (a .pth for the "
        "official code). With one network: safetensors (a file, or a folder with a model card), timm, huggingface or "
        "onnx (folders with a model card), or mmdet, detectron2 or torchvision (a .pth with the names of their Swin)",
    )
    convert.add_argument(
        "--network",
        choices=["teacher", "student"],
        metavar="NETWORK",
        help="network to write in the formats that hold one: teacher (default) or student",
    )
    convert.add_argument(
        "--heads", action="store_true", help="for safetensors: also write the heads and centres of the objective"
    )
    convert.add_argument(
        "--student",
        type=count,
        metavar="N",
        help="number of a further student of a distillation, from 0 (objective.students; default: the student of model)",
    )


def _convert(o: argparse.Namespace) -> int:
    if o.destination.exists():  # asked again below, but only after seconds of imports
        raise UserError(f"{o.destination}: exists already; choose another name or remove it")
    from esvit_scale.checkpoint import convert

    print(convert.convert(o.source, o.destination, o.source_format, o.target_format, o.network, o.heads, o.student))
    return 0
