"""Every script in data_shards/ runs on a tiny copy of the layout it is for."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esvit_scale import cli
from esvit_scale.data import manifest as manifests
from tests.data.conftest import encoded, picture

RECIPES = Path(__file__).parents[2] / "data_shards"
SHIM = """#!{python}
import json, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
"""


def jpeg(seed: int) -> bytes:
    return encoded(picture(seed, 120, 90), "JPEG")


def put(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def tar_of(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def folder(src: Path) -> None:
    for i in range(4):
        put(src / "ab"[i % 2] / f"{i}.jpg", jpeg(i))


def imagenet(src: Path) -> None:
    for i, wnid in enumerate(("n01440764", "n01443537")):
        put(src / "train" / wnid / f"{wnid}_{i}.JPEG", jpeg(i))
        put(src / "val" / wnid / f"ILSVRC2012_val_{i:08d}.JPEG", jpeg(5 + i))


def class_tars(src: Path) -> None:
    for i, wnid in enumerate(("n01440764", "n01443537")):
        tar_of(src / f"{wnid}.tar", {f"{wnid}_{j}.JPEG": jpeg(10 * i + j) for j in range(2)})


def open_images(src: Path) -> None:
    for i in range(3):
        put(src / f"train_{i}" / f"{i:016x}.jpg", jpeg(i))


def webvision(src: Path) -> None:
    for part in ("google", "flickr"):
        put(src / part / "q0001" / "x.jpg", jpeg(1))
        put(src / part / "q0002" / "y.jpg", jpeg(2))
        put(src / "info" / f"train_filelist_{part}.txt", f"{part}/q0001/x.jpg 0\n{part}/q0002/y.jpg 1\n")
    put(src / "val_images_256" / "val000001.jpg", jpeg(3))
    put(src / "info" / "val_filelist.txt", "val000001.jpg 1\n")


def fetched(src: Path) -> None:
    put(src / "0" / "x.jpg", jpeg(0))
    put(src.with_suffix(".csv"), 'url,file,caption\nhttp://a/x,0/x.jpg,"a, b"\nhttp://a/y,0/y.jpg,gone\n')


def laion(src: Path) -> None:
    tar_of(src / "00000.tar", {"000000000.jpg": jpeg(0), "000000000.txt": b"words", "000000000.json": b"{}"})
    put(src / "00000_stats.json", "{}")


def hugging_face(src: Path) -> None:
    src.mkdir()
    rows = [{"image": {"bytes": jpeg(i), "path": f"{i}.jpg"}, "label": i % 2} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), src / "train-00000-of-00001.parquet")


def twins(src: Path) -> None:
    folder(src)
    put(src / "a" / "twin.jpg", jpeg(0))


# recipe → layout, arguments, what comes out: set → (samples, classes)
CASES: dict[str, tuple[Callable[[Path], None], list[str], dict[str, tuple[int, int]]]] = {
    "image_folder.sh": (folder, ["src", "dst"], {".": (4, 2)}),
    "imagenet_1k.sh": (imagenet, ["src", "dst"], {"train": (2, 2), "val": (2, 2)}),
    "imagenet_22k.sh": (class_tars, ["src", "dst", "--short-side", "64"], {".": (4, 2)}),
    "open_images.sh": (open_images, ["src", "dst"], {".": (3, 0)}),
    "webvision.sh": (webvision, ["src", "dst"], {"google": (2, 2), "flickr": (2, 2), "val": (1, 2)}),
    "fetched_urls.sh": (fetched, ["src.csv", "src", "dst"], {".": (1, 0)}),
    "img2dataset.sh": (laion, ["src", "dst"], {".": (1, 0)}),
    "parquet.sh": (hugging_face, ["src", "dst"], {".": (3, 2)}),
    "without_near_duplicates.sh": (twins, ["src", "dst"], {".": (4, 2)}),
    "slurm_array.sh": (folder, ["src", "dst"], {}),
}


def commands_of(recipe: str, arguments: list[str], where: Path) -> list[list[str]]:
    """The `esvit-scale` commands that a recipe runs, without running them: starting Python for each takes seconds."""
    log, shim = where / "log", where / "bin" / "esvit-scale"
    put(shim, SHIM.format(python=sys.executable, log=str(log)))
    shim.chmod(0o755)
    task = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "1"}
    env = {**os.environ, **task, "PATH": f"{shim.parent}:{os.environ['PATH']}"}
    subprocess.run([str(RECIPES / recipe), *arguments], env=env, cwd=where, check=True)
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_every_recipe_is_tested_and_documented() -> None:
    recipes = {path.name for path in RECIPES.iterdir() if path.suffix == ".sh"}
    assert recipes == set(CASES)
    described = (RECIPES / "README.md").read_text()
    assert [name for name in recipes if f"`{name} " not in described] == []
    links = re.findall(r"\]\(([^)#:]+)\)", described)
    assert links
    assert [link for link in links if not (RECIPES / link).exists()] == []


@pytest.mark.parametrize("recipe", CASES)
def test_recipe_writes_a_set(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, arguments, sets = CASES[recipe]
    make(tmp_path / "src")
    monkeypatch.chdir(tmp_path)
    commands = commands_of(recipe, arguments, tmp_path)
    if recipe == "slurm_array.sh":
        commands.append(["shards", "merge", "dst"])
        sets = {".": (4, 2)}
    for command in commands:
        workers = ["--workers", "1"] if command[1] in ("create", "duplicates", "verify") else []
        assert cli.main([*command, *workers]) == 0
    found = {name: manifests.load(tmp_path / "dst" / name) for name in sets}
    assert {name: (m.samples, len(m.classes)) for name, m in found.items()} == sets


@pytest.mark.parametrize("recipe", CASES)
def test_recipe_without_arguments_prints_its_usage(recipe: str) -> None:
    done = subprocess.run([str(RECIPES / recipe)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
