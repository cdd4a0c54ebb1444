"""The help texts: every option says what it is and what holds without it, and every command shows an example."""

import argparse
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from esvit_scale import cli, presets
from esvit_scale import config as configs
from esvit_scale.commands import completion
from esvit_scale.commands.examples import EXAMPLES


def commands(parser: argparse.ArgumentParser, path: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that runs something, with its parser."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield path, parser
    for action in below:
        assert all(choice.help for choice in action._choices_actions)
        for name, child in action.choices.items():
            yield from commands(child, f"{path} {name}".strip())


COMMANDS = dict(commands(cli.build_parser()))


@pytest.mark.parametrize("path", COMMANDS)
def test_every_option_has_a_help_text_with_its_default(path: str) -> None:
    parser = COMMANDS[path]
    groups = {id(a): group.title or "" for group in parser._action_groups for a in group._group_actions}
    for action in parser._actions:
        where = f"{path} {action.option_strings or action.dest}"
        text = action.help or ""
        assert len(text.split()) > 1 or action.dest in ("help", "image", "path", "runs", "sweep"), where
        takes_value = action.option_strings and action.nargs != 0
        if takes_value and not action.required:
            assert "default" in text or "repeatable" in text or "default" in groups[id(action)], where
        if isinstance(action.default, int | float) and not isinstance(action.default, bool) and takes_value:
            shown = {f"default: {action.default}", f"default: {action.default:g}", "keep all", "one set"}
            assert any(word in text for word in shown), where


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_shows_an_example_that_parses(path: str) -> None:
    example = EXAMPLES[path]
    assert f"example:\n  esvit-scale {path} {example}\n" in COMMANDS[path].format_help()
    words = [*path.split(), *shlex.split(example.partition(" >")[0])]
    parsed = cli.build_parser().parse_args(words)
    if getattr(parsed, "overrides", None):
        configs.resolve(parsed.config, parsed.overrides)


def test_examples_are_of_commands() -> None:
    assert set(EXAMPLES) == set(COMMANDS)


def test_help_of_pretrain_names_presets_and_the_place_of_keys() -> None:
    shown = COMMANDS["pretrain"].format_help()
    assert set(presets.names()) <= set(shown.replace(",", " ").split())
    assert "`esvit-scale config swin_t` lists every key" in shown


# --- completion --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "esvit-scale.bash"
    words = list(completion.words_of(cli.build_parser()))
    path.write_text("\n".join(completion._bash(words, presets.names(), ["train.epochs", "train.steps"])))
    return path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {"pretrain", "shards", "config", "presets", "status", "doctor", "--version"}),
        ("pre", {"pretrain", "presets"}),
        ("shards ", {"create", "merge", "split", "verify"}),
        ("shards create --samp", {"--samples-per-shard"}),
        ("slurm submit pretrain swin_t --no", {"--nodes"}),
        ("pretrain swin_t", {"swin_t", "swin_t_view", "swin_t_w14"}),
        ("pretrain swin_t train.", {"train.epochs=", "train.steps="}),
        ("convert a b --to ", {"safetensors", "timm", "huggingface"}),
        ("convert a b --to ti", {"timm"}),
    ],
)
def test_bash_completes(bash_script: Path, line: str, expected: set[str]) -> None:
    words = ["esvit-scale", *line.split(" ")]
    script = (
        f"source {bash_script}; COMP_WORDS=({' '.join(shlex.quote(word) for word in words)}); "
        f'COMP_CWORD={len(words) - 1}; _esvit_scale; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=30)
    found = set(done.stdout.split())
    assert expected <= found, done.stderr
    assert all(word.startswith(words[-1]) for word in found)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_of_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for path in COMMANDS:
        assert f"{path}'" in script, path
    for word in ("samples-per-shard", "swinv2_1b", "data.local_crops.0.augment.blur="):
        assert word in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=30)
