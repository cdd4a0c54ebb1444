"""The tested stacks: every direct dependency is pinned in each, and pyproject.toml promises no more than they hold."""

import importlib.util
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from esvit_scale import doctor_packages

ROOT = Path(__file__).parents[1]
STACKS = sorted(path.stem for path in (ROOT / "constraints").glob("*.txt"))
spec = importlib.util.spec_from_file_location("install", ROOT / "constraints" / "install.py")
install = importlib.util.module_from_spec(spec)
spec.loader.exec_module(install)


def requirements():
    """Name → versions allowed, of every dependency in pyproject.toml, the extras' too (without a TOML reader: 3.10)."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.findall(r'"([A-Za-z][\w-]*)((?:[<>=!]=?[\d.]+,?)+)"', text.split("[project.scripts]")[0])
    return {name: SpecifierSet(versions) for name, versions in found if name != "setuptools"}


def test_pyproject_dependencies_are_parsed():
    assert {"torch", "deepspeed", "pyarrow", "onnxscript", "playwright", "types-PyYAML"} <= set(requirements())
    assert len(requirements()) == 43


@pytest.mark.parametrize("stack", STACKS)
def test_a_stack_pins_every_direct_dependency_within_its_range(stack):
    pins = install.pins(stack)
    assert set(pins) == set(requirements())
    assert [f"{name} {pins[name]}" for name, allowed in requirements().items() if pins[name] not in allowed] == []


def test_lower_bounds_equal_the_oldest_stack():
    lowest = {name: next(s.version for s in allowed if s.operator == ">=") for name, allowed in requirements().items()
              if any(s.operator == ">=" for s in allowed)}  # fmt: skip
    assert lowest == {name: version for name, version in install.pins("oldest").items() if name in lowest}
    assert set(requirements()) == set(lowest)


def test_doctor_versions_equal_the_stacks():
    """The wheel has no constraints/, so doctor carries the range of every dependency that users install."""
    oldest, newest = install.pins("oldest"), install.pins("newest")
    assert {name: (oldest[name], newest[name]) for name in users_packages()} == doctor_packages.TESTED


def test_doctor_extras_equal_pyproject():
    packages = {name: set(extra.packages) for name, extra in doctor_packages.EXTRAS.items()}
    assert packages == {name: found for name, found in extras().items() if name != "dev"}
    assert all(
        set(extra.only_tests) < set(extra.packages) for extra in doctor_packages.EXTRAS.values() if extra.only_tests
    )


def extras():
    """Extra → the packages it lists, from pyproject.toml."""
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    rows = re.findall(r"^(\w+) = \[(.*?)\]", section, re.M)
    return {name: set(re.findall(r'"([A-Za-z][\w-]*)', listed)) for name, listed in rows}


def users_packages():
    """Every direct dependency but the tools of developers."""
    optional = extras()
    return set(requirements()) - (
        optional["dev"] - set().union(*(optional[name] for name in optional if name != "dev"))
    )


def test_newest_stack_is_tried_first():
    assert sorted(install.NEWEST_FIRST) == STACKS
    torch = [Version(install.pins(stack)["torch"]) for stack in install.NEWEST_FIRST]
    assert torch == sorted(torch, reverse=True)


@pytest.mark.parametrize(
    ("python", "fitting"),
    [
        ((3, 9), []),
        ((3, 10), ["oldest"]),
        ((3, 11), ["newest", "oldest"]),
        ((3, 13), ["newest"]),
        ((3, 14), []),
    ],
)
def test_python_version_selects_the_stack(python, fitting):
    assert [stack for stack in STACKS if install.fits_python(stack, python)] == fitting


SAID = {
    "a site's bound": (
        "ERROR: Cannot install torch==2.15.0 because these package versions have conflicting dependencies.\n"
        "The conflict is caused by:\n    The user requested torch==2.15.0\n"
        "    The user requested (constraint) torch<=2.14.1\nERROR: ResolutionImpossible: for help visit …",
        True,
    ),
    "a mirror that is behind": (
        "ERROR: Could not find a version that satisfies the requirement torch==2.15.0 (from versions: 2.13.0, 2.14.1)\n"
        "ERROR: No matching distribution found for torch==2.15.0",
        True,
    ),
    "no network": (
        "WARNING: Retrying (Retry(total=0, …)) after connection broken by 'NewConnectionError'\n"
        "ERROR: Could not find a version that satisfies the requirement torch==2.15.0 (from versions: none)\n"
        "ERROR: No matching distribution found for torch==2.15.0",
        False,
    ),
    "a full disk": ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", False),
}


@pytest.mark.parametrize("case", SAID)
def test_only_unavailable_versions_lead_to_another_stack(case):
    said, other = SAID[case]
    assert install.unavailable(said) is other


def test_this_environment_matches_the_recorded_stack():
    """`make test` says which stack it runs; the versions are then really those."""
    note = Path(sys.prefix, ".stack")
    if not note.is_file() or (named := re.search(r"constraints/([\w.-]+)\.txt$", note.read_text().strip())) is None:
        pytest.skip("not installed by constraints/install.py as a whole stack")
    wanted = {name: pin for name, pin in install.pins(named[1]).items() if name != "wandb"}  # make does not install it
    assert {name: metadata.version(name).split("+")[0] for name in wanted} == wanted


def test_python_without_a_stack_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(install, "fits_python", lambda stack: False)
    with pytest.raises(SystemExit, match=r"No tested stack .* is for Python 3\.\d+: .*make PYTHON=python3\.13"):
        install.main("newest", "dev")


def test_offline_installation_has_versions_of_a_tested_stack(tmp_path):
    """pip itself is a stand-in: this is about what it is asked for."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\n[ "$2" = pip ] && {{ echo "$@" >{tmp_path}/asked; exit; }}\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    for stack in ("", "oldest"):
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(python)} | ({"STACK": stack} if stack else {})
        command = ["bash", str(ROOT / "slurm/offline.sh"), "collect", str(tmp_path), "--extra-index-url=U"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        asked = (tmp_path / "asked").read_text().split()
        constraint = Path(asked[asked.index("--constraint") + 1])
        assert (constraint.is_file(), constraint.stem) == (True, stack or install.for_this_python())
        assert "--extra-index-url=U" in asked
