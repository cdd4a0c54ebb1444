"""Exported weights in the hands of those they are for: timm, transformers, onnxruntime, torch.hub, `load_backbone`."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import esvit_scale
from esvit_scale import cli
from esvit_scale import config as configs
from esvit_scale.checkpoint import export, libraries, official, safetensors_file, state
from esvit_scale.checkpoint.convert import convert
from esvit_scale.checkpoint.weights import Weights
from esvit_scale.data import stream
from esvit_scale.errors import UserError
from esvit_scale.evaluate.features import load_frozen_trunk
from esvit_scale.models.initialize import initialize
from esvit_scale.models.swin import Swin
from esvit_scale.models.swin_plain import PlainSwin
from esvit_scale.models.swin_v2 import SwinV2
from esvit_scale.objective.network import build_network
from tests import launcher, tiny
from tests.checkpoint import official as theirs

AT_224 = {"trunk": "swin_t", "window": 7, "embed_dim": 16, "depths": [1, 1, 2, 1], "heads": [1, 2, 2, 4]}


def weights_of(folder: Path, model: dict, size: int = 224) -> Weights:
    """A network with every parameter moved from where initialisation puts it: an eps, a bias or a norm that goes
    astray shows."""
    values = {"name": "swans", "data": {"train": str(folder), "global_crops": {"size": size}}, "model": model}
    config = configs.validate(values | {"objective": tiny.VALUES["objective"]}, where="test")
    network = build_network(config)
    initialize(network, 0)
    torch.manual_seed(0)
    for p in network.parameters():
        p.data += 0.1 * torch.randn_like(p) if p.ndim < 2 else 0.02 * torch.randn_like(p)
    tensors = {name: p.detach() for name, p in network.state_dict().items()}  # with running statistics
    return Weights(config, {"student": tensors, "teacher": tensors}, {})


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A step folder of a trunk for 224 pixels."""
    state.write_weights(tmp_path / "step", weights_of(tmp_path, AT_224))
    return tmp_path / "step"


def step_of(folder: Path, model: dict, size: int = 224) -> Path:
    state.write_weights(folder / "step", weights_of(folder, model, size))
    return folder / "step"


def images(n: int = 2, size: int = 224) -> torch.Tensor:
    """Normalised, with flat patches too, where a norm's eps is largest against the variance."""
    x = torch.randn(n, 3, size, size)
    x[:, :, : size // 2] *= 0.05
    return x


@torch.no_grad()
def features(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    trunk, _ = state.load_teacher(folder)
    found = trunk([x])
    return found.view, found.regions


# --- timm ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "size"),
    [
        (AT_224, 224),
        (AT_224 | {"window": 14}, 224),  # the last stage has one window of its map
        ({"trunk": "swinv2_t", "window": 8, "embed_dim": 16, "depths": [1, 1, 2, 1], "heads": [1, 2, 2, 4]}, 256),
    ],
)
def test_timm_export_has_the_same_features(tmp_path: Path, model: dict, size: int) -> None:
    timm = pytest.importorskip("timm")
    source = step_of(tmp_path, model, size)
    convert(source, tmp_path / "timm", "esvit-scale", "timm")
    norm = {} if "v2" in model["trunk"] else {"norm_layer": partial(nn.LayerNorm, eps=1e-6)}
    other = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, **norm).eval()
    x = images(2, size)
    view, regions = features(source, x)
    assert view.abs().max() > 0.5
    torch.testing.assert_close(other(x), view, rtol=0, atol=1e-5)
    torch.testing.assert_close(other.forward_features(x).flatten(0, 2), regions, rtol=0, atol=2e-5)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(other))
    assert f"size={stream.evaluation_side(size)}," in str(transform)


# --- transformers ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("model", [AT_224, {**AT_224, "trunk": "swinv2_t"}], ids=["v1", "v2"])
def test_transformers_export_has_the_same_features(tmp_path: Path, model: dict) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `export`)")
    source = step_of(tmp_path, model)
    convert(source, tmp_path / "hf", "esvit-scale", "huggingface")
    other, info = transformers.AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    x = images()
    view, regions = features(source, x)
    found = other.eval()(x)
    torch.testing.assert_close(found.pooler_output, view, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.last_hidden_state.flatten(0, 1), regions, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("model", ["SwinModel", "SwinForImageClassification"])
def test_folders_of_transformers_are_read(tmp_path: Path, model: str) -> None:
    """A repository of Hugging Face, which this project did not write."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `export`)")
    shape = {"embed_dim": 32, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8], "layer_norm_eps": 1e-6}
    theirs = getattr(transformers, model)(transformers.SwinConfig(**shape, num_labels=3)).eval()
    for p in theirs.parameters():  # biases too
        p.copy_(0.2 * torch.randn_like(p) + (p.ndim == 1))
    theirs.save_pretrained(tmp_path / "hf")
    trunk = esvit_scale.load_backbone(tmp_path / "hf")
    assert trunk.config.model.depths == [1, 2, 1, 1]
    x = images()
    view = (theirs if model == "SwinModel" else theirs.swin)(x).pooler_output
    # Some norms of theirs have an eps of 1e-5 in any case, where ours have 1e-6.
    torch.testing.assert_close(trunk(x), view, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_folders_of_timm_are_read(step: Path, tmp_path: Path) -> None:
    convert(step, tmp_path / "timm", "esvit-scale", "timm")
    (tmp_path / "timm" / "esvit_scale.json").unlink()
    x = images()
    assert torch.equal(esvit_scale.load_backbone(tmp_path / "timm")(x), esvit_scale.load_backbone(step)(x))


def picture(width: int, height: int) -> Image.Image:
    """Smooth colours, so that a resize is not all overshoot."""
    generator = np.random.default_rng([width, height])
    coarse = generator.integers(0, 255, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def levels(pixels: np.ndarray) -> np.ndarray:
    """Normalised [3, S, S] → 0 … 255."""
    mean, std = (np.array(v).reshape(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return (np.asarray(pixels, dtype=np.float64) * std + mean) * 255


@pytest.fixture(scope="module", params=["pil", "torchvision"])
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Any]:
    """The processor that transformers makes of our file for a size."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `export`)")
    folder = tmp_path_factory.mktemp("processor")

    def of(size: int) -> Any:
        config = configs.validate({"data": {"global_crops": {"size": size}, "local_crops": []}}, where="test")
        (folder / "preprocessor_config.json").write_text(json.dumps(libraries.huggingface_processor(config)))
        try:
            made = transformers.AutoImageProcessor.from_pretrained(folder, backend=request.param)
        except (TypeError, ValueError):
            made = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=request.param == "torchvision")
        made.tolerance = 2.01 if request.param == "torchvision" else 0.01  # levels: another implementation of bicubic
        return made

    return of


@pytest.mark.parametrize("size", [32, 96, 224, 384, 448])
def test_processor_equals_the_evaluation_transform(size: int, processor: Callable[[int], Any]) -> None:
    """At any size and aspect, but for a middle half a pixel off the grid, which transformers rounds down."""
    made, side = processor(size), stream.evaluation_side(size)
    shapes = np.random.default_rng(size).integers(20, 700, (3, 2)).tolist()
    for width, height in [*shapes, (side, side), (1, 5), (9, 1), (50, 3)]:
        image = picture(width, height)
        found = levels(made(image, return_tensors="np")["pixel_values"][0])
        whole = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
        resized = np.asarray(image.resize(whole, Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        top, left = ((n - size) // 2 for n in resized.shape[1:])
        assert np.abs(found - resized[:, top : top + size, left : left + size]).max() <= made.tolerance, (width, height)
        ours = stream.centre_crop(image, size)
        shifts = [round((n - size) / 2) - (n - size) // 2 for n in resized.shape[1:]]
        assert max(shifts) <= 1
        if not any(shifts):
            assert np.abs(found - ours).max() <= made.tolerance


def test_processor_accepts_grey_transparent_and_palette_images(step: Path, processor: Callable[[int], Any]) -> None:
    import transformers

    if transformers.__version__.startswith("5.20."):
        pytest.skip("this transformers, the last for Python 3.10, drops transparency instead of blending onto white")
    made, model = processor(224), esvit_scale.load_backbone(step)
    clear = picture(300, 280).convert("RGBA")
    clear.putalpha(picture(300, 280).convert("L"))
    modes = [picture(300, 280).convert(mode) for mode in ("L", "1", "P", "LA", "CMYK", "RGBA")]
    for image in [*modes, clear, clear.convert("LA")]:
        found = levels(made(image, return_tensors="np")["pixel_values"][0])
        assert np.abs(found - levels(model.preprocess(image).numpy())).max() <= made.tolerance, image.mode


def test_preprocess_scales_16_bit_images_and_applies_orientation(step: Path) -> None:
    model = esvit_scale.load_backbone(step)
    grey = np.asarray(picture(300, 280).convert("L"))
    deep = model.preprocess(Image.fromarray(grey.astype(np.uint16) * 257))
    torch.testing.assert_close(deep, model.preprocess(Image.fromarray(grey)), rtol=0, atol=1e-6)
    lying = picture(300, 280).transpose(Image.Transpose.ROTATE_90)
    lying.getexif()[0x0112] = 6
    upright = model.preprocess(picture(300, 280))
    torch.testing.assert_close(model.preprocess(lying), upright, rtol=0, atol=1e-6)


# --- ONNX ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("version", [Swin, SwinV2])
@pytest.mark.parametrize("size", [32, 20, 17, 64])
def test_plain_trunk_equals_the_packed_one(version: type[Swin], size: int) -> None:
    """Padding, shifts, odd maps and zero-length queries, whatever the batch."""
    extra = {"extra_norm_every": 1} if version is SwinV2 else {}
    trunk = version(8, (2, 2, 2), (2, 4, 4), window=3, size=32, **extra).double()
    for p in trunk.parameters():
        nn.init.normal_(p, std=0.4)
    x = torch.randn(3, 3, size, size, dtype=torch.float64)
    view, regions = PlainSwin(trunk, size)(x)
    expected = trunk([x])
    torch.testing.assert_close(view, expected.view, rtol=0, atol=1e-12)
    torch.testing.assert_close(regions.flatten(0, 1), expected.regions, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["swin_t", "swinv2_t"])
def test_onnx_export_has_the_same_features_for_any_batch(tmp_path: Path, trunk: str) -> None:
    pytest.importorskip("onnxscript", reason="onnx and onnxscript are not installed (the extra `export`)")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra `export`)")
    model = {"trunk": trunk, "window": 3, "embed_dim": 8, "depths": [1, 2], "heads": [1, 2]}  # pads and shifts
    source = step_of(tmp_path, model, 32)
    convert(source, tmp_path / "onnx", "esvit-scale", "onnx")
    content = (tmp_path / "onnx" / "model.onnx").read_bytes()
    assert b".py" not in content  # paths of the machine that exported, in the stack traces of its nodes
    if trunk == "swinv2_t":
        convert(source, tmp_path / "again", "esvit-scale", "onnx")
        assert (tmp_path / "again" / "model.onnx").read_bytes() == content
    session = runtime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    for n in (1, 2, 5):
        x = images(n, 32)
        view, regions = session.run(None, {"images": x.numpy()})
        expected = features(source, x)
        torch.testing.assert_close(torch.from_numpy(view), expected[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.from_numpy(regions).flatten(0, 1), expected[1], rtol=0, atol=1e-4)


def test_missing_onnx_says_what_to_install(
    step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    out = tmp_path / "onnx"
    assert cli.main(["convert", str(step), str(out), "--from", "esvit-scale", "--to", "onnx"]) == 2
    assert "onnxscript is not installed; install it with pip install 'esvit-scale[export]'" in capsys.readouterr().err
    assert not out.exists()


# --- folders, load_backbone, torch.hub -------------------------------------------------------------------------------


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import esvit_scale, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=launcher.environment(), timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'load_backbones'"):
        _ = esvit_scale.load_backbones  # type: ignore[attr-defined]


@torch.no_grad()
def test_load_backbone_reads_every_form(step: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    state.write_weights(tmp_path / "run" / "checkpoints" / "step-00000000", weights_of(tmp_path, AT_224))
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-00000000\n")
    convert(step, tmp_path / "file.safetensors", "esvit-scale", "safetensors")
    convert(step, tmp_path / "folder", "esvit-scale", "safetensors")
    convert(step, tmp_path / "theirs.pth", "esvit-scale", "esvit")
    convert(step, tmp_path / "timm", "esvit-scale", "timm")
    convert(step, tmp_path / "hf", "esvit-scale", "huggingface")
    x = images(1)
    expected, regions = features(step, x)
    for form in ("step", "run", "file.safetensors", "folder", "theirs.pth", "timm", "hf"):
        model = esvit_scale.load_backbone(str(tmp_path / form))
        assert not model.training
        torch.testing.assert_close(model(x), expected)
        assert load_frozen_trunk(tmp_path / form).size == 224
        assert (model.dim, model.size) == (128, 224)
        torch.testing.assert_close(model.regions(x).permute(0, 2, 3, 1).flatten(0, 2), regions)
        assert [m.shape[1] for m in model.pyramid(x)] == model.channels == [16, 32, 64, 128]
        assert len(list(model.parameters())) == len(list(model.trunk.parameters()))
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["name"] == "swans"
    assert (tmp_path / "folder" / "model.safetensors").stat().st_mode & 0o777 == (
        tmp_path / "folder" / "README.md"
    ).stat().st_mode & 0o777


def test_preprocess_equals_the_evaluation_transform(step: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (250, 300, 3), dtype=np.uint8)
    model = esvit_scale.load_backbone(step)
    found = model.preprocess(Image.fromarray(pixels))
    cropped = torch.from_numpy(stream.centre_crop(Image.fromarray(pixels), 224).copy()).double() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(found.double(), (cropped - mean) / std, rtol=0, atol=1e-6)


@torch.no_grad()
def test_torch_hub_loads_backbone_and_trunk(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = str(launcher.REPOSITORY)
    model = torch.hub.load(repository, "backbone", str(step), source="local")
    x = images(1)
    torch.testing.assert_close(model(x), features(step, x)[0])
    untrained = torch.hub.load(repository, "trunk", "demo", source="local")
    assert untrained(images(1, 64)).shape == (1, untrained.dim)


def test_model_card_states_the_runs_own_pixels(tmp_path: Path) -> None:
    own = {"channels": 4, "bits": 16, "mean": [0.1, 0.2, 0.3, 0.4], "std": [0.5, 0.5, 0.25, 0.125]}
    weights = weights_of(tmp_path / "set", AT_224)
    data = weights.config.data
    card = export.model_card.text(weights, "teacher", "safetensors", tmp_path, "w")
    assert "RGB, short side" in card
    assert "divided by 255, then mean (0.485, 0.456, 0.406) and standard deviation (0.229, 0.224, 0.225)" in card
    config = weights.config.model_copy(update={"data": data.model_copy(update=own)})
    card = export.model_card.text(weights._replace(config=config), "teacher", "safetensors", tmp_path, "w")
    assert "4 channels of 16 bits, short side" in card
    assert "divided by 65535, then mean (0.1, 0.2, 0.3, 0.4) and standard deviation (0.5, 0.5, 0.25, 0.125)" in card
    assert "[B, 4, H, W]" in card


def test_model_card_is_filled_from_the_run(tmp_path: Path) -> None:
    weights = weights_of(tmp_path / "my-shards", AT_224)
    run = tmp_path / "run"
    state.write_weights(run / "checkpoints" / "step-00000000", weights)
    (run / "checkpoints" / "latest").write_text("step-00000000\n")
    (run / "config.yaml").write_text(configs.dump(weights.config))
    (run / "summary.json").write_text(json.dumps({"images_seen": 123456}))
    (run / "knn").mkdir()
    knn = {"results": {"10": {"top1": 61.25, "interval": [60.0, 62.5]}, "20": {"top1": 64.0}}, "step": 9}
    (run / "knn" / "knn.json").write_text(json.dumps({**knn, "train": "/x/tr", "test": "/x/va"}))
    results = {
        "official": {"top1": 70.04, "interval": [65.0, 75.0], "top5": 90.0},
        "logistic": {"top1": 71.5, "interval": [66.0, 76.0]},
    }
    sets = {"step": 9, "train": "/x/tr", "test": "/x/va", "data": "/x/va"}
    (run / "linear").mkdir()
    (run / "linear" / "linear.json").write_text(json.dumps({**sets, "fraction": 1.0, "results": results}))
    (run / "linear" / "linear_1percent.json").write_text(json.dumps({**sets, "fraction": 0.01, "results": results}))
    measure = {"top_accuracy": 91.0, "top_distance_px": 9.0, "accuracy": 50.0, "distance_px": 30.0, "chance": 2.04}
    measures = {"mirrored": measure, "cropped": {}, "stereo": measure | {"chance": 0.4}}
    (run / "look" / "deep").mkdir(parents=True)
    (run / "look" / "deep" / "correspondence.json").write_text(json.dumps({**sets, "measures": measures}))
    pets = {"metric": "mean_per_class", "score": 80.25, "interval": [79.0, 81.0]}
    (run / "transfer.json").write_text(json.dumps({**sets, "mean": 80.25, "datasets": {"pets": pets}, "failed": {}}))
    (run / "broken.json").write_text("{")
    (run / "linear" / "linear-damaged.json").write_text('{"step": 9')
    (run / "linear" / "linear-of-others.json").write_text("[1]")
    rows = (
        "| k-NN, k = 10, step 9 | 61.2 % (60.0 – 62.5) | tr → va |",
        "| linear probe, official, step 9 | 70.0 % (65.0 – 75.0) | tr → va |",
        "| linear probe, logistic, step 9 | 71.5 % (66.0 – 76.0) | tr → va |",
        "| linear probe, official, 1 % of the labels, step 9 | 70.0 % (65.0 – 75.0) | tr → va |",
        "| transfer, mean, step 9 | 80.2 % | 1 data sets |",
        "| transfer, mean_per_class, step 9 | 80.2 % (79.0 – 81.0) | pets |",
        "| correspondence, mirrored, 10 most similar, step 9 | 91.0 % (chance 2.0 %) | va |",
        "| correspondence, stereo, all, step 9 | 50.0 % (chance 0.4 %) | stereo_motorcycle |",
    )
    for form in ("timm", "huggingface", "safetensors"):
        convert(run, tmp_path / form, "esvit-scale", form)
        card = (tmp_path / form / "README.md").read_text()
        for words in ("# swans", "swin_t", "123,456", "my-shards", "centre crop of 224", *rows):
            assert words in card, words
        assert card.count("| correspondence") == 4
        assert "{" not in card.replace('{"images"', "")
        code = card.split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")
    convert(run / "checkpoints" / "step-00000000", tmp_path / "of step", "esvit-scale", "safetensors")
    assert all(row in (tmp_path / "of step" / "README.md").read_text() for row in rows)
    converted = theirs.save(tmp_path / "official.pth")
    convert(converted, tmp_path / "folder", "esvit", "safetensors")
    assert "does not say how it was trained" in (tmp_path / "folder" / "README.md").read_text()


# --- what cannot be exported -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "size", "form", "match"),
    [
        (
            {**AT_224, "trunk": "swinv2_h"},
            224,
            "timm",
            "timm has no swinv2_h .its extra norms.; use --to safetensors or onnx",
        ),
        (AT_224, 96, "timm", r"at 96 pixels, stage 1 pads its windows of 7, which timm does otherwise"),
        (AT_224 | {"window": 14}, 224, "huggingface", r"stage 4 \(7×7\) is smaller than the window 14.*--to timm"),
        ({**AT_224, "trunk": "swinv2_t"}, 224, "esvit", "official code has no trunk swinv2_t"),
    ],
)
def test_trunk_that_a_form_cannot_hold_is_refused(
    tmp_path: Path, model: dict, size: int, form: str, match: str
) -> None:
    source = step_of(tmp_path, model, size)
    with pytest.raises(UserError, match=match) as error:
        convert(source, tmp_path / "out", "esvit-scale", form)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*partial"))


def test_contradictory_arguments_are_refused(step: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--to onnx writes a folder; nearest: .*swan$"):
        convert(step, tmp_path / "swan.onnx", "esvit-scale", "onnx")
    with pytest.raises(UserError, match="--heads: --to timm holds only a trunk"):
        convert(step, tmp_path / "x", "esvit-scale", "timm", heads=True)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert(step, tmp_path / "there", "esvit-scale", "timm")
    with pytest.raises(UserError, match="no such checkpoint"):
        esvit_scale.load_backbone(tmp_path / "nothing")


def test_folder_that_cannot_be_read_back_is_an_error(step: Path, tmp_path: Path) -> None:
    convert(step, tmp_path / "timm", "esvit-scale", "timm")
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "model.onnx").write_bytes(b"")
    with pytest.raises(UserError, match="graph: holds an ONNX graph, which cannot be read back; give the run"):
        esvit_scale.load_backbone(tmp_path / "graph")
    with pytest.raises(UserError, match="there: not a checkpoint"):
        esvit_scale.load_backbone(Path(tmp_path / "there").mkdir() or tmp_path / "there")
    origin = tmp_path / "timm" / "esvit_scale.json"
    for text, match in (
        ("{", "damaged"),
        ("[]", "damaged: it lacks config"),
    ):
        origin.write_text(text)
        with pytest.raises(UserError, match=match) as error:
            esvit_scale.load_backbone(tmp_path / "timm")
        assert "\n" not in str(error.value)
    origin.unlink()
    with pytest.raises(UserError, match=r"it has no esvit_scale.json\); if it holds a trunk of"):
        convert(tmp_path / "timm", tmp_path / "out", "esvit-scale", "safetensors")
    (tmp_path / "timm" / "model.safetensors").write_text("<html>")
    with pytest.raises(UserError, match="not weights but an HTML page"):
        esvit_scale.load_backbone(tmp_path / "timm")


def test_exports_are_reproducible_with_default_permissions(tmp_path: Path) -> None:
    """safetensors writes metadata in an order of chance, and files that their owner alone may read; torch writes the
    name of the file into it."""
    weights = weights_of(tmp_path, AT_224)
    (tmp_path / "usual").touch()
    seen: dict[str, set[bytes]] = {}
    for i in range(4):  # four entries in one order four times by chance: 1 in 13,824
        folder = tmp_path / str(i)
        safetensors_file.write(folder / "x.safetensors", weights, "teacher")
        official.write(folder / f"official{i}.pth", weights)
        for form in ("safetensors", "timm", "huggingface"):
            export.write(folder / form, weights, "teacher", form, tmp_path)
        for path in (p for p in folder.rglob("*") if p.is_file()):
            name = str(path.relative_to(folder)).replace(f"official{i}", "official")
            seen.setdefault(name, set()).add(path.read_bytes())
            assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode, path
    assert len(seen) == 14
    assert all(len(contents) == 1 for contents in seen.values()), {n for n, found in seen.items() if len(found) > 1}


def test_failed_export_leaves_no_files(step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.model_card, "text", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(step, tmp_path / "out", "esvit-scale", "timm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step"]
