"""The Python API by real calls: the examples of docs/python_api.md as they stand, and each function against its command."""

import json
import re
import signal
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import esvit_scale
from esvit_scale import api, cli
from esvit_scale.errors import RestartCanHelp, UserError
from esvit_scale.train.trainer import Trainer
from tests import launcher, tiny

PAGE = launcher.REPOSITORY / "docs" / "python_api.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/cat and photos/dog, 16 small pictures each."""
    folder = tmp_path_factory.mktemp("user")
    for i in range(32):
        path = folder / "photos" / ("cat", "dog")[i % 2] / f"{i // 2}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((72, 64), Image.Resampling.BICUBIC).save(path)
    return folder


def example(number: int, capsys: pytest.CaptureFixture[str]) -> str:
    exec(compile(EXAMPLES[number], str(PAGE), "exec"), {"__name__": "__main__"})
    return capsys.readouterr().out


@pytest.fixture
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.slow
def test_page_goes_from_images_to_features(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    lines = [line for line in example(0, capsys).splitlines() if not line.startswith(("k=", "|", " "))]
    assert "{'train': 27, 'val': 5}" in lines
    assert re.fullmatch(r"k-NN \d+ %", lines[-2])
    assert lines[-1].startswith("(2, 256) ['photos/cat/0.png'")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
    assert (there / "runs/photos/summary.json").is_file()

    changes = {"name": "photos", "data.train": "shards/train", "data.workers": 0}
    rest = {"train.steps": 2, "train.global_batch": 8}
    assert api.pretrain("demo", changes | rest) == Path("runs/photos"), "a finished run returns at once"
    with pytest.raises(UserError, match="holds a run of another config"):
        api.pretrain("demo", changes | rest | {"optim.lr": 0.1})

    of_classes = {"name": "classes", "model.init_from": "runs/photos", "train.precision": "fp32", "train.epochs": 1}
    assert api.finetune(changes=changes | rest | of_classes) == Path("runs/classes")
    assert esvit_scale.load_classifier("runs/classes").classes == ("cat", "dog")

    each = api.embed(
        "runs/photos", [Image.open("photos/cat/0.png"), np.asarray(Image.open("photos/dog/0.png"))], batch=1
    )
    whole = api.embed("runs/photos", "photos", workers=0)
    at = [whole.keys.index(key) for key in ("cat/0.png", "dog/0.png")]
    # The same images, but files and images in memory are resized by kernels that round some pixels to another level: features,
    # of the order of 1, differ by some thousandths; those of another image would differ by some tenths.
    np.testing.assert_allclose(each.features, whole.features[at], atol=0.03)
    assert np.abs(each.features - whole.features[at[::-1]]).max() > 0.1
    assert (each.keys, whole.labels[at].tolist(), each.labels.tolist()) == (["0", "1"], [0, 1], [-1, -1])

    words = ["embed", "--checkpoint", "runs/photos", "--data", "photos", "--out", "f.npz", "--workers", "0"]
    assert cli.main(words) == 0
    with np.load("f.npz") as arrays:
        np.testing.assert_array_equal(arrays["features"], whole.features)
    capsys.readouterr()
    api.evaluate_knn("runs/photos", "shards/train", "shards/val", ks=[5], workers=0)
    assert capsys.readouterr().out == ""


def test_plan_is_that_of_the_command(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "zero_stage" in example(1, capsys)
    found = api.plan("demo", {"train.global_batch": 32}, gpus=2, gpu_memory="16G", images=1000, tflops=100)
    words = "plan demo train.global_batch=32 --gpus 2 --gpu-memory 16G --images 1000 --tflops 100 --json"
    assert cli.main(words.split()) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))


def test_config_takes_presets_files_and_configs(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert example(2, capsys) == "0.0004 512\n"
    Path("mine.yaml").write_text("train: {epochs: 5}\n")
    changes: dict[str, Any] = {
        "name": "a-b",
        "data.train": Path("x/y"),
        "optim.lr": 1e-5,
        "optim.clip": None,
        "train.compile": True,
        "data.global_crops.scale": (0.2, 1),
    }
    made = api.config("mine.yaml", changes)
    assert (made.train.epochs, made.data.train, made.optim.lr, made.optim.clip) == (5, "x/y", 1e-5, None)
    assert api.config(made) == made
    assert api.config(made, {"train.epochs": 6}).train.epochs == 6
    with pytest.raises(UserError, match=r"did you mean 'train\.epochs'"):
        api.config("swin_t", {"train.epoch": 3})


def test_pretrain_that_a_signal_ended_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config(tmp_path / "run", tiny.shards(tmp_path / "shards"), train__steps=4)
    record = Trainer._record

    def stopped_at_step_2(trainer: Trainer, *arguments: Any) -> None:
        record(trainer, *arguments)
        if trainer.step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_record", stopped_at_step_2)
    with pytest.raises(RestartCanHelp, match="the same call continues it"):
        api.pretrain(config)
    assert (tmp_path / "run/requeue").exists()


def test_problems_of_a_changed_config_name_the_change(there: Path) -> None:
    made = api.config("demo", {"name": "mine"})
    with pytest.raises(UserError) as raised:
        api.config(made, {"train.epochs": 0})
    assert "train.epochs" in str(raised.value)
    assert "config.yaml" not in str(raised.value)
    assert tempfile.gettempdir() not in str(raised.value)
    unfit = made.model_copy(update={"seed": -1})
    with pytest.raises(UserError, match=r"^mine: seed"):
        api.config(unfit)


def test_package_names_are_the_functions() -> None:
    for name in ("pretrain", "finetune", "embed", "evaluate_knn", "plan", "Embeddings"):
        assert getattr(esvit_scale, name) is getattr(api, name)
    assert callable(esvit_scale.shards.create)
    stub = Path(esvit_scale.__file__).with_suffix(".pyi").read_text()
    assert set(esvit_scale._LAZY) | {"shards"} == set(re.findall(r" as (\w+)$", stub, re.MULTILINE))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples_per_shard": 0}, r"--samples-per-shard: expected a whole number ≥ 1, got 0"),
        ({"val_fraction": 1.5}, r"--val-fraction: expected 0, or a fraction between 0 and 1, got 1\.5"),
        ({"format": "png", "quality": 90}, r"--quality: PNG is lossless"),
        ({"channels": 13, "short_side": 256}, r"--short-side, --quality and --format write 8-bit RGB, not 13 channels"),
        ({"channels": 17}, r"--channels: expected 1\.\.16 channels, got 17"),
        ({"format": "jpg"}, r"--format: expected jpeg, png or webp, got 'jpg'"),
    ],
)
def test_shards_create_refuses_what_the_command_refuses(there: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        esvit_scale.shards.create("photos", "refused", workers=1, **values)
    assert not (there / "refused").exists()


def test_shards_create_is_the_command(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = esvit_scale.shards.create("photos", "by_call", val_fraction=0.25, samples_per_shard=8, workers=1)
    words = "shards create photos by_command --val-fraction 0.25 --samples-per-shard 8 --workers 1"
    assert cli.main(words.split()) == 0
    for name in ("train", "val"):
        calls, commands = (sorted((there / way / name).glob("*.tar")) for way in ("by_call", "by_command"))
        assert [path.read_bytes() for path in calls] == [path.read_bytes() for path in commands] != []
        assert made[name].samples == {"train": 27, "val": 5}[name]
