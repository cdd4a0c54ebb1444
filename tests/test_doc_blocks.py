"""The pages for newcomers, followed by a machine: every command and code block runs, in the page's order, in one folder.

What is substituted, and nothing else:
- The pictures are small random ones, and the Debian package of the tutorial is a few images in the same format.
- `pretrain` gets the keys of TINY and STEPS, so that it takes seconds; commands that load images get `--workers`.
- Programs that need a network, a GPU, a cluster or root (ELSEWHERE) are not run; their config is resolved.
"""

import contextlib
import gzip
import io
import json
import re
import runpy
import shlex
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from esvit_scale import cli
from esvit_scale import config as configs
from tests.test_docs import ROOT, fenced

NOTEBOOK = ROOT / "examples" / "first_backbone.ipynb"
ELSEWHERE = ("make", "source", "sudo", "apt-get", "dpkg", "cd", "pip", "tensorboard", "torchrun", "sbatch")
TINY = (  # of every pretraining
    *("data.workers=0", "train.global_batch=8", "train.log_every=1", "train.precision=fp32", "model.embed_dim=16"),
    *("objective.prototypes=64", "objective.head_hidden=32", "objective.bottleneck=16"),
)
TINY_PRESET = (  # of presets for pictures of 224 pixels
    *("model.depths=[1,1,1,1]", "model.heads=[1,1,2,2]", "model.window=2", "data.global_crops.size=64"),
    "train.steps=3",
)
STEPS = 400  # this many steps of a page are one here
FASHION = "fashion/usr/share/datasets/fashion-mnist"


def pictures(folder: Path, names: tuple[str, ...], side: int = 40) -> None:
    """Write smooth random pictures."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((side + 8, side), Image.Resampling.BICUBIC).save(path)


def fashion(folder: Path, images: int = 120) -> None:
    """Write what the Debian package dataset-fashion-mnist has for training, with few images."""
    generator = np.random.default_rng(0)
    pixels = np.repeat(np.repeat(generator.integers(0, 255, (images, 7, 7), dtype=np.uint8), 4, 1), 4, 2)
    folder.mkdir(parents=True)
    with gzip.open(folder / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">4i", 2051, images, 28, 28) + pixels.tobytes())
    with gzip.open(folder / "train-labels-idx1-ubyte.gz", "wb") as file:
        file.write(struct.pack(">2i", 2049, images) + bytes(i % 10 for i in range(images)))


def shortened(key: str, value: str) -> str:
    """Return `key=value` with STEPS times fewer steps, where it counts them."""
    counts = key in ("train.steps", "train.knn_every", "train.checkpoint_every") and value.isdigit()
    return f"{key}={max(int(value) // STEPS, 1) if counts else value}"


class Page:
    """A page that is followed in the current folder."""

    def __init__(self, page: str) -> None:
        self.page = page
        self.blocks = list(fenced((ROOT / page).read_text()))
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.printed = ""

    def follow(self) -> None:
        """Run every block; what they print is in `printed`."""
        for line, language, block in self.blocks:
            try:
                with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
                    self.block(language, block)
            except BaseException as error:
                pytest.fail(f"{self.page}:{line}: {type(error).__name__}: {error}\n{out.getvalue()[-3000:]}")
            self.printed += out.getvalue()

    def block(self, language: str, block: str) -> None:
        name = re.match(r"# (\S+\.(?:py|yaml))\n", block)
        if name:  # a file of the reader's
            Path(name[1]).write_text(block)
        elif language == "python":
            exec(compile(block, self.page, "exec"), self.names)
        elif language == "bash":
            for line in re.sub(r"\\\n", " ", block).splitlines():
                self.command(shlex.split(line, comments=True))
        else:  # a drawing, or what a command printed
            assert language in ("", "text", "mermaid"), f"what to do with {language}?"

    def command(self, words: list[str]) -> None:
        if not words:
            return
        if words[0] in ELSEWHERE:
            check_elsewhere(words)
        elif words[0] == "python":
            runpy.run_path(words[1], run_name="__main__")
        else:
            assert words[0] == "esvit-scale", f"unknown program {words[0]}"
            assert cli.main(short_command(words[1:])) == 0, shlex.join(words)


def short_command(words: list[str]) -> list[str]:
    """Return the words of a command with what makes it short."""
    if words[0] == "pretrain":
        own = [shortened(*word.split("=", 1)) if re.match(r"[\w.]+=", word) else word for word in words]
        if words[1].endswith(".yaml"):
            values = yaml.safe_load(Path(words[1]).read_text())
            found = [(f"train.{key}", str(value)) for key, value in values["train"].items()]
            return [*own[:2], *(shortened(*pair) for pair in found if pair[1].isdigit()), *own[2:], *TINY]
        local = [] if "data.local_crops=[]" in words else ["data.local_crops=[{size: 32, count: 2}]"]
        return [*own, *TINY, *TINY_PRESET, *local]
    if words[0] in ("embed", "evaluate") and words[1] != "attention":
        return [*words, "--workers", "0"]
    return [*words, "--workers", "1"] if words[:2] == ["shards", "create"] else words


def check_elsewhere(words: list[str]) -> None:
    """Check the config of a command that cannot run here."""
    start = next((i + 1 for i, word in enumerate(words) if word == "pretrain" or word.endswith("pretrain.sbatch")), 0)
    if start:
        configs.require_training_data(configs.resolve(words[start], words[start + 1 :]))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as README leaves it: photos/ with two classes, three pictures, and the run runs/photos."""
    folder = tmp_path_factory.mktemp("readme")
    pictures(folder, tuple(f"photos/{name}/{i}.png" for i in range(160) for name in ("cat", "dog")))
    pictures(folder, ("cat.jpg", "dog.jpg", "photo.jpg"), side=96)
    return folder


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; signal handlers that a training sets are taken back."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
def test_readme_from_images_to_features(weights: Path, there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(weights)
    page = Page("README.md")
    page.follow()
    assert (weights / "runs/photos/report.html").is_file()
    assert (weights / "photos.npz").is_file()
    assert page.names["features"].shape[0] == 1


@pytest.mark.slow
def test_using_weights_with_the_run_of_readme(weights: Path, there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(weights)
    if not Path("runs/photos").exists():  # this test alone
        Page("README.md").follow()
    for name in ("a", "b"):
        words = ["pretrain", "swin_t", "data.train=shards/train", f"name={name}", "train.steps=3"]
        assert cli.main(short_command(words)) == 0
    Page("docs/using_weights.md").follow()


@pytest.mark.slow
def test_tutorial_prints_what_it_shows(there: Path) -> None:
    fashion(there / FASHION)
    page = Page("docs/tutorial.md")
    page.follow()
    # Figures differ in a run of a few steps, and so do sentences about them. But a word that the tutorial shows and that
    # neither was printed nor stands in the code is an output of long ago.
    code = "\n".join(path.read_text() for path in (ROOT / "esvit_scale").rglob("*.py"))
    known = set(re.findall(r"[A-Za-z]{4,}", code + page.printed))
    shown = "\n".join(block for _, language, block in page.blocks if language == "text")
    assert sorted(set(re.findall(r"[A-Za-z]{4,}", shown)) - known) == []


@pytest.mark.slow
def test_recipes_with_pictures(there: Path) -> None:
    pictures(there, tuple(f"photos/{name}/{i}.png" for i in range(60) for name in ("cat", "dog")))
    Page("docs/recipes.md").follow()


def cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_notebook_was_executed_from_top_to_bottom() -> None:
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1))
    outputs = [output for cell in cells() for output in cell["outputs"]]
    assert outputs
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not re.search(r"/(?:tmp|home|root|work)/", json.dumps(outputs)), "a path of the machine that ran it"


@pytest.mark.slow
def test_notebook_runs(there: Path) -> None:
    names: dict[str, Any] = {}
    steps = 0
    for cell in cells():
        source, found = re.subn(r"(\"train\.(?:steps|knn_every)\": )(\d+)", r"\g<1>10", "".join(cell["source"]))
        steps += found
        source = source.replace(":middle], 150)", ":middle], 20)")  # fewer patches
        exec(compile(source, str(NOTEBOOK), "exec"), names)
    assert steps, "nothing made the training short"
