"""`esvit-scale …`: parses the command line, runs the command, and turns errors into one line and an exit code."""

import argparse
import os
import select
import sys
from contextlib import suppress

import esvit_scale
from esvit_scale.commands import (
    completion,
    convert,
    doctor,
    evaluate,
    keys,
    plan,
    pretrain,
    report,
    shards,
    slurm,
    sparsify,
    status,
    sweep,
)
from esvit_scale.commands.option_types import SetUrl
from esvit_scale.commands.parser import Parser, print_error, rank
from esvit_scale.errors import Diverged, RestartCanHelp, UserError, translate_file_errors

EXIT_CODES = """\
exit codes: 0 finished, or saved and asking for a requeue; 130 ctrl-C (pretrain saves first); 2 a mistake in the input;
            3 diverged, or ended by train.guard; 75 the machine failed and the same command again can go on; doctor: 1
            something required is broken"""


READER_IS_GONE = 128 + 13  # what a shell reports of a program that SIGPIPE ended


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code (argparse itself exits with 0 after --help and 2 after a mistake)."""
    try:
        return _run(arguments)
    except BrokenPipeError:
        if not _reader_is_gone():  # another pipe, such as one to a worker process
            raise
        return READER_IS_GONE
    finally:
        _let_go_of_full_consoles()


def _reader_is_gone() -> bool:
    """Return whether stdout or stderr is a pipe whose reader has ended, as in `esvit-scale plan … | head -1`."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a stream without a descriptor, or a closed one
            poll.register(stream.fileno(), 0)  # errors are reported without being asked for
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _let_go_of_full_consoles() -> None:
    """Flush stdout and stderr; redirect a stream that fails to os.devnull.

    Otherwise Python would replace the exit code by 120 when output goes to a file on a full disk.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(arguments: list[str] | None) -> int:
    # Before torch is imported: threads that spin while they wait make a CPU shared with loader processes or other jobs
    # up to 16 times slower (measured on 2 cores with one of them busy).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parsed = build_parser().parse_args(arguments)
    try:
        with translate_file_errors():
            _open_remote_sets(parsed)
            code: int = parsed.run(parsed)
    except (UserError, Diverged) as error:
        if rank() == "0":  # all ranks raise the same error, so one message is enough
            print_error(str(error))
        return error.exit_code
    except RestartCanHelp as error:
        print_error(f"rank {rank()}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        if rank() == "0":
            kept = parsed.kept() if "kept" in parsed else "files that were complete are kept, half-written ones are not"
            with suppress(OSError):
                print(f"\nesvit-scale: ended by ctrl-C; {kept}", file=sys.stderr)
        return 130
    return code


def _open_remote_sets(parsed: argparse.Namespace) -> None:
    """Replace URLs of shard sets among the options by the sets' folders in the cache, which are read like others."""
    for name, value in vars(parsed).items():
        if isinstance(value, SetUrl):
            from esvit_scale.data.remote import place

            setattr(parsed, name, place.local_folder(value))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line, with every command declared."""
    root = Parser(
        prog="esvit-scale",
        description="Self-supervised pretraining of multi-stage vision transformers (EsViT).",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    root.add_argument("--version", action="version", version=f"esvit-scale {esvit_scale.__version__}")
    commands = root.add_subparsers(metavar="COMMAND", required=True)
    for station in (pretrain, sparsify, keys, status, shards, evaluate, convert, plan, sweep, slurm, report, doctor):
        station.add(commands)
    completion.add(commands, build_parser)
    return root
