"""The keys of a config schema as rows: name, default, unit, allowed values and meaning, read from the schema's own code.

The meaning of a key is the text below it in its class; Python drops such texts, so they are read from the source file.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic.fields import FieldInfo

from esvit_scale.schema import Section, item_section
from esvit_scale.yaml_text import show

_LARGEST = {2**31 - 1, 2**63 - 1}  # bounds of the number types, which nobody meets


class Key(NamedTuple):
    """One key of a config."""

    name: str  # dotted; the first item of a list of sections has the index 0
    default: Any
    unit: str  # "" where the value is no number
    allowed: str
    meaning: str


def keys(schema: type[Section], prefix: str = "") -> Iterator[Key]:
    """Yield every key of a schema that holds a value: a section's own keys, then those of the sections in it, in the order
    of the source; a list of sections has the keys of its item 0.
    """
    texts, inner = _texts(schema), {}
    for name, field in schema.model_fields.items():
        section, is_list = item_section(field.annotation), get_origin(field.annotation) is list
        if section:
            inner[f"{prefix}{name}.0." if is_list else f"{prefix}{name}."] = section
        if not section or is_list:
            unit, meaning = _split(texts.get(name, ""))
            yield Key(prefix + name, _plain(field), unit, _allowed(field.annotation, field.metadata), meaning)
    for path, section in inner.items():
        yield from keys(section, path)


def section_meaning(schema: type[Section], path: str) -> str:
    """Return the description of the section at a dotted path, or of the schema itself for ""."""
    node: Any = schema
    for part in path.split(".") if path else ():
        if not part.isdecimal():
            node = item_section(node.model_fields[part].annotation)
    return inspect.getdoc(node) or ""


def value_text(value: Any) -> str:
    """Return a value as it is written in YAML, in one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {value_text(item)}" for key, item in value.items()) + "}"
    return "''" if value == "" else show(value).strip("'") if isinstance(value, str) else f"{value}"


@cache
def _texts(schema: type[Section]) -> dict[str, str]:
    """Return the text below each key of a class and of the sections that it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if not issubclass(base, Section) or base is Section:
            continue
        [node] = ast.parse(inspect.cleandoc("\n" + inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for key, text in zip(node.body, node.body[1:], strict=False):
            if isinstance(key, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(key.target)] = " ".join(str(text.value.value).split())
    return found


def _split(text: str) -> tuple[str, str]:
    found = re.match(r"\[(.+?)\] (.*)", text)
    return (found[1], found[2]) if found else ("", text)


def _plain(field: FieldInfo) -> Any:
    """Return a key's default as plain data; "(needed)" where it has none."""
    if field.is_required():
        return "(needed)"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, list):
        return [item.model_dump(exclude_defaults=True) if isinstance(item, Section) else item for item in value]
    return list(value) if isinstance(value, tuple) else value


def _allowed(annotation: Any, metadata: list[Any]) -> str:
    """Return in words which values a type takes."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner: list[Any] = []
        for item in arguments[1:]:
            inner += item.metadata if isinstance(item, FieldInfo) else [item]
        return _allowed(arguments[0], inner + metadata)
    if type(None) in arguments:
        [other] = [argument for argument in arguments if argument is not type(None)]
        return f"{_allowed(other, metadata)}, or null"
    if origin is Literal:
        return _or([value_text(value) for value in arguments])
    if origin is tuple:
        return f"list of two, each a {_allowed(arguments[0], [])}"
    if origin is list:
        return "list of sections" if item_section(annotation) else f"list, each a {_allowed(arguments[0], [])}"
    if origin is dict:
        return "mapping"
    if annotation is bool:
        return "true or false"
    if annotation in (int, float):
        return _range("whole number" if annotation is int else "number", metadata)
    pattern = [item.pattern for item in metadata if getattr(item, "pattern", None)]
    return "letters, digits, '.', '_' and '-'" if pattern else "text"


def _range(noun: str, metadata: list[Any]) -> str:
    bounds = {
        name: value
        for item in metadata
        for name in ("ge", "gt", "le", "lt")
        if (value := getattr(item, name, None)) is not None
    }
    bounds = {name: f"{value:g}" for name, value in bounds.items() if value not in _LARGEST}
    if {"ge", "le"} <= bounds.keys():
        return f"{noun} {bounds['ge']} to {bounds['le']}"
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return " ".join([noun, " and ".join(f"{signs[name]} {value}" for name, value in bounds.items())]).rstrip()


def _or(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
