"""Install this project into the environment of the Python that runs this file, with the versions of a tested stack.

    python constraints/install.py STACK EXTRAS [TORCH_INDEX]

STACK is the name of a file beside this one, or `newest`: then the newest of them whose torch pip may install, because
an image's or a site's pip can be bounded below newest.txt, or the Python can be too old for it. What was chosen is
printed, and kept in the environment's folder in `.stack`.
"""

import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
NEWEST_FIRST = ("newest", "oldest")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]


def main(stack: str, extras: str, index: str = "") -> None:
    """Install a stack into the environment of this Python and print the versions that were chosen."""
    tested = NEWEST_FIRST if stack == "newest" else (stack,)
    if not (HERE / f"{tested[0]}.txt").is_file():
        sys.exit(f"STACK={stack}: no constraints/{stack}.txt; there are {', '.join(NEWEST_FIRST)}")
    chosen = next((name for name in tested if fits_python(name) and torch_installs(name, index)), None)
    if chosen is not None:
        constraints, said = HERE / f"{chosen}.txt", f"the tested stack constraints/{chosen}.txt"
    elif index:
        constraints, said = other_torch(index, stack), f"constraints/{stack}.txt but for torch, which is TORCH_INDEX's"
    elif any(map(fits_python, tested)):
        sys.exit(f"The pip of this Python can install none of the tested stacks asked for ({', '.join(tested)}).")
    else:
        sys.exit(no_stack(tested))
    pip("--constraint", str(constraints), "--editable", f"{HERE.parent}[{extras}]")
    installed = f"Python {platform.python_version()}, torch {version('torch')}, DeepSpeed {version('deepspeed')}"
    Path(sys.prefix, ".stack").write_text(f"{installed}: {said}\n")


def pins(stack: str) -> dict[str, str]:
    """Return the versions of a stack by the packages' names."""
    lines = (HERE / f"{stack}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def fits_python(stack: str, python: tuple[int, ...] = sys.version_info[:2]) -> bool:
    """Tell whether the stack is for this Python: its first line says which, as `# python >=3.11,<3.14`."""
    first = (HERE / f"{stack}.txt").read_text().splitlines()[0]
    least, end = (tuple(map(int, found)) for found in re.findall(r"(\d+)\.(\d+)", first))
    if least <= python < end:
        return True
    wanted = first[first.index(">") :]
    print(f"constraints/{stack}.txt is for Python {wanted}: make PYTHON=… chooses another.", file=sys.stderr)
    return False


def for_this_python() -> str:
    """Return the newest stack that is for this Python, or end the process with a line that says what to do."""
    return next((name for name in NEWEST_FIRST if fits_python(name)), "") or sys.exit(no_stack(NEWEST_FIRST))


def no_stack(asked: tuple[str, ...]) -> str:
    """Return what to do when this Python is outside what the stacks are for."""
    version_of = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return f"No tested stack ({', '.join(asked)}) is for Python {version_of}: install another, make PYTHON=python3.13"


def torch_installs(stack: str, index: str) -> bool:
    """Install the stack's torch and torchvision; False where pip says that it may or can not have these versions."""
    versions = pins(stack)
    asked = [f"{name}=={versions[name]}" for name in ("torch", "torchvision")]
    done = subprocess.run([*PIP, *from_index(index), *asked], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return True
    if not unavailable(done.stderr):
        sys.exit(done.stderr.strip() or f"pip failed to install {' '.join(asked)}")
    print(f"pip cannot install {' '.join(asked)} of constraints/{stack}.txt here.", file=sys.stderr)
    return False


def unavailable(said: str) -> bool:
    """Tell a version that pip may not choose, or that its index does not have, from an index that does not answer."""
    if "(from versions: none)" in said:
        return False
    return "ResolutionImpossible" in said or "No matching distribution found" in said


def other_torch(index: str, stack: str) -> Path:
    """Install whatever torch the index has that the project can use; return the stack's constraints without torch."""
    least = pins("oldest")
    pip(*from_index(index), *(f"{name}>={least[name]}" for name in ("torch", "torchvision")))
    path = Path(sys.prefix, "constraints.txt")
    stack = stack if fits_python(stack) else "oldest"
    path.write_text("".join(f"{n}=={v}\n" for n, v in pins(stack).items() if n not in ("torch", "torchvision")))
    return path


def from_index(index: str) -> list[str]:
    """Return pip's options for a package index of torch builds; none for the default index."""
    return ["--index-url", index] if index else []


def pip(*arguments: str) -> None:
    """Run pip in this Python; when it fails, end the process with its exit code."""
    if (code := subprocess.run([*PIP, *arguments], check=False).returncode) != 0:
        sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
