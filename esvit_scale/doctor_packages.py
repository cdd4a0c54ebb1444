"""The rows of `esvit-scale doctor` about Python packages: required ones, their tested versions, and optional extras."""

import importlib
import importlib.machinery
import importlib.util
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

State = Literal["ok", "warning", "absent", "problem"]


class CheckRow(NamedTuple):
    """One line of doctor's table: what was checked, its state, and advice if something is wrong."""

    name: str
    state: State
    detail: str
    advice: str = ""
    required: bool = False


class Range(NamedTuple):
    """The oldest and the newest version of a package that the tests pass on."""

    oldest: str
    newest: str


class Extra(NamedTuple):
    """An optional extra of pyproject.toml: the packages it installs, and what cannot be done without them."""

    packages: tuple[str, ...]
    purpose: str
    only_tests: tuple[str, ...] = ()  # packages of the extra that nothing but tests needs


# The tested range of every direct dependency, copied from constraints/oldest.txt and newest.txt because the wheel does
# not contain those files (a test compares them).
TESTED = {
    "torch": Range("2.7.0", "2.14.1"),
    "torchvision": Range("0.22.0", "0.29.1"),
    "timm": Range("1.0.31", "1.0.31"),
    "deepspeed": Range("0.19.8", "0.19.8"),
    "fairscale": Range("0.4.13", "0.4.13"),
    "webdataset": Range("1.0.2", "1.0.2"),
    "pyyaml": Range("6.0.1", "6.0.4"),
    "pydantic": Range("2.6.0", "2.14.4"),
    "numpy": Range("1.26.0", "2.4.6"),
    "pillow": Range("12.3.0", "13.0.0"),
    "simplejpeg": Range("1.7.3", "1.9.0"),
    "safetensors": Range("0.8.0", "0.8.0"),
    "tqdm": Range("4.66.0", "4.70.1"),
    "jinja2": Range("3.1.0", "3.1.6"),
    "matplotlib": Range("3.8.0", "3.11.2"),
    "scikit-image": Range("0.22.0", "0.26.0"),
    "scikit-learn": Range("1.4.0", "1.9.1"),
    "scipy": Range("1.11.1", "1.17.1"),
    "pyarrow": Range("14.0.1", "26.0.1"),
    "tensorboard": Range("2.16.2", "2.21.0"),
    "onnx": Range("1.17.0", "1.23.2"),
    "onnxscript": Range("0.7.2", "0.7.2"),
    "onnxruntime": Range("1.18.0", "1.32.0"),
    "transformers": Range("5.20.2", "5.24.0"),
    "opencv-python-headless": Range("4.8.0.74", "5.0.0.93"),
    "tifffile": Range("2025.5.10", "2026.3.3"),
    "imagecodecs": Range("2025.3.30", "2026.3.6"),
    "soundfile": Range("0.13.0", "0.14.0"),
    "av": Range("16.0.0", "18.1.0"),
    "playwright": Range("1.45.0", "1.65.2"),
    "wandb": Range("0.31.0", "0.31.0"),
    "mkdocs": Range("1.6.1", "1.6.1"),
    "mkdocs-material": Range("9.6.1", "9.8.2"),
    "s3fs": Range("2026.9.0", "2026.9.0"),
}
IMPORTED = ("torch", "torchvision", "timm", "deepspeed", "fairscale", "webdataset")  # each has a row of its own
EXTRAS = {
    "parquet": Extra(("pyarrow",), "shards create from parquet files"),
    "tracking": Extra(("tensorboard",), "TensorBoard curves; without it metrics go to metrics.jsonl alone"),
    "wandb": Extra(("wandb",), "train.wandb: a record at Weights & Biases"),
    "export": Extra(
        ("onnx", "onnxscript", "onnxruntime", "transformers"), "convert --to onnx", ("onnxruntime", "transformers")
    ),
    "clip": Extra(("transformers",), "evaluate transfer: zero-shot by a CLIP's text tower"),
    "opencv": Extra(("opencv-python-headless",), "data.photometric: workers"),
    "s3": Extra(("s3fs",), "data.train=s3://…"),
    "tiff": Extra(("tifffile", "imagecodecs"), "TIFF other than 8-bit RGB"),
    "modalities": Extra(("soundfile", "av"), "data.audio, data.video; shards create --members"),
    "docs": Extra(("mkdocs", "mkdocs-material"), "make docs: the documentation as a site"),
    "browser": Extra(
        ("playwright",), "the tests that open reports and the site in Chromium (also: playwright install chromium)"
    ),
}
# Other distributions that provide the same module, of which one is installed in place of the first.
SAME_MODULE = {
    "opencv-python-headless": ("opencv-python", "opencv-contrib-python-headless", "opencv-contrib-python"),
}
VERSION = re.compile(r"(?P<release>\d+(\.\d+)*)(\.?(?P<stage>a|b|rc|dev|post)\d*(\.?(post|dev)\d*)*)?(\+.*)?")
INSTALL = "make venv installs it; pip install -e . in your own environment"


def required(name: str, also: str = "", advice: str = INSTALL) -> CheckRow:
    """Import a required package and return its row; importing is the check, because an installed one may not load.

    Args:
        also: text to add to the version.
        advice: what to do if the import fails.
    """
    try:
        module = importlib.import_module(name)
    except Exception as error:
        return CheckRow(name, "problem", one_line(error), advice, True)
    version = installed(name) or str(getattr(module, "__version__", "of unknown version"))
    state, detail, advice = compared(name, version)
    return CheckRow(name, state, ", ".join(filter(None, [detail, also])), advice, True)


def others() -> Iterator[CheckRow]:
    """Yield rows about the required packages that are not in IMPORTED: one for each that is missing or outside its
    tested range, and one for all the rest.
    """
    optional = {package for extra in EXTRAS.values() for package in extra.packages}
    fine = []
    for name in TESTED:
        if name in IMPORTED or name in optional:
            continue
        version = installed(name)
        if version is None:
            yield CheckRow(name, "problem", "not installed", INSTALL, True)
            continue
        state, detail, advice = compared(name, version)
        if state == "ok":
            fine.append(f"{name} {detail}")
        else:
            yield CheckRow(name, state, detail, advice, True)
    if fine:
        yield CheckRow("other packages", "ok", ", ".join(fine))


def extras() -> Iterator[CheckRow]:
    """Yield one row per optional extra: the versions installed, or what is missing and which work needs it."""
    for name, extra in EXTRAS.items():
        found = {package: _installed_as(package) for package in extra.packages}
        missing = [package for package, version in found.items() if version is None]
        needed = [package for package in missing if package not in extra.only_tests]
        checked = [(package, compared(package, version)) for package, version in found.items() if version is not None]
        versions = ", ".join(f"{package} {detail}" for package, (_, detail, _) in checked)
        if needed:
            has = f" (installed: {versions})" if versions else ""
            detail = f"{', '.join(needed)} not installed{has}: needed for {extra.purpose}"
            yield CheckRow(name, "absent", detail, f"pip install 'esvit-scale[{name}]'")
            continue
        tests = f"; {', '.join(missing)} not installed, which only tests need" if missing else ""
        advice = "; ".join(f"{package}: {advice}" for package, (_, _, advice) in checked if advice)
        yield CheckRow(name, "warning" if advice else "ok", f"installed {versions}{tests}", advice)


def apex(spec: "importlib.machinery.ModuleSpec | None") -> CheckRow:
    """Return the row of NVIDIA's apex, recognised by its module apex.optimizers: PyPI's package apex is another one."""
    if spec is None:
        detail = "not installed: needed for optim.name=apex_adam and apex_lamb (adamw and lamb need nothing)"
        return CheckRow("apex", "absent", detail, "NVIDIA's is built from its repository, not by pip install apex")
    if any((Path(folder) / "optimizers").is_dir() for folder in spec.submodule_search_locations or []):
        return CheckRow("apex", "ok", f"NVIDIA's, {installed('apex') or 'of unknown version'}: fused optimizers")
    return CheckRow(
        "apex",
        "absent",
        f"an unrelated package of that name is installed ({installed('apex') or 'of unknown version'})",
        "pip uninstall apex; NVIDIA's is built from its repository",
    )


def compared(package: str, version: str) -> tuple[State, str, str]:
    """Compare a package's version with its range in TESTED; return the state, text and advice of its row."""
    oldest, newest = TESTED[package]
    advice = f"tested with {oldest}" + (f" to {newest}" if newest != oldest else "")
    try:
        key = sort_key(version)
    except ValueError:
        return "warning", f"{version} cannot be compared with the tested versions", advice
    if key < sort_key(oldest):
        return "warning", f"{version} is older than the oldest tested {oldest}", advice
    if key > sort_key(newest):
        return "warning", f"{version} is newer than the newest tested {newest}", advice
    return "ok", version, ""


def sort_key(version: str) -> tuple[tuple[int, ...], int]:
    """Return a sort key that orders a version relative to final releases as PEP 440 does.

    The key holds the release numbers without trailing zeros, then -1 for a pre-release, 0 for a final release or 1 for
    a post-release. A local suffix (+cu130) is ignored. `packaging` is not used, because doctor must run without it.

    Raises:
        ValueError: the text is not a version.
    """
    found = VERSION.fullmatch(version)
    if found is None:
        raise ValueError(f"{version!r} is no version")
    numbers = [int(part) for part in found["release"].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    stage = 0 if found["stage"] is None else 1 if found["stage"] == "post" else -1
    return tuple(numbers), stage


def installed(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(distribution) or "of unknown version"
    except (metadata.PackageNotFoundError, KeyError):  # KeyError: metadata without a version, from Python 3.12 on
        return None


def one_line(error: Exception) -> str:
    """Return an exception's type and text as one line of at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _installed_as(package: str) -> str | None:
    names = (package, *SAME_MODULE.get(package, ()))
    return next((version for name in names if (version := installed(name)) is not None), None)
