"""The commands `presets` and `config`, which list the presets and the keys of a config; neither imports torch."""

import argparse
import shutil
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from esvit_scale.commands.parser import add_overrides, command, print_lines
from esvit_scale.errors import UserError, nearest

if TYPE_CHECKING:
    from esvit_scale.key_table import Key


class Row(NamedTuple):
    """One key of a config with its value."""

    key: "Key"
    value: Any
    source: str  # "default", a preset, a file or "command line"


def add(commands: Any) -> None:
    """Declare `presets` and `config`."""
    presets = command(
        commands,
        "presets",
        _presets,
        "list the presets: size, cost, the data that each suits and its published result",
    )
    presets.add_argument("preset", nargs="?", metavar="PRESET", help="show this preset's file (default: list them all)")

    config = command(
        commands, "config", _config, "list every key with its value, where the value comes from, unit and meaning"
    )
    config.add_argument(
        "config", nargs="?", metavar="PRESET", help="name of a preset, or a YAML file (default: the defaults)"
    )
    add_overrides(config, "config values to change, for example train.global_batch=64")
    config.add_argument(
        "--find",
        metavar="TEXT",
        help="list only keys whose name or meaning holds TEXT, also with --json (default: all)",
    )
    form = config.add_mutually_exclusive_group()
    form.add_argument(
        "--yaml", action="store_true", help="print the values as YAML, to start a config file of your own"
    )
    form.add_argument("--json", action="store_true", help="print JSON, one object for each key")
    form.add_argument("--markdown", action="store_true", help="print the page docs/config.md")


# --- presets ---------------------------------------------------------------------------------------------------------


def _presets(options: argparse.Namespace) -> int:
    from esvit_scale import presets

    if options.preset:
        if options.preset not in presets.names():
            raise UserError(f"{options.preset}: no such preset{nearest(options.preset, presets.names())}")
        print_lines(presets.text(options.preset).splitlines())
        return 0
    width, lines = _width(), [f"{'preset':<18}{'parameters':>12}{'GFLOPs':>9}{'linear':>8}{'k-NN':>8}  suits"]
    for preset in map(presets.read, presets.names()):
        size = "" if preset.parameters is None else _millions(preset.parameters)
        cost = "" if preset.gflops is None else f"{preset.gflops:,.0f}"
        linear, knn = (presets.published(preset, measure) for measure in ("linear", "k-NN"))
        row = f"{preset.name:<18}{size:>12}{cost:>9}{linear:>8}{knn:>8}  "
        lines.append(textwrap.fill(preset.suits, width, initial_indent=row, subsequent_indent=" " * len(row)))
    print_lines([*lines, "", *_PRESETS_END])
    return 0


def _millions(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


# --- config ----------------------------------------------------------------------------------------------------------


def _config(options: argparse.Namespace) -> int:
    import json

    from esvit_scale import config as configs

    if options.config and "=" in options.config:  # `config train.epochs=3`: overrides of the defaults
        options.overrides.insert(0, options.config)
        options.config = None
    if options.find and (options.yaml or options.markdown):
        raise UserError("--find: chooses lines of the list; leave out --yaml and --markdown, or --find")
    if options.markdown and (options.config or options.overrides):
        raise UserError("--markdown: prints the page of all keys with their defaults; leave out PRESET and key=value")
    if options.markdown:
        print_lines(markdown().splitlines())
        return 0
    rows = list(rows_of(options.config, options.overrides))
    if options.find:
        rows = [row for row in rows if options.find.lower() in f"{row.key.name} {row.key.meaning}".lower()]
        if not rows:
            raise UserError(f"--find {options.find}: no key's name or meaning holds this text")
    if options.yaml:
        print_lines(configs.dump(configs.resolve(options.config or "", options.overrides)).splitlines())
    elif options.json:
        listed = [{**row.key._asdict(), "value": row.value, "source": row.source} for row in rows]
        print_lines(json.dumps(listed, indent=2, ensure_ascii=False).splitlines())
    else:
        print_lines(_lines(rows))
    return 0


def rows_of(config: str | None, overrides: list[str]) -> Iterator[Row]:
    """Yield every key of a config with its value; keys of a list of sections once for every item.

    Args:
        config: name of a preset or path of a file; None: the defaults, where an empty list shows its keys too.

    Raises:
        UserError: as `config.resolve`.
    """
    from esvit_scale import config as configs
    from esvit_scale import key_table

    values = configs.resolve(config or "", overrides).model_dump(mode="json")
    sources = configs.sources(config or "", overrides)
    for key in key_table.keys(configs.Config):
        before, zero, after = key.name.partition(".0.")
        if not zero:
            value = _at(values, key.name)
            if isinstance(value, list) and any(isinstance(item, dict) for item in value) and key.name != "stages":
                continue  # its items follow, key by key
            yield Row(key, value, sources.get(key.name, "default"))
            continue
        items = _at(values, before)
        if not items and config is None:
            yield Row(key, key.default, "default")
        for number in range(len(items)):
            name = f"{before}.{number}.{after}"
            yield Row(key._replace(name=name), _at(values, name), sources.get(name, "default"))


def _at(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values[int(part)] if part.isdecimal() else values[part]
    return values


def _lines(rows: list[Row]) -> Iterator[str]:
    from esvit_scale import key_table

    width, section = _width(), None
    for row in rows:
        parent = row.key.name.rpartition(".")[0]
        if parent != section:
            section = parent
            yield f"\n{section}: {_section_meaning(section)}" if section else _section_meaning(section)
        value = key_table.value_text(row.value)
        note = f" (default {key_table.value_text(row.key.default)})" if row.value != row.key.default else ""
        yield f"  {f'{row.key.name} = {value}':<60}  {row.source}{note}"
        told = ", ".join(filter(None, (row.key.unit, row.key.allowed)))
        yield textwrap.fill(f"{row.key.meaning} [{told}]", width, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _section_meaning(section: str) -> str:
    from esvit_scale import config as configs
    from esvit_scale import key_table

    if not section:
        return "The run: its name, folder and seed."
    return key_table.section_meaning(configs.Config, section).splitlines()[0]


def markdown() -> str:
    """Return the page docs/config.md, which lists every key."""
    from esvit_scale import config as configs
    from esvit_scale import key_table
    from esvit_scale.run_keys import LENGTH_KEYS, MAY_DIFFER

    may = dict.fromkeys(MAY_DIFFER, " May differ between starts.")
    may |= dict.fromkeys(LENGTH_KEYS, " May be raised between starts.")
    lines, section = [_INTRODUCTION], None
    for key in key_table.keys(configs.Config):
        parent, _, _ = key.name.rpartition(".")
        if parent != section:
            section = parent
            lines += [f"\n## {section or 'The run'}\n\n{_section_meaning(section)}\n", *_TABLE_HEAD]
        default = f"`{key_table.value_text(key.default)}`"
        cells = (f"`{key.name}`", default, key.unit, key.allowed, key.meaning + may.get(key.name, ""))
        lines.append(f"| {' | '.join(cell.replace('<', '&lt;') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _width() -> int:
    return max(80, min(shutil.get_terminal_size((120, 24)).columns, 140))


_PRESETS_END = (
    "Parameters: of the trunk. GFLOPs: of one image and step. linear, k-NN: top-1 on ImageNet-1K in %, as published.",
    "`suits` is advice, not measured. More about one: esvit-scale presets swin_t. All its keys: esvit-scale config swin_t.",
)

_TABLE_HEAD = ("| key | default | unit | values | meaning |", "|---|---|---|---|---|")

_INTRODUCTION = """\
# Every key of a config

A config is a YAML file with the sections below, or a preset. Keys are written with dots on the command line: `esvit-scale pretrain swin_t train.epochs=100 data.local_crops.0.count=6`. What neither the file nor the command line sets has the default, EsViT's recipe.

```bash
esvit-scale presets                                # the presets: size, cost, what they suit
esvit-scale config swin_t train.epochs=100         # every key with its value and where that comes from
esvit-scale config --find crop                     # only keys whose name or meaning holds a word
esvit-scale config swin_t --yaml > mine.yaml       # the start of a config file of your own
```

A run dir belongs to one config. Repeating a start with another value is an error that names the difference, except for keys that say "May differ between starts", because they do not change what a step computes. The length of the run may grow ([how](runs.md#making-a-run-longer)): its keys say "May be raised between starts". `data.train` and `data.mix` may name another place of the same data.

This page is made from the code: `esvit-scale config --markdown > docs/config.md`."""
