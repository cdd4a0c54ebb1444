"""The design's rules as tests: who may import whom and what, nothing that unpickles, nothing tied to one machine."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "esvit_scale"

# Imports point down only: a station may import what stands before it, and its own modules. data and models do not
# know each other.
ORDER = [
    {"errors", "__init__"},
    {"division", "files", "machine", "progress", "ranges", "resources", "store_urls"},
    {"yaml_text"},
    {"schema"},
    {"overrides", "key_table", "presets", "run_keys"},
    {"run_stages"},
    {"config"},
    {"data", "models"},
    {"objective"},
    {"parallel"},
    {"checkpoint"},
    {"evaluate"},
    {"train"},
    {"report"},
    {"scaling"},
    {"doctor_packages"},
    {"doctor_machine"},
    {"doctor_gpu"},
    {"demo", "doctor", "feed", "launch"},
    {"slurm_status"},
    {"run_status"},
    {"preflight"},
    {"commands"},
    {"api", "shards"},
    {"cli"},
    {"__main__"},
]
LEVEL = {station: level for level, stations in enumerate(ORDER) for station in stations}
LEAVES = {"esvit_scale.parallel.collectives"}  # anyone may import these, and they import errors alone

ONLY_IN = {
    "deepspeed": {"parallel", "checkpoint"},
    "torch.distributed": {"parallel", "checkpoint"},
    "fairscale": {"parallel"},
    "webdataset": {"data"},
    "skimage": {"data"},
    "sklearn": {"data"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "timm": {"models", "checkpoint"},
    "onnx": {"checkpoint"},
    "onnxscript": {"checkpoint"},
    "transformers": {"checkpoint"},
    "huggingface_hub": {"checkpoint"},
    "triton": {"models", "objective"},
}
FROM_IMPORT = re.compile(r"^[ \t]*(from [\w.]+ import (?:\([^)]*\)|[^(\n]+))", re.MULTILINE)
UNPICKLE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


class Source(NamedTuple):
    path: Path
    station: str  # first part below esvit_scale: a folder or a module
    module: str  # dotted name
    tree: ast.Module


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def sources(package: Path = PACKAGE) -> list[Source]:
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found.append(Source(path, parts[0], ".".join(("esvit_scale", *parts)), parsed(path)))
    return found


@cache
def imported(tree: ast.Module) -> tuple[tuple[int, str], ...]:
    """Line and dotted name of everything imported, anywhere in the file, in functions and under TYPE_CHECKING too."""
    return tuple(_imported(tree))


def _imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed."):
            yield node.lineno, ast.unparse(node)


def upward_imports(files: list[Source]) -> list[str]:
    problems = []
    for source in files:
        own = LEVEL["files"] if source.module in LEAVES else LEVEL[source.station]
        for line, name in imported(source.tree):
            if not name.startswith("esvit_scale.") or any(
                name == leaf or name.startswith(leaf + ".") for leaf in LEAVES
            ):
                continue
            station = name.split(".")[1]
            if station not in LEVEL:  # a name of esvit_scale/__init__.py
                continue
            if station != source.station and LEVEL[station] >= own:
                problems.append(f"{source.path}:{line}: {source.station} imports {name}")
    return problems


def foreign_imports(files: list[Source]) -> list[str]:
    return [
        f"{source.path}:{line}: {name} is for {', '.join(sorted(stations))} alone"
        for source in files
        for line, name in imported(source.tree)
        for package, stations in ONLY_IN.items()
        if (name + ".").startswith(package + ".") and source.station not in stations
    ]


def unsafe_loads(files: list[Source]) -> list[str]:
    problems = []
    for source in files:
        safe_loaders = {
            node.name
            for node in ast.walk(source.tree)
            if isinstance(node, ast.ClassDef) and any("SafeLoader" in ast.unparse(base) for base in node.bases)
        }
        guarded = uses_pickle_behind_an_allow_list(source.tree)
        for line, name in imported(source.tree):
            if name.split(".")[0] in UNPICKLE and not (name == "pickle" and guarded):
                problems.append(f"{source.path}:{line}: {name} unpickles")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and (why := _unsafe(node, safe_loaders)):
                problems.append(f"{source.path}:{node.lineno}: {why}")
    return problems


def uses_pickle_behind_an_allow_list(tree: ast.Module) -> bool:
    """Whether pickle serves only as the base of unpicklers that choose their classes themselves, and for its error."""
    bases = [
        base
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "find_class" in {getattr(item, "name", "") for item in node.body}
        for base in node.bases
    ]
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"]
    return all(
        node.attr == "UnpicklingError" or (node.attr == "Unpickler" and node in bases) for node in used
    ) and bool(bases)


def _unsafe(call: ast.Call, safe_loaders: set[str]) -> str | None:
    name = ast.unparse(call.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name == "torch.load" and keywords.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
        return "numpy.load that unpickles"
    if name in ("yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all"):
        return name
    if name in ("yaml.load", "yaml.load_all"):
        loader = keywords.get("Loader") or (ast.unparse(call.args[1]) if len(call.args) > 1 else "")
        if loader not in safe_loaders | {"yaml.SafeLoader", "yaml.CSafeLoader"}:
            return f"yaml.load with {loader or 'no'} loader"
    if name in ("eval", "exec"):
        return name
    if keywords.get("shell") == "True":
        return "a command through the shell"
    return None


def module_spellings(files: Iterable[Path], modules: set[str]) -> dict[str, set[str]]:
    """Return the names under which the files import each of `modules`: its own name or an alias."""
    found = defaultdict(set)
    for file in files:
        # Parsing hundreds of whole files takes seconds. So programs in a test's texts are read, too.
        for statement in FROM_IMPORT.findall(file.read_text()):
            node = ast.parse(statement).body[0]
            assert isinstance(node, ast.ImportFrom)
            for alias in node.names:
                if f"{node.module}.{alias.name}" in modules:
                    found[f"{node.module}.{alias.name}"].add(alias.asname or alias.name)
    return dict(found)


def test_a_module_has_one_spelling():
    files = [
        file for folder in ("esvit_scale", "tests", "benchmarks", "studies") for file in (ROOT / folder).rglob("*.py")
    ]
    spellings = module_spellings(files, {source.module for source in sources()})
    assert spellings["esvit_scale.config"] == {"configs"}
    assert {module: names for module, names in spellings.items() if len(names) > 1} == {}


def test_imports_point_down():
    assert upward_imports(sources()) == []


def test_every_module_belongs_to_a_station():
    assert {source.station for source in sources()} <= set(LEVEL)


def test_restricted_packages_are_imported_only_where_allowed():
    assert foreign_imports(sources()) == []


def test_nothing_unpickles_or_evaluates():
    assert unsafe_loads(sources()) == []


BROKEN = {
    "data/a.py": ("from esvit_scale.models import swin", upward_imports),
    "models/a.py": ("def f():\n    import esvit_scale.train.pretraining", upward_imports),
    "config.py": ("from esvit_scale import data", upward_imports),
    "parallel/collectives.py": ("from esvit_scale.config import Config", upward_imports),
    "train/a.py": ("import deepspeed.ops", foreign_imports),
    "evaluate/a.py": ("import torch\ntorch.distributed.barrier()", foreign_imports),
    "train/b.py": ("from torch import distributed", foreign_imports),
    "models/b.py": ("import webdataset as wds", foreign_imports),
    "train/c.py": ("from matplotlib import pyplot", foreign_imports),
    "data/b.py": ("import pickle", unsafe_loads),
    "data/bb.py": ("import pickle\nclass U(pickle.Unpickler): pass", unsafe_loads),
    "data/bc.py": (
        "import pickle\nclass U(pickle.Unpickler):\n  def find_class(self, m, n): ...\npickle.loads(x)",
        unsafe_loads,
    ),
    "data/bd.py": ("from pickle import loads", unsafe_loads),
    "data/c.py": ("torch.load(p)", unsafe_loads),
    "data/d.py": ("torch.load(p, weights_only=False)", unsafe_loads),
    "data/e.py": ("np.load(p, allow_pickle=True)", unsafe_loads),
    "data/f.py": ("yaml.load(t, yaml.Loader)", unsafe_loads),
    "data/g.py": ("yaml.load(t)", unsafe_loads),
    "data/h.py": ("yaml.unsafe_load(t)", unsafe_loads),
    "data/i.py": ("subprocess.run(x, shell=True)", unsafe_loads),
}


@pytest.mark.parametrize("name", BROKEN)
def test_rules_detect_violations(name, tmp_path):
    code, rule = BROKEN[name]
    file = tmp_path / "esvit_scale" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code)
    assert rule(sources(tmp_path / "esvit_scale"))


@pytest.mark.parametrize(
    "name", ["config", "errors", "resources", "cli", "commands.evaluate", "doctor", "train.signals"]
)
def test_light_modules_import_no_torch(name):
    code = f"import esvit_scale.{name}, sys; assert not {{'torch', 'numpy', 'deepspeed'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


# --- the tree ------------------------------------------------------------------------------------------------------


def shipped_text() -> Iterator[Path]:
    folders = ["esvit_scale", "ds_configs", "data_shards", "slurm", "tests", "benchmarks", "studies", "docs", ".ci"]
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    return (path for path in files if path.suffix in ("", ".py", ".md", ".toml", ".yaml", ".json", ".sh", ".sbatch"))


def test_no_machine_specific_paths():
    machine_path = re.compile(r"(?<![\w.:/-])/(?:work|root|opt|Users)/")
    found = []
    for path in shipped_text():
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if machine_path.search(line):
                found.append(f"{path}:{number}: {line.strip()}")
    assert found == []


def test_package_docstring_names_existing_files():
    named = re.findall(r"\b[\w/]+\.py\b", ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text())))
    assert len(named) > 10
    assert [name for name in named if not (PACKAGE / name).is_file()] == []


def test_pyproject_lists_every_package():
    tomllib = pytest.importorskip("tomllib")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in PACKAGE.rglob("*.py")} | {PACKAGE / "configs", PACKAGE / "zoo"}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(listed["packages"]) == packages | set(listed["package-dir"])
    assert all((ROOT / folder).is_dir() for folder in listed["package-dir"].values())


def test_required_top_level_entries_exist():
    for name in ("esvit_scale", "ds_configs", "data_shards", "slurm", "tests", "pyproject.toml"):
        assert (ROOT / name).exists(), name
