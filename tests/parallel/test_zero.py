"""The differences between ZeRO stages, and DeepSpeed's undocumented attributes, are in parallel/zero.py alone."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from esvit_scale.objective.schedules import Schedules
from esvit_scale.parallel import world as worlds
from esvit_scale.parallel import zero
from esvit_scale.train.trainer import Trainer
from tests import tiny

ROOT = Path(__file__).parents[2]
ZERO = Path(zero.__file__)
DS_CONFIG = ZERO.with_name("ds_config.py")  # fills DeepSpeed's files, which differ from stage to stage
ZERO_STAGE = re.compile(r"_?(zero_)?stage|zero_optimization_stage")


def stage_branches(code: str) -> list[str]:
    """Return every condition on a ZeRO stage: a comparison with a number, or the stage as a condition itself."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Compare):
            values = [node.left, *node.comparators]
            if any(is_stage(v) for v in values) and any(is_number(v) for v in values):
                found.append(node)
        elif isinstance(node, ast.If | ast.IfExp | ast.While | ast.Match):
            condition = node.subject if isinstance(node, ast.Match) else node.test
            if isinstance(condition, ast.UnaryOp):
                condition = condition.operand
            if is_stage(condition):
                found.append(condition)
    return [f"{node.lineno}: {ast.unparse(node)}" for node in found]


def is_stage(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return is_stage(node.func)
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    if ast.unparse(node).endswith("data.stage"):  # a folder that data are copied to
        return False
    return ZERO_STAGE.fullmatch(name) is not None


def is_number(node: ast.AST) -> bool:
    if isinstance(node, ast.Tuple | ast.Set | ast.List):
        return all(map(is_number, node.elts))
    return isinstance(node, ast.Constant) and type(node.value) is int


def attributes_of_optimizer(tree: ast.AST) -> set[str]:
    """Return the attributes of DeepSpeed's ZeRO optimizer that code in parallel/zero.py uses."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self._zero", "zero")
    }


def attributes_of_parameters(tree: ast.AST) -> set[str]:
    """Return the attributes that ZeRO 3 puts on parameters and that code in parallel/zero.py uses."""
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("ds_")}


def names(code: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of every attribute, name and string constant."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if path != ZERO]


def test_no_branch_on_a_zero_stage_outside_ds_config() -> None:
    # Trunks have stages as well.
    stages_of_trunks = [ROOT / "esvit_scale" / folder for folder in ("models", "evaluate")]
    # What a stage sends is what these two describe.
    of_plan = {ROOT / "esvit_scale" / "scaling" / name for name in ("traffic.py", "roofline.py")}
    found = {
        str(path.relative_to(ROOT)): branches
        for path in [*files("esvit_scale"), ZERO]
        if path != DS_CONFIG
        and path not in of_plan
        and not any(path.is_relative_to(folder) for folder in stages_of_trunks)
        and (branches := stage_branches(path.read_text()))
    }
    assert found == {}


@pytest.mark.parametrize(
    "code",
    [
        "if stage == 3: ...",
        "f(enabled=stage == 3)",
        "x = 1 if self._zero_stage > 0 else 2",
        "if engines.zero_stage in (1, 2): ...",
        "e * part if stage else 0",
        "if not zero_stage: ...",
        "if engine.zero_optimization_stage() > 0: ...",
        "match stage:\n  case 3: ...",
    ],
)
def test_the_search_finds_branches_on_a_stage(code: str) -> None:
    assert stage_branches(code)


def test_deepspeeds_private_attributes_are_used_in_one_file() -> None:
    tree = ast.parse(ZERO.read_text())
    private = attributes_of_optimizer(tree) | attributes_of_parameters(tree) | {"ds_id", "__compatible_ops__"}
    assert {"bit16_groups_flat", "fp32_partitioned_groups_flat", "averaged_gradients", "ds_tensor"} <= private
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files("esvit_scale", "benchmarks")
        for line, name in names(path.read_text())
        if name in private
    ]
    assert found == []


@pytest.mark.parametrize(("ds_config", "layout"), [("zero2", zero.FlatLayout), ("zero3", zero.PartitionedLayout)])
def test_installed_deepspeed_has_the_private_attributes(
    tmp_path: Path, ds_config: str, layout: type[zero.Layout]
) -> None:
    classes = {node.name: node for node in ast.parse(ZERO.read_text()).body if isinstance(node, ast.ClassDef)}
    used = [classes[kind.__name__] for kind in (zero.Layout, layout)]
    config = tiny.config(tmp_path / "run", tmp_path, train__ds_config=ds_config)
    trainer = Trainer(config, worlds.start(), Schedules(config, steps_per_epoch=4))
    try:
        student = trainer.engines.student
        assert isinstance(trainer.engines.layout, layout)
        wanted = {name for tree in used for name in attributes_of_optimizer(tree)}
        assert [name for name in sorted(wanted) if not hasattr(student.optimizer, name)] == []
        wanted = {name for tree in used for name in attributes_of_parameters(tree)}
        assert [n for n in sorted(wanted) for p in student.module.parameters() if not hasattr(p, n)] == []
    finally:
        worlds.stop()


def test_installed_deepspeed_has_its_table_of_operators() -> None:
    assert zero.deepspeed_ops()
