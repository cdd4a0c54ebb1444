"""Reading and writing of YAML (configs, sweep files): safe loader, YAML 1.2 scalars, and one-line errors."""

import re
from pathlib import Path
from typing import Any

import yaml

from esvit_scale.errors import UserError

_FLOAT = re.compile(r"^[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\d+[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that reads scalars as YAML 1.2 does and refuses repeated keys.

    YAML 1.1, PyYAML's default, reads 1e-3 as text, 010 as 8, 1:30 as 90, `no` as false and 2024-01-01 as a date.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (the base class's attribute, emptied)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node; raise ConstructorError for a repeated key, of which SafeLoader takes the last."""
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
    """A YAML dumper that also quotes text which YAML 1.2 would read as numbers (runs named 12e4 and 08)."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read(path: Path) -> dict[str, Any]:
    """Read a YAML file.

    Raises:
        UserError: it cannot be read, is not YAML, or does not hold `key: value` lines.
    """
    return parse(text_of(path), str(path))


def dump(values: dict[str, Any]) -> str:
    """Return YAML that `parse` reads back to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=120)


def text_of(path: Path) -> str:
    """Read a text file (UTF-8).

    Raises:
        UserError: it cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file (UTF-8)") from None


def parse(text: str, where: str) -> dict[str, Any]:
    """Return the `key: value` lines of a text as a dict; `where` names the text in errors.

    Raises:
        UserError: the text is not YAML or holds something else.
    """
    values = value_of(text, where)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: must hold `key: value` lines, got {show(values)}")
    return values


def value_of(text: str, where: str) -> Any:
    """Return the value of a YAML text; `where` names the text in errors.

    Raises:
        UserError: the text is not YAML.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark and "\n" in text else ""
        raise UserError(f"{where}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from None


def show(value: Any) -> str:
    """Return a value as the user wrote it, at most 60 characters long."""
    text = {"None": "nothing", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 60 else text[:57] + "..."
