"""Weights from one form into another."""

import argparse
from pathlib import Path
from typing import Any

from esvit_scale.commands.parser import command


def add(commands: Any) -> None:
    convert = command(commands, "convert", _convert, "weights from one form into another")
    convert.add_argument("source", type=Path, metavar="SRC", help="official .pth; or run dir, step dir, .safetensors")
    convert.add_argument("destination", type=Path, metavar="DST", help="file or folder to make")
    convert.add_argument(
        "--from",
        dest="source_form",
        required=True,
        choices=["esvit", "esvit-scale"],
        metavar="FORM",
        help="esvit: the official code's checkpoint; esvit-scale: ours",
    )
    convert.add_argument(
        "--to",
        dest="form",
        required=True,
        choices=["esvit-scale", "safetensors", "esvit", "timm", "huggingface", "onnx"],
        metavar="FORM",
        help="esvit-scale: a step dir; esvit: for the official code; of one network: safetensors (a file, or a folder "
        "with a model card), timm, huggingface, onnx (folders with one)",
    )
    convert.add_argument(
        "--network",
        choices=["teacher", "student"],
        metavar="NETWORK",
        help="for the forms of one network: teacher (default) or student",
    )
    convert.add_argument("--heads", action="store_true", help="for safetensors: keep the heads and centres too")


def _convert(options: argparse.Namespace) -> int:
    from esvit_scale.checkpoint import convert

    o = options
    print(convert.convert(o.source, o.destination, o.source_form, o.form, o.network, o.heads))
    return 0
