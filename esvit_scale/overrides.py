"""Overrides from the command line: `key=value` with a dotted key, applied to the parsed YAML of a config file."""

from typing import Any

from esvit_scale import yaml_text
from esvit_scale.errors import UserError
from esvit_scale.schema import Section, declared, optional
from esvit_scale.yaml_text import show


def apply_override(values: dict[str, Any], override: str, schema: type[Section]) -> None:
    """Apply `override` (`key=value` with a dotted key) in place to `values`, the nested dicts of a `schema` config.

    Raises:
        UserError: the override is not `key=value`, or its key passes through a value or beyond a list.
    """
    path, value = parse_override(override, schema)
    set_value(values, path, value, override, schema)


def parse_override(override: str, schema: type[Section], inside: int = 0) -> tuple[list[str], Any]:
    """Return the parts of the dotted key of `override` (`key=value`), and its value.

    Args:
        inside: number of parts to leave out, where the rest is a key of `schema`.

    Raises:
        UserError: the override is not `key=value`, or its value is not YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{show(override)}: overrides are written key=value, for example train.global_batch=64")
    path = key.strip().split(".")[inside:]
    return path, _override_value(path, text, override, schema)


def set_value(values: dict[str, Any], path: list[str], value: Any, override: str, schema: type[Section]) -> None:
    """Set the value at a dotted path in place in `values`, the nested dicts of a `schema` config.

    Args:
        override: what asks for it, for errors.

    Raises:
        UserError: the path passes through a value or beyond a list.
    """
    *parents, leaf = path
    node: Any = values
    for i, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, part, override)]
        else:
            if node.get(part) is None:
                node[part] = _default_at(parents[: i + 1], schema)
            node = node[part]
        if not isinstance(node, dict | list):
            raise UserError(f"{show(override)}: {'.'.join(parents[: i + 1])} is a value, not a section")
    node[_index(node, leaf, override) if isinstance(node, list) else leaf] = value


def _override_value(path: list[str], text: str, override: str, schema: type[Section]) -> Any:
    """Return the value of an override: parsed as YAML, except that unquoted text of a text key is taken literally.

    It is taken literally because paths may hold any character, and a name may look like a number.
    """
    if declared(path, schema) is not str or (text[:1] in ("'", '"') and text[-1:] == text[:1]):
        return yaml_text.value_of(text, show(override))
    return None if optional(path, schema) and text in ("", "null", "~") else text


def _index(node: list[Any], index: str, override: str) -> int:
    """Convert a list index in an override's key to an integer; raise UserError if the list `node` has no such item."""
    if not index.isdecimal() or int(index) >= len(node):
        known = f"use 0 to {len(node) - 1}" if node else "give the whole list"
        raise UserError(f"{show(override)}: {index!r} is not an item of a list of {len(node)}; {known}")
    return int(index)


def _default_at(path: list[str], schema: type[Section]) -> Any:
    """Return the schema's default of a list at a dotted path, as plain data, or an empty dict for a section.

    An override needs it to set an item of a list or a key of a section that the config file leaves out.
    """
    node: Any = schema().model_dump(mode="json")
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    return node if isinstance(node, list) else {}
