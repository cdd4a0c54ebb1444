"""Strict schemas for YAML files, with errors worded for the person who wrote the file."""

import re
import types
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from esvit_scale.errors import UserError
from esvit_scale.yaml_text import show


class Section(BaseModel):
    """Base class of config sections; unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


AnySection = TypeVar("AnySection", bound=Section)


def check(
    schema: type[AnySection], values: dict[str, Any], where: str, overrides: list[str] | None = None
) -> AnySection:
    """Convert plain values (nested dicts) to an instance of `schema`.

    Args:
        where: the source of the values, for errors.
        overrides: `key=value` overrides that are already applied, named in errors as the source of their keys.

    Raises:
        UserError: the values do not fit the schema; one line per problem, as `config.resolve` describes.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = [_explain(e, _origin(e["loc"], where, overrides or []), schema) for e in error.errors()]
        raise UserError("\n".join(lines)) from None


# --- the schema, asked ---------------------------------------------------------------------------------------------


def annotation(path: list[str], schema: Any) -> Any:
    """Return the declared type at a dotted path (list items by their number); None where the schema has no such key."""
    node: Any = schema
    for part in path:
        node = _bare(node)
        if _is_section(node):
            node = node.model_fields[part].annotation if part in node.model_fields else None
        else:
            node = get_args(node)[0] if get_origin(node) in (list, tuple) and part.isdecimal() else None
    return node


def _is_section(node: Any) -> bool:
    """Return whether `node` is a Section class; Python 3.10 calls `list[int]` an instance of type too."""
    return get_origin(node) is None and isinstance(node, type) and issubclass(node, Section)


def _bare(annotation: Any) -> Any:
    """Return a declared type stripped of Annotated and of `| None`."""
    while get_origin(annotation) in (Annotated, Union, types.UnionType):
        annotation = next(arg for arg in get_args(annotation) if arg is not type(None))
    return annotation


def declared(path: list[str], schema: Any) -> Any:
    """Return the declared type at a dotted path, without Annotated and `| None`."""
    return _bare(annotation(path, schema))


def optional(path: list[str], schema: Any) -> bool:
    """Return whether the value at a dotted path may be null."""
    return type(None) in get_args(annotation(path, schema))


def item_section(kind: Any) -> Any:
    """Return the Section class that a declared type is, or is a list of; None for other types."""
    kind = _bare(kind)
    item = _bare(get_args(kind)[0]) if get_origin(kind) is list else kind
    return item if _is_section(item) else None


def _keys(section: Any, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of the schema, of sections and leaves; keys in a list of sections have the index 0."""
    for name in section.model_fields:
        yield prefix + name
        kind = _bare(section.model_fields[name].annotation)
        if item := item_section(kind):
            yield from _keys(item, f"{prefix}{name}." if item is kind else f"{prefix}{name}.0.")


# --- errors --------------------------------------------------------------------------------------------------------

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing_size": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a mapping (`key: value` lines)",
    "list_type": "a list, written [1, 2]",
    "tuple_type": "a list of two numbers",
    "missing": "a list of two numbers",
    "too_long": "a list of two numbers",
    "too_short": "at least one number",
    "model_type": "a section (`key: value` lines)",
}


def _origin(loc: tuple[int | str, ...], where: str, overrides: list[str]) -> str:
    """Return the source of the wrong value at `loc`: the last override that set this key, else `where` (the file)."""
    key = _dotted(loc) + "."
    for override in reversed(overrides):
        overridden = override.partition("=")[0].strip() + "."
        if key.startswith(overridden) or overridden.startswith(key):
            return show(override)
    return where


def _explain(error: Any, where: str, schema: Any) -> str:
    """Return the message of one pydantic error, normally one line: source, key, what is wrong and a valid value."""
    kind, loc, value = error["type"], _dotted(error["loc"]), error["input"]
    if kind == "value_error":
        return "\n".join(f"{where}: {line}" for line in str(error["ctx"]["error"]).splitlines())
    if kind == "extra_forbidden":
        return f"{where}: {_unknown_key([str(part) for part in error['loc']], value, schema)}"
    if kind == "string_pattern_mismatch":
        return f"{where}: {loc}: letters, digits, '.', '_' and '-', beginning with a letter or digit; got {show(value)}"
    if kind == "literal_error":
        known = re.findall(r"'(.*?)'", error["ctx"]["expected"])
        close = get_close_matches(str(value), known, n=1)
        near = f"; did you mean {close[0]!r}?" if close else ""
        return f"{where}: {loc}: expected {error['ctx']['expected']}, got {show(value)}{near}"
    for bound, sign in [("ge", "≥"), ("le", "≤"), ("gt", ">"), ("lt", "<")]:
        if bound in error.get("ctx", {}):
            near = f"; nearest: {error['ctx'][bound]}" if bound in ("ge", "le") else ""
            return f"{where}: {loc}: must be {sign} {error['ctx'][bound]}, got {show(value)}{near}"
    if kind == "missing":
        loc = loc.rpartition(".")[0]
    if kind in _EXPECTED:
        return f"{where}: {loc}: expected {_EXPECTED[kind]}, got {show(value)}{_as_written(kind, value)}"
    return f"{where}: {loc}: {error['msg'][0].lower()}{error['msg'][1:]}, got {show(value)}"


def _as_written(kind: str, value: Any) -> str:
    """Return a hint to append to an error message on how to write the value correctly; empty if there is none."""
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind == "string_type" and not isinstance(value, list | dict):
        return "; put it in quotes"
    if kind == "float_type" and str(value).lower().lstrip("+-.") in ("inf", "nan"):
        return "; it must be finite"
    return ""


def _dotted(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc)


def _unknown_key(path: list[str], value: Any, schema: Any) -> str:
    """Return the message about an unknown key, with the most similar known one, else a list of its siblings.

    `path` has the names of the sections around it, and its own, which may hold anything, dots too. Where a misspelt
    section holds a single key, as from an override, the message is about that key.
    """
    loc, (name, colon, rest) = _dotted(tuple(path)), path[-1].partition(":")
    if colon and value is None and name in _siblings(path, schema):
        return f"unknown key {loc}; put a space behind the colon: {name}: {rest}"
    similar = _similar_key(path, schema)
    if not similar:
        return f"unknown key {loc}; known: {', '.join(_siblings(path, schema))}"
    if isinstance(value, Mapping) and len(value) == 1 and _is_section(declared(similar.split("."), schema)):
        (name,) = value
        if key := _similar_key([*similar.split("."), str(name)], schema):
            return f"unknown key {loc}.{name}; did you mean {key!r}?"
    return f"unknown key {loc}; did you mean {similar!r}?"


def _siblings(path: list[str], schema: Any) -> list[str]:
    """Return the keys of the section that the key at `path` is in."""
    section = declared(path[:-1], schema) if path[:-1] else schema
    return list(section.model_fields)


def _similar_key(path: list[str], schema: Any) -> str | None:
    """Return the sibling of an unknown key that has a similar name, else the similar key of another section, if any."""
    *parent, leaf = path
    elsewhere: dict[str, str] = {}
    for key in _keys(schema):
        elsewhere.setdefault(key.rpartition(".")[2], key)
    if close := get_close_matches(leaf.lower(), _siblings(path, schema), n=1):
        return ".".join([*parent, close[0]])
    if close := get_close_matches(leaf.lower(), elsewhere, n=1, cutoff=0.8):
        return elsewhere[close[0]]
    return None
