"""Text → plain values and back, in the YAML of configs and sweep files: safe, 1.2's scalars, one clear line for an error."""

import re
from pathlib import Path
from typing import Any

import yaml

from esvit_scale.errors import UserError

_FLOAT = re.compile(r"^[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\d+[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2, and a repeated key is an error.

    YAML 1.1, PyYAML's own, reads 1e-3 as text, 010 as 8, 1:30 as 90, `no` as false and 2024-01-01 as a date.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (the base class's attribute, emptied)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be one word", key_node.start_mark)
            if key_node.value in seen:
                problem = f"key {key_node.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML would not read back as text (runs named 12e4 and 08)."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read(path: Path) -> dict[str, Any]:
    """Raises UserError: cannot be read, not YAML, not `key: value` lines."""
    return parse(text_of(path), str(path))


def dump(values: dict[str, Any]) -> str:
    """Text that `parse` reads back to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=120)


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file (UTF-8)") from None


def parse(text: str, where: str) -> dict[str, Any]:
    values = value_of(text, where)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: must hold `key: value` lines, got {show(values)}")
    return values


def value_of(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark and "\n" in text else ""
        raise UserError(f"{where}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from None


def show(value: Any) -> str:
    """A value as the user wrote it, short."""
    text = {"None": "nothing", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 60 else text[:57] + "..."
