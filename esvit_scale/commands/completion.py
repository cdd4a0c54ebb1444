"""The `completion` command: prints a script with which bash, zsh or fish completes commands, options, presets and keys."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from esvit_scale.commands.parser import command, print_lines


class Words(NamedTuple):
    """What may follow a command on the command line."""

    path: str  # the command, such as "shards create"; "" for the program itself
    subcommands: list[str]
    options: dict[str, tuple[str, list[str]]]  # "--to" → its help text and the values that it takes, if they are few
    config: bool  # whether presets and `key=` may follow


def add(commands: Any, build_parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Declare `completion`; `build_parser` returns the parser of the whole command line."""
    completion = command(commands, "completion", _completion, "print a script that completes commands in a shell")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="SHELL", help="bash, zsh or fish")
    completion.epilog = (
        f"{completion.epilog}\n  esvit-scale completion zsh > ~/.esvit-scale.zsh    and in ~/.zshrc: source ~/.esvit-scale.zsh\n"
        "  esvit-scale completion fish > ~/.config/fish/completions/esvit-scale.fish"
    )
    completion.set_defaults(build_parser=build_parser)


def _completion(options: argparse.Namespace) -> int:
    from esvit_scale import key_table, presets
    from esvit_scale.config import Config

    commands = list(words_of(options.build_parser()))
    keys = [key.name for key in key_table.keys(Config) if key.name != "format_version"]
    scripts = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    print_lines(scripts[options.shell](commands, presets.names(), keys))
    return 0


def words_of(parser: argparse.ArgumentParser, path: str = "") -> Iterator[Words]:
    """Yield the words that may follow a command, and those of the commands below it."""
    options: dict[str, tuple[str, list[str]]] = {}
    below: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            below = dict(action.choices)
            continue
        for name in action.option_strings:
            if name.startswith("--"):
                options[name] = (action.help or "", [str(choice) for choice in action.choices or ()])
    takes_keys = any(action.dest == "overrides" for action in parser._actions)
    yield Words(path, list(below), options, takes_keys)
    for name, child in below.items():
        yield from words_of(child, f"{path} {name}".strip())


def _bash(commands: list[Words], presets: list[str], keys: list[str]) -> Iterator[str]:
    yield "# Completion of esvit-scale for bash; made by `esvit-scale completion bash`."
    yield "_esvit_scale() {"
    yield '  local word at="" found="" current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}"'
    yield '  for word in "${COMP_WORDS[@]:1:$((COMP_CWORD-1))}"; do'
    yield f'    case "${{at:+$at }}$word" in {"|".join(_quoted(c.path) for c in commands if c.path)}) at="${{at:+$at }}$word" ;; esac'
    yield "  done"
    yield '  case "$at $previous" in'
    for c in commands:
        for option, (_, choices) in c.options.items():
            if choices:
                yield f'    {_quoted(f"{c.path} {option}")}) found="{" ".join(choices)}" ;;'
    yield "  esac"
    yield '  [[ -n $found ]] || case "$at" in'
    for c in commands:
        more = " $_esvit_scale_presets $_esvit_scale_keys" if c.config else ""
        yield f'    {_quoted(c.path)}) found="{" ".join([*c.subcommands, *c.options])}{more}" ;;'
    yield "  esac"
    yield '  COMPREPLY=($(compgen -W "$found" -- "$current"))'
    yield "  [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2> /dev/null"
    yield "}"
    yield f'_esvit_scale_presets="{" ".join(presets)}"'
    yield f'_esvit_scale_keys="{" ".join(f"{key}=" for key in keys)}"'
    yield "complete -o default -F _esvit_scale esvit-scale"


def _zsh(commands: list[Words], presets: list[str], keys: list[str]) -> Iterator[str]:
    yield "# Completion of esvit-scale for zsh; made by `esvit-scale completion zsh`. Source it in ~/.zshrc."
    yield "autoload -Uz compinit bashcompinit && compinit -u && bashcompinit"
    yield from list(_bash(commands, presets, keys))[1:]


def _fish(commands: list[Words], presets: list[str], keys: list[str]) -> Iterator[str]:
    yield "# Completion of esvit-scale for fish; made by `esvit-scale completion fish`."
    yield "function __esvit_scale_at"
    yield "    set -l path"
    yield "    for word in (commandline -opc)[2..]"
    yield f'        contains -- "$path $word" {" ".join(_quoted(f" {c.path}") for c in commands if c.path)}'
    yield '        and set path "$path $word"'
    yield "    end"
    yield '    test "$path" = "$argv[1]"'
    yield "end"
    for c in commands:
        at = f"complete -c esvit-scale -n \"__esvit_scale_at '{f' {c.path}' if c.path else ''}'\""
        if c.subcommands:
            yield f"{at} -f -a {_quoted(' '.join(c.subcommands))}"
        for option, (text, choices) in c.options.items():
            values = f" -x -a {_quoted(' '.join(choices))}" if choices else ""
            yield f"{at} -l {option.removeprefix('--')} -d {_quoted(text)}{values}"
        if c.config:
            yield f"{at} -a {_quoted(' '.join([*presets, *(f'{key}=' for key in keys)]))}"


def _quoted(text: str) -> str:
    """Return a text as one word of any of the shells."""
    return "'" + text.replace("\\", " ").replace("'", "’") + "'"
