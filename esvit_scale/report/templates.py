"""Templates → pages."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **contents: Any) -> str:
    """The page of a template of this folder; what it names and is not given is an error."""
    environment = Environment(
        loader=PackageLoader("esvit_scale.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**contents)
