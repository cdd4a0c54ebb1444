"""Rendering the HTML templates of this folder."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **contents: Any) -> str:
    """Render a template of this folder to HTML. A name that the template uses and `contents` lacks raises an error."""
    environment = Environment(
        loader=PackageLoader("esvit_scale.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**contents)
