"""Nobody asks which trunk or objective it is: only its own file and the registry know its name."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from esvit_scale.models.registry import LIBRARIES, TRUNKS
from esvit_scale.objective.registry import OBJECTIVES

PACKAGE = Path(__file__).parents[1] / "esvit_scale"
REGISTRIES = {"models/registry.py", "objective/registry.py"}
# The official code has a closed list of trunks, which its checkpoints are told apart by.
OFFICIAL_FORMAT = "checkpoint/official"
ALLOWED = {
    # `objective.regions` has another default with EsViT, and run_keys.py must not import an objective to ask for it.
    "run_keys.py": 1,
    # What a modality attends to lies on what its tokenizer makes of the signal: patches, stretches, tubes, bytes.
    "evaluate/modal_attention.py": 2,
    "report/modal_figure.py": 2,
}
ASKED = re.compile(r"\b(model|size)\.trunk\b|\bobjective\.name\b")


@cache
def own_modules() -> set[str]:
    """The modules that define a registered trunk or objective, with those of the same name and an ending."""
    builders = [*TRUNKS.values(), *OBJECTIVES.values()]
    stems = {builder.__module__ for builder in builders} | set(LIBRARIES.values())
    family = tuple(re.sub(r"_(variants|trunk)$", "", stem) for stem in stems)
    modules = [".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts) for p in PACKAGE.rglob("*.py")]
    return {m for m in modules if any(m == stem or m.startswith(f"{stem}_") for stem in family)}


def name_branches(path: str, tree: ast.Module) -> Iterator[str]:
    """Lines of a file that depend on which trunk or objective it is."""
    module = "esvit_scale." + path.removesuffix(".py").replace("/", ".")
    own = own_modules()
    if module in own or path in REGISTRIES or path.startswith(OFFICIAL_FORMAT):
        return
    names = {*TRUNKS, *OBJECTIVES, *(f"{library}:" for library in LIBRARIES)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imported = {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
            if imported & own:
                yield f"{path}:{node.lineno}: imports {', '.join(sorted(imported & own))}"
        elif isinstance(node, ast.Compare) and not isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            sides = [node.left, *node.comparators]
            constants = {c.value for side in sides for c in ast.walk(side) if isinstance(c, ast.Constant)}
            other = " ".join(ast.unparse(side) for side in sides)
            if ASKED.search(other) or (constants & names and "form" not in other):
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if ASKED.search(ast.unparse(node.func.value)) and node.func.attr in (
                "startswith",
                "endswith",
                "removeprefix",
            ):
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Subscript) and ASKED.search(ast.unparse(node.slice)):
            yield f"{path}:{node.lineno}: {ast.unparse(node)}"


def found_in(package: Path) -> list[str]:
    files = [(str(path.relative_to(package)), path) for path in sorted(package.rglob("*.py"))]
    return [line for name, path in files for line in name_branches(name, ast.parse(path.read_text()))]


def test_no_branch_on_a_trunks_or_an_objectives_name() -> None:
    found = found_in(PACKAGE)
    allowed = [line for line in found if line.partition(":")[0] in ALLOWED]
    assert [line for line in found if line not in allowed] == []
    assert len(allowed) <= sum(ALLOWED.values()), allowed


@pytest.mark.parametrize(
    "code",
    [
        "from esvit_scale.models.swin import Swin",
        "from esvit_scale.models import swin_variants",
        "from esvit_scale.objective.esvit import EsViT",
        "x = config.model.trunk in SHAPES",
        "if config.objective.name == 'mine': pass",
        "x = name in ('esvit', 'dino')",
        "x = config.model.trunk.startswith('timm:')",
        "x = TABLE[config.model.trunk]",
    ],
)
def test_a_branch_is_found(code: str) -> None:
    assert list(name_branches("scaling/a.py", ast.parse(code)))
