"""docs/one_step.md against the code: the shapes of a real Swin-T step, and the excerpts."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esvit_scale import config as configs
from esvit_scale.config import Config
from esvit_scale.data import manifest as manifests
from esvit_scale.data import stream, worker_batch
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.objective import center, esvit
from esvit_scale.objective.network import build_student, build_teacher
from tests import tiny
from tests.test_docs import fenced

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "one_step.md").read_text()
B = 3  # images of a micro-batch
ACCUM = 2
Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    data = tiny.shards(tmp_path_factory.mktemp("data") / "shards", ACCUM * B)
    values = [f"data.train={data}", f"train.global_batch={ACCUM * B}", f"train.grad_accum={ACCUM}", "data.workers=0"]
    return configs.resolve("swin_t", values)


def of_data(config: Config, monkeypatch: pytest.MonkeyPatch) -> tuple[Shapes, list[stream.MicroBatch]]:
    """The shapes of a step's data, from a real shard set, and the micro-batches."""
    found: Shapes = {}
    make = worker_batch.make_worker_batch

    def recorded(*args: Any) -> worker_batch.WorkerBatch:
        made = make(*args)
        found["crops of a loader process, large"], found["crops of a loader process, small"] = (
            c.shape for c in made.crops
        )
        return made

    monkeypatch.setattr(stream, "make_worker_batch", recorded)
    manifest = manifests.load(Path(config.data.train or ""))
    [batch] = stream.batches(config, manifest, 0, 1, 0, 1)
    found["crops of a rank, large"], found["crops of a rank, small"] = (group.shape for group in batch.crops)
    found["positions"] = batch.positions.shape
    return found, stream.micro_batches(config, batch, torch.device("cpu"), torch.bfloat16)


def of_networks(config: Config, crops: list[Tensor], keys: Tensor, monkeypatch: pytest.MonkeyPatch) -> Shapes:
    """The shapes of a forward of teacher and student, on the meta device: nothing is computed."""
    found: Shapes = {}
    with torch.device("meta"):
        student, teacher = build_student(config), build_teacher(config)

    def record(name: str) -> Any:
        return lambda module, inputs, output: found.update({name: output.shape})

    student.trunk.patch_embed.register_forward_hook(record("tokens after the patch embedding"))
    for i, stage in enumerate(student.trunk.stages, 1):
        stage.blocks[-1].register_forward_hook(record(f"tokens of stage {i}"))
    fused, terms = esvit.prototype_cross_entropy, iter(("view", "region"))

    def loss(
        z_s: Tensor, rows_s: Tensor, z_t: Tensor, rows_t: Tensor, values: Tensor, match: Tensor, *rest: Any
    ) -> Any:
        term = next(terms)
        found[f"student's bottleneck, {term}s"], found[f"teacher's bottleneck, {term}s"] = z_s.shape, z_t.shape
        found["prototypes of a head"], found["centre of a head"] = rows_s.shape, values.shape
        found[f"pairs of {term}s"] = match.shape
        return fused(z_s, rows_s, z_t, rows_t, values, match, *rest)

    observe = center.Center.observe

    def observed(self: center.Center, mean_z: Tensor, rows: Tensor) -> None:
        found["mean of the bottleneck"] = mean_z.shape
        observe(self, mean_z, rows)

    monkeypatch.setattr(esvit, "prototype_cross_entropy", loss)
    monkeypatch.setattr(center.Center, "observe", observed)
    with torch.no_grad():
        targets = teacher(crops[:1])
    features = student.trunk(crops, keys)
    value, logs, view = student(crops, targets, keys, 0.04)
    found |= {"teacher's region features": targets.features.shape, "drop keys": keys.shape, "loss": value.shape}
    found |= {"view features": features.view.shape, "region features": features.regions.shape}
    assert targets.images == B
    assert {"loss_view", "loss_region", "teacher_entropy_view", "prototypes_used_region", "feature_std"} <= logs.keys()
    assert view.shape == features.view.shape
    return found


def on_page(images: int) -> Shapes:
    """The shapes in the tables of the page, for so many images."""
    rows = re.findall(r"^\| ([^|`]+) \| [^|]*?`\[([^\]]*)\]`", PAGE, re.MULTILINE)
    numbers = {"B": images, "A": ACCUM, "K": 65536, "D": 256, "C": 768}
    return {
        name.strip(): tuple(
            eval(number.replace("·", "*").replace(" ", ""), numbers.copy()) for number in shape.split(",") if number
        )
        for name, shape in rows
    }


def test_shapes_on_the_page_are_those_of_a_step(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    found, micro_batches = of_data(config, monkeypatch)
    assert len(micro_batches) == ACCUM
    large, small = micro_batches[0].crops
    found |= {"large crops of a micro-batch": large.shape, "small crops of a micro-batch": small.shape}
    assert large.dtype == small.dtype == torch.bfloat16
    positions = micro_batches[0].positions.to("meta")
    keys = drop_keys(config.seed, 0, positions, len(config.crop_sizes))
    found |= of_networks(config, [c.to("meta") for c in (large, small)], keys, monkeypatch)
    assert on_page(B) == {name: tuple(shape) for name, shape in found.items()}


def test_excerpts_stand_in_the_code() -> None:
    def squeezed(text: str) -> str:
        return re.sub(r"\s+", " ", re.sub(r"#.*", "", text)).strip()

    code = squeezed((ROOT / "esvit_scale" / "train" / "trainer.py").read_text())
    excerpts = [block for _, language, block in fenced(PAGE) if language == "python"]
    assert excerpts
    assert [part for block in excerpts for part in block.split("...") if squeezed(part) not in code] == []


def test_names_in_the_drawing_stand_in_the_code() -> None:
    drawing = (ROOT / "docs" / "pictures" / "one_step.svg").read_text()
    names = {
        name
        for text in re.findall(r'class="code"[^>]*>([^<]+)<', drawing)
        for name in re.findall(r"\w+(?:\.\w+)*", text)
    }
    code = "\n".join(path.read_text() for path in (ROOT / "esvit_scale").rglob("*.py"))
    files = {path.name for path in (ROOT / "esvit_scale").rglob("*.py")}
    assert len(names) >= 15
    assert [name for name in names if name not in files and not all(part in code for part in name.split("."))] == []
