"""`esvit-scale …`: reads the command line, calls the station, turns errors into one line and an exit code.

Stations are imported inside the commands: `--help` and a mistyped command must not wait for torch.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import esvit_scale
from esvit_scale.errors import Diverged, RestartCanHelp, UserError, nearest

EXIT_CODES = """\
exit codes: 0 finished, or saved and asking for a requeue; 130 ctrl-C (pretrain saves first); 2 a mistake in the input;
            3 diverged; 75 the machine failed and the same command again can go on; doctor: 1 something required is broken"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code (argparse itself exits with 0 after --help and 2 after a mistake)."""
    # Before torch is imported: threads that spin while they wait make a CPU shared with loader processes or other jobs
    # up to 16 times slower (measured on 2 cores with one of them busy).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parsed = _parser().parse_args(arguments)
    try:
        code: int = parsed.run(parsed)
    except (UserError, Diverged) as error:
        if _rank() == "0":  # every rank comes to the same verdict
            _say(str(error))
        return error.exit_code
    except RestartCanHelp as error:
        _say(f"rank {_rank()}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return code


# --- commands ------------------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    from esvit_scale.train import signals

    signals.install()
    from esvit_scale import demo

    return demo.run(options.out)


def _shards_create(options: argparse.Namespace) -> int:
    from esvit_scale.data import shard_writer

    manifest = shard_writer.create(options.source, options.destination, options.samples_per_shard, options.seed)
    classes = f", {len(manifest.classes)} classes" if manifest.classes else ""
    print(f"{options.destination}: {manifest.samples} samples in {len(manifest.shards)} shards{classes}")
    return 0


def _shards_verify(options: argparse.Namespace) -> int:
    from esvit_scale.data import shard_writer

    problems = shard_writer.verify(options.root)
    if problems:
        raise UserError("\n".join(problems))
    print(f"{options.root}: every shard is as its manifest says")
    return 0


def _pretrain(options: argparse.Namespace) -> int:
    from esvit_scale.train import signals

    signals.install()  # first: importing the rest takes seconds, and a signal in them must not be lost
    from esvit_scale import config as configs

    config = configs.resolve(options.config, options.overrides)
    configs.require_training_data(config)
    from esvit_scale.train import loop

    return loop.pretrain(config)


def _evaluate_knn(options: argparse.Namespace) -> int:
    from esvit_scale.evaluate import knn

    o = options
    _on_all_ranks(lambda: knn.run_knn(o.checkpoint, o.train, o.test, o.out, batch=o.batch, workers=o.workers))
    return 0


def _embed(options: argparse.Namespace) -> int:
    from esvit_scale.evaluate import features

    o = options
    _on_all_ranks(lambda: features.run_embed(o.checkpoint, o.data, o.out, batch=o.batch, workers=o.workers))
    return 0


def _on_all_ranks(evaluate: Callable[[], object]) -> None:
    """Under torchrun or srun the ranks share the images out; a single process needs no process group."""
    if max(int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")) == 1:
        evaluate()
        return
    from esvit_scale.parallel import world

    world.start()
    try:
        evaluate()
    except BaseException:
        world.abandon()
        raise
    world.stop()


def _convert(options: argparse.Namespace) -> int:
    from esvit_scale.checkpoint import convert

    o = options
    print(convert.convert(o.source, o.destination, o.source_form, o.form, o.network, o.heads))
    return 0


def _report(options: argparse.Namespace) -> int:
    from esvit_scale.report import html

    for run in options.runs:
        print(html.write_report(run))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from esvit_scale import doctor

    return doctor.run()


# --- the command line ----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and name the nearest command."""

    def error(self, message: str) -> NoReturn:
        if _rank() == "0":
            _say(f"{message} (see {self.prog} --help)")
        sys.exit(UserError.exit_code)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = str(action.metavar or action.dest).lower()
            raise argparse.ArgumentError(
                None, f"unknown {what} {value!r}{nearest(str(value), map(str, action.choices))}"
            )


def _parser() -> argparse.ArgumentParser:
    root = _Parser(
        prog="esvit-scale",
        description="Self-supervised pretraining of multi-stage vision transformers (EsViT).",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    root.add_argument("--version", action="version", version=f"esvit-scale {esvit_scale.__version__}")
    commands = root.add_subparsers(metavar="COMMAND", required=True)

    demo = _command(commands, "demo", _demo, "bundled photographs → shards → a tiny pretraining → k-NN → report")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="run dir (default: runs/demo)")

    shards = _group(commands, "shards", "write and check shards of images")
    create = _command(
        shards, "create", _shards_create, "an image folder (class subfolders, or flat) → tar shards and a manifest"
    )
    create.add_argument("source", type=Path, metavar="SRC", help="folder of images")
    create.add_argument("destination", type=Path, metavar="DST", help="folder to make")
    create.add_argument(
        "--samples-per-shard", type=_positive, default=1000, metavar="N", help="images in a tar (default: 1000)"
    )
    create.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the order in which images are put into shards (default: 0)"
    )
    verify = _command(shards, "verify", _shards_verify, "check sizes, sha256, counts and that every image decodes")
    verify.add_argument("root", type=Path, metavar="DST", help="folder of shards")

    pretrain = _command(
        commands, "pretrain", _pretrain, "pretrain, or go on with, a run: one process, torchrun or srun"
    )
    pretrain.add_argument("config", metavar="CONFIG", help="a preset's name or a YAML file")
    pretrain.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example train.global_batch=64 data.train=/data/shards"
    )

    evaluate = _group(commands, "evaluate", "evaluate frozen features")
    knn = _command(evaluate, "knn", _evaluate_knn, "k-nearest-neighbour accuracy")
    _checkpoint(knn)
    knn.add_argument("--train", type=Path, required=True, metavar="T", help="labelled shards or class folders to vote")
    knn.add_argument(
        "--test", type=Path, required=True, metavar="V", help="labelled shards or class folders to classify"
    )
    knn.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for knn.json")
    _loading(knn)

    embed = _command(commands, "embed", _embed, "features of images, as arrays")
    _checkpoint(embed)
    embed.add_argument("--data", type=Path, required=True, metavar="D", help="shards, or a folder of images")
    embed.add_argument(
        "--out", type=Path, required=True, metavar="F.npz", help="file of arrays: features, keys, labels"
    )
    _loading(embed)

    convert = _command(commands, "convert", _convert, "weights from one form into another")
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
        choices=["esvit-scale", "safetensors", "esvit"],
        metavar="FORM",
        help="esvit-scale: a step dir; safetensors: one network in one file; esvit: for the official code",
    )
    convert.add_argument(
        "--network",
        choices=["teacher", "student"],
        metavar="NETWORK",
        help="for safetensors: teacher (default) or student",
    )
    convert.add_argument("--heads", action="store_true", help="for safetensors: keep the heads and centres too")

    report = _command(commands, "report", _report, "one self-contained HTML file a run")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run dir")

    _command(commands, "doctor", _doctor, "what works on this machine")
    return root


def _command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def _group(commands: Any, name: str, summary: str) -> Any:
    parser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    return parser.add_subparsers(metavar="COMMAND", required=True)


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="C",
        help="run dir or step dir, whose teacher is used, or .safetensors",
    )


def _loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=_positive, default=64, metavar="N", help="images at a time (default: 64)")
    parser.add_argument("--workers", type=_count, default=4, metavar="N", help="loader processes (default: 4)")


def _positive(text: str) -> int:
    return _whole(text, 1)


def _count(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number ≥ {least}, got {text!r}")
    return int(text)


def _rank() -> str:
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"


def _say(text: str) -> None:
    for line in text.splitlines():
        print(f"esvit-scale: error: {line}", file=sys.stderr)
