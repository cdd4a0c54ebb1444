"""What the command modules share: one-line errors, number types, options of several commands."""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from esvit_scale.errors import UserError, nearest


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line that names the nearest command, and whose options stand anywhere.

    argparse alone refuses `plan CONFIG --gpus 8 key=value`: it reads positional arguments in one piece.
    """

    _intermixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse options first and then all positional arguments, as `parse_known_intermixed_args` does, which calls
        this method back in Python 3.11 and older; a parser of subcommands cannot, and leaves it to theirs."""
        if self._intermixing or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._intermixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixing = False

    def error(self, message: str) -> NoReturn:
        if rank() == "0":
            say(f"{message} (see {self.prog} --help)")
        sys.exit(UserError.exit_code)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = str(action.metavar or action.dest).lower()
            raise argparse.ArgumentError(
                None, f"unknown {what} {value!r}{nearest(str(value), map(str, action.choices))}"
            )


def command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def group(commands: Any, name: str, summary: str) -> Any:
    parser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    return parser.add_subparsers(metavar="COMMAND", required=True)


def add_overrides(parser: argparse.ArgumentParser, summary: str) -> None:
    """Add the positional `key=value …` of a command that reads a config."""
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=summary)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="C",
        help="run dir or step dir, whose teacher is used; exported folder, .safetensors or official .pth",
    )


def add_loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=positive, default=64, metavar="N", help="images at a time (default: 64)")
    parser.add_argument("--workers", type=count, default=4, metavar="N", help="loader processes (default: 4)")


def positive(text: str) -> int:
    return _whole(text, 1)


def count(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number ≥ {least}, got {text!r}")
    return int(text)


def on_all_ranks(evaluate: Callable[[], object]) -> None:
    """Under torchrun or srun the ranks share the images out; a single process needs no process group."""
    if max(int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")) == 1:
        evaluate()
        return
    from esvit_scale.parallel import world as worlds

    worlds.start()
    try:
        with worlds.translate_comm_errors():
            evaluate()
    except BaseException:
        worlds.abandon()
        raise
    worlds.stop()


def rank() -> str:
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"


def say(text: str) -> None:
    for line in text.splitlines():
        with suppress(OSError):  # the console may be a file on a full disk
            print(f"esvit-scale: error: {line}", file=sys.stderr)
