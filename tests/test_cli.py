"""The command line from outside: exit codes, one-line errors, and that nothing heavy is imported to say them."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from esvit_scale import __version__, cli, doctor
from esvit_scale.errors import Diverged, RestartCanHelp, UserError


def run(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "esvit_scale", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), **env},
        timeout=120,
        check=False,
    )


def test_help_lists_commands_and_exit_codes():
    shown = run("--help")
    assert shown.returncode == 0
    for word in ("demo", "shards", "pretrain", "evaluate", "embed", "convert", "report", "doctor", "75", "130"):
        assert word in shown.stdout
    assert run("--version").stdout == f"esvit-scale {__version__}\n"


def run_without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, which must not import torch or numpy."""
    code = (
        "import sys; from esvit_scale.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'deepspeed'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "pretrain --help",
        "pretran",
        "pretrain nowhere",
        "status",
        "presets",
        "config swin_t",
        "config --markdown",
    ],
)
def test_quick_answers_import_no_torch(line):
    run_without_torch(*line.split())


# Positional arguments and options of one line, in every order.
ORDERS = {
    "plan": (["swin_t", "a=1", "b=2"], ["--gpus 8", "--gpu-memory=80G", "--json"]),
    "doctor": (["swin_t", "a=1", "b=2"], ["--data D"]),
    "slurm run-dir": (["swin_t", "a=1", "b=2"], ["--cell=3"]),
    "slurm submit pretrain": (["swin_t", "a=1", "b=2"], ["--nodes 3", "--sbatch=--account=x", "--dry-run"]),
    "shards create": (["source", "destination"], ["--seed 3", "--no-shuffle"]),
    "report": (["run", "other"], ["--out x"]),
}


@pytest.mark.parametrize("command", ORDERS)
def test_options_are_accepted_at_any_position(command):
    positional, options = ORDERS[command]
    read = lambda words: vars(cli.build_parser().parse_args(" ".join([command, *words]).split()))  # noqa: E731
    expected = read([*options, *positional])
    for places in itertools.product(range(len(positional) + 1), repeat=len(options)):
        words = list(positional)
        for place, option in sorted(zip(places, options, strict=True), reverse=True):
            words.insert(place, option)
        assert read(words) == expected, words
    if "overrides" in expected:
        assert (expected["config"], expected["overrides"]) == ("swin_t", ["a=1", "b=2"])


MISTAKES = {
    "plan swin_t --gpus 8": "the following arguments are required: --gpu-memory (see esvit-scale plan --help)",
    "plan --gpus 8 --gpu-memory 80G": "the following arguments are required: CONFIG (see esvit-scale plan --help)",
    "plan swin_t --gpus 8 a.b=1 --gpu-memory 80G": "unknown key a",
    "pretran x": "unknown command 'pretran'; did you mean 'pretrain'? (see esvit-scale --help)",
    "evaluate kn": "unknown command 'kn'; did you mean 'knn'? (see esvit-scale evaluate --help)",
    "shards creat a b": "unknown command 'creat'; did you mean 'create'?",
    "": "the following arguments are required: COMMAND",
    "evaluate knn --train a --test b --out c": "the following arguments are required: --checkpoint",
    "demo --ot x": "unrecognized arguments: --ot x; did you mean '--out'? (see esvit-scale demo --help)",
    "shards create a b --val-fractoin 0.1": "did you mean '--val-fraction'? (see esvit-scale shards create --help)",
    "shards create a b --samples-per-shard 0": "--samples-per-shard: expected a whole number ≥ 1, got '0'",
    "embed --checkpoint a --data b --out c --workers -1": "--workers: expected",
    "embed --checkpoint a --data b --out f.npy": "--out f.npy: must end in .npz; the file holds several arrays",
    "pretrain swint": "swint: neither a file nor a preset; did you mean 'swin_t'?",
    "pretrain no/such.yaml": "no/such.yaml: no such config file",
    "pretrain swin_t train.epoch=3": "unknown key train.epoch; did you mean 'train.epochs'?",
    "pretrain swin_t train.epochs": "overrides are written key=value",
    "pretrain swin_t": "data.train: not set; give a folder of shards, for example data.train=/data/my-shards",
    "shards verify no/such/folder": "no/such/folder",
    "shards create no/such/folder out": "no/such/folder",
    "report no/such/run": "no/such/run",
    "convert no.pth out --from esvit --to esvit-scale": "no.pth: no such file; give the .pth of the official trainer",
    "convert no/such/run out.pth --from esvit-scale --to esvit": "no/such/run: no such checkpoint",
    "convert a b --from esvi --to esvit": "unknown format 'esvi'; did you mean 'esvit'?",
    "pretrain swin_t data.train=no/such/folder": "no/such/folder",
    "evaluate knn --checkpoint no/such/run --train no/such/run --test no/such/run --out c": "no/such/run",
    "embed --checkpoint no/such/run --data no/such/run --out b.npz": "no/such/run",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_user_error_prints_one_line_and_exits_with_2(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(line.split())
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert_one_error(line, *capsys.readouterr())
    assert not list(tmp_path.iterdir()), "a mistake leaves nothing behind"


def test_convert_says_at_once_that_the_destination_exists(tmp_path):
    (tmp_path / "there").mkdir()
    ended = run_without_torch("convert", "run", str(tmp_path / "there"), "--from", "esvit-scale", "--to", "timm")
    assert ended.stderr.endswith("there: exists already; choose another name or remove it\n")


# One that answers before torch is imported and one after DeepSpeed: no library adds a line of its own.
@pytest.mark.parametrize("line", ["pretrain swin_t train.epoch=3", "pretrain swin_t data.train=no/such/folder"])
def test_user_error_of_a_process_is_one_line(line, tmp_path):
    ended = run(*line.split(), cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert_one_error(line, ended.stdout, ended.stderr)


def assert_one_error(line, output, errors):
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("esvit-scale: error: ")
    assert MISTAKES[line] in lines[0]
    assert not output


def test_only_rank_0_prints_the_error():
    assert "swint" in run("pretrain", "swint", RANK="0", SLURM_PROCID="3").stderr
    for env in ({"RANK": "1"}, {"SLURM_PROCID": "1"}):
        ended = run("pretrain", "swint", **env)
        assert (ended.returncode, ended.stderr) == (2, "")
        assert run("pretran", **env).stderr == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("a\nb"), 2), (Diverged("a\nb"), 3), (RestartCanHelp("a\nb"), 75), (KeyboardInterrupt(), 130)],
)
def test_error_types_map_to_exit_codes(error, code, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    assert cli.main(["doctor"]) == code
    lines = capsys.readouterr().err.splitlines()
    if code == 130:
        assert lines == [
            "",
            "esvit-scale: ended by ctrl-C; files that were complete are kept, half-written ones are not",
        ]
    else:
        assert [line[:20] for line in lines] == ["esvit-scale: error: "] * 2


@pytest.mark.parametrize(("line", "code"), [("config --json", 141), ("pretrain nowhere", 2)])
def test_a_reader_that_is_gone_ends_a_command_quietly(line, code):
    """`| head` closes the pipe when it has read enough: then a write fails, and the answer is no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "esvit_scale", *line.split()]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writing)
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr
    assert "BrokenPipe" not in ended.stderr


@pytest.mark.parametrize("error", [ZeroDivisionError, BrokenPipeError])  # this pipe is not the one of the output
def test_unexpected_error_keeps_its_traceback(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    with pytest.raises(error):
        cli.main(["doctor"])


def test_exit_code_of_a_command_is_returned(monkeypatch):
    monkeypatch.setattr(doctor, "run", lambda: 7)
    assert cli.main(["doctor"]) == 7


def test_overrides_reach_the_config(monkeypatch):
    from esvit_scale.train import header, pretraining, signals

    monkeypatch.setattr(header, "show", lambda *_: None)  # it would miss the data
    seen: list[Any] = []
    monkeypatch.setattr(signals, "install", lambda: seen.append("signals"))
    monkeypatch.setattr(pretraining, "pretrain", lambda config: seen.append(config) or 0)
    assert cli.main(["pretrain", "swin_s", "data.train=x", "seed=-0", "optim.lr=1e-3"]) == 0
    assert seen[0] == "signals"
    assert (seen[1].name, seen[1].data.train, seen[1].optim.lr) == ("swin_s", "x", 1e-3)
