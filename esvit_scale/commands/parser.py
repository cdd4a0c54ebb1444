"""Code that the command modules share: the parser with one-line errors, number types, and common options."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from esvit_scale.commands import option_types
from esvit_scale.commands.examples import EXAMPLES
from esvit_scale.errors import UserError, nearest


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line with the nearest valid word, and whose options may stand anywhere.

    argparse alone refuses `plan CONFIG --gpus 8 key=value`, because it reads all positional arguments at one place.
    """

    _intermixing = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("type", Path, option_types.local_path)  # what `type=Path` means in every command

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the options first, then all positional arguments, with `parse_known_intermixed_args`.

        In Python 3.11 and older that method calls this one back. A parser with subcommands cannot mix the two; the
        parsers of its subcommands do.
        """
        if self._intermixing or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._intermixing = True
        try:
            found, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixing = False
        if unknown:  # said here, by the command that knows its options, and not by the parser above
            options = [option for option in unknown if option.startswith("--")]
            hint = nearest(options[0].partition("=")[0], self._option_string_actions) if options else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Print `message` in one line, on rank 0 only, and exit with the code of a user's error."""
        if rank() == "0":
            print_error(f"{message} (see {self.prog} --help)")
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
    """Add a command that calls `run` with the parsed options; return its parser. `summary` is its help text, and its
    example comes from examples.py.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    path = parser.prog.partition(" ")[2]
    parser.epilog = f"example:\n  {parser.prog} {EXAMPLES[path]}"
    parser.set_defaults(run=run)
    return parser


def group(commands: Any, name: str, summary: str) -> Any:
    """Add a command that only holds subcommands; return the object that `command` adds them to."""
    parser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    return parser.add_subparsers(metavar="COMMAND", required=True)


def add_overrides(parser: argparse.ArgumentParser, summary: str) -> None:
    """Add the positional arguments `key=value …` of a command that reads a config."""
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=summary)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the required option `--checkpoint`."""
    parser.add_argument(
        "--checkpoint",
        type=_checkpoint,
        required=True,
        metavar="C",
        help="weights to evaluate: a run dir or step dir (its teacher), an exported folder, a .safetensors file, an official .pth "
        "or zoo:NAME (a backbone that ships with the package); or a baseline: untrained:CONFIG (the trunk of a preset, YAML file or run dir as it is before training), or pixels",
    )


def _checkpoint(text: str) -> Path:
    """Convert the value of --checkpoint to a path; `./pixels` is the file of that name, and `pixels` the baseline."""
    path = Path(text)
    return path if str(path) == text else path.absolute() if text.startswith("./") else path


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the options `--batch` and `--workers`."""
    parser.add_argument("--batch", type=positive, default=64, metavar="N", help="images in a batch (default: 64)")
    add_workers(parser)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add the option `--workers`."""
    parser.add_argument("--workers", type=count, default=4, metavar="N", help="processes that load images (default: 4)")


def positive(text: str) -> int:
    """Convert an option's value to an integer of at least 1."""
    return _whole(text, 1)


def count(text: str) -> int:
    """Convert an option's value to an integer of at least 0."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number ≥ {least}, got {text!r}")
    return int(text)


def on_all_ranks(evaluate: Callable[[], object]) -> None:
    """Call `evaluate`; under torchrun or srun, first start a process group, so that all ranks share the work."""
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
    """Return this process's rank as torchrun or srun gives it; "0" without a launcher."""
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"


def print_lines(lines: Iterable[str]) -> None:
    """Print lines, each ended by a line break."""
    print("\n".join(lines))


def print_error(text: str) -> None:
    """Print every line of `text` to stderr, marked as an error of this program."""
    for line in text.splitlines():
        with suppress(OSError):  # the console may be a file on a full disk
            print(f"esvit-scale: error: {line}", file=sys.stderr)
