"""Images of 1 to 16 channels and 16 bits: TIFF and `.npy`, from files to batches, features and pictures."""

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from esvit_scale import cli
from esvit_scale.config import Config, validate
from esvit_scale.data import manifest as manifests
from esvit_scale.data import photometric, raster, shard_stats
from esvit_scale.data.bad_image import BadImage
from esvit_scale.data.decode import decode, decode_as_stored
from esvit_scale.data.evaluation import evaluation_batches
from esvit_scale.data.evaluation_crop import centre_crop
from esvit_scale.data.pixel_format import PixelFormat, pixel_format
from esvit_scale.data.stream import batches, open_data
from esvit_scale.data.worker_batch import place_crops
from esvit_scale.errors import UserError
from esvit_scale.models.registry import TRUNKS, build_trunk
from tests.data.conftest import encoded, picture

tifffile = pytest.importorskip("tifffile")

CHANNELS = 13
STATISTICS = {"mean": [0.3] * CHANNELS, "std": [0.1] * CHANNELS}


def bands(seed: int, channels: int = CHANNELS, bits: int = 16, height: int = 24, width: int = 30) -> np.ndarray:
    """[H, W, C], smooth and of another level in each channel."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    level, slope = rng.uniform(0.2, 0.4, channels), rng.uniform(0, 0.01, (2, channels))
    values = level + y[..., None] * slope[0] + x[..., None] * slope[1]
    return (values * ((1 << bits) - 1)).astype(np.uint16 if bits == 16 else np.uint8)


def tiff(pixels: np.ndarray, kind: str = "contig") -> bytes:
    out = io.BytesIO()
    if kind == "pages":
        tifffile.imwrite(out, np.moveaxis(pixels, 2, 0), photometric="minisblack")
    elif kind == "contig":
        tifffile.imwrite(out, pixels, photometric="minisblack", planarconfig="contig" if pixels.shape[2] > 1 else None)
    else:
        more: dict[str, Any] = {"compression": "zlib", "predictor": 2, "tile": (16, 16)} if kind == "tiles" else {}
        order = "separate" if pixels.shape[2] > 1 else None
        tifffile.imwrite(out, np.moveaxis(pixels, 2, 0), photometric="minisblack", planarconfig=order, **more)
    return out.getvalue()


def npy(array: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 2, 4, 13, 16])
@pytest.mark.parametrize(
    "kind", ["contig", "planar", "tiles", "pages", "npy", "npy, channels first", "npy, big-endian"]
)
def test_every_layout_gives_the_stored_values(kind: str, channels: int, bits: int) -> None:
    pixels = bands(0, channels, bits)
    if kind == "npy":
        data = npy(np.asfortranarray(pixels))
    elif kind.startswith("npy"):
        data = npy(np.moveaxis(pixels, 2, 0) if "first" in kind else pixels.astype(pixels.dtype.newbyteorder(">")))
    else:
        data = tiff(pixels, kind)
    found = decode_as_stored(data, channels, bits)
    assert found.dtype == pixels.dtype
    np.testing.assert_array_equal(found, pixels)


def test_pixels_read_by_pillow_keep_stored_values() -> None:
    grey = bands(0, 1)[:, :, 0]
    np.testing.assert_array_equal(decode_as_stored(encoded(Image.fromarray(grey)), 1, 16)[:, :, 0], grey)
    rgba = picture(0).convert("RGBA")
    np.testing.assert_array_equal(decode_as_stored(encoded(rgba), 4, 8), np.asarray(rgba))
    np.testing.assert_array_equal(
        decode_as_stored(encoded(picture(0).convert("L"), "BMP"), 1, 8)[:, :, 0], np.asarray(picture(0).convert("L"))
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_as_stored(encoded(picture(0).convert("L"), exif=exif), 1, 8)
    np.testing.assert_array_equal(turned[:, :, 0], np.asarray(picture(0).convert("L")).T[:, ::-1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_orientation_is_undone_for_all_bands(orientation: int) -> None:
    stored = bands(0)
    out = io.BytesIO()
    tifffile.imwrite(
        out, stored, photometric="minisblack", planarconfig="contig", extratags=[(274, 3, 1, orientation, True)]
    )
    upright = stored.transpose(1, 0, 2) if orientation > 4 else stored
    upright = upright[::-1] if orientation in (3, 4, 7, 8) else upright
    upright = upright[:, ::-1] if orientation in (2, 3, 6, 7) else upright
    np.testing.assert_array_equal(decode_as_stored(out.getvalue(), CHANNELS, 16), upright)


def huge_npy() -> bytes:
    """A header that asks for 2.6 TB, and no pixels."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": "<u2", "fortran_order": False, "shape": (100_000, 1_000_000, 13)}
    )
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(bands(0, 4)), "4 channels of 16 bits, not 13 of 16"),
        (tiff(bands(0, 13, 8)), "13 channels of 8 bits, not 13 of 16"),
        (encoded(picture(0)), "3 channels of 8 bits, not 13 of 16"),
        (tiff(bands(0).astype(np.float32)), "float32 pixels"),
        (tiff(bands(0).astype(np.int16)), "int16 pixels"),
        (npy(bands(0).astype(np.float64)), "float64 pixels"),
        (npy(np.zeros((20, 20, 40), np.uint16)), "neither its last nor its first axis"),
        (npy(np.zeros(512, np.uint16)), r"shape \[512\]"),
        (npy(bands(0))[:-9], "truncated"),
        (npy(bands(0))[:40], "."),
        (tiff(bands(0))[:5000], "."),
        (huge_npy(), "over the limit"),
        (npy(np.array([{"a": 1}], object), allow_pickle=True), "."),
        (npy(np.zeros((2, 30, 13), np.uint16)), "shorter side is under"),
    ],
)
def test_unusable_arrays_name_their_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as error:
        decode_as_stored(data, CHANNELS, 16)
    assert "\n" not in str(error.value)


def test_mutated_files_are_bad_images_or_arrays() -> None:
    rng = np.random.default_rng(0)
    originals = [tiff(bands(0), kind) for kind in ("contig", "tiles", "pages")] + [npy(bands(0))]
    bad = 0
    for i in range(300):
        data = bytearray(originals[i % 4])
        for at in rng.integers(0, min(len(data), 600), 4):
            data[at] = rng.integers(0, 256)
        try:
            assert (
                decode_as_stored(bytes(data[: rng.integers(1, len(data) + 1)] if i % 3 == 0 else data), 13, 16).shape[2]
                == 13
            )
        except BadImage:
            bad += 1
    assert 100 < bad < 300


def test_colour_arrays_decode_as_rgb() -> None:
    rgb = np.asarray(picture(0))
    np.testing.assert_array_equal(np.asarray(decode(npy(rgb))), rgb)
    np.testing.assert_array_equal(np.asarray(decode(npy(np.moveaxis(rgb, 2, 0)))), rgb)
    with pytest.raises(BadImage, match="13 channels of 16 bits, not 3 of 8"):
        decode(tiff(bands(0), "tiles"))  # Pillow opens it, as grey


# --- sets and batches ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images of 13 channels and 16 bits in two classes, and one of 4 channels."""
    root = tmp_path_factory.mktemp("tiles")
    for i in range(20):
        path = root / "ab"[i % 2] / f"t{i:02d}.tif"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(tiff(bands(i), ["contig", "planar", "tiles", "tiles"][i % 4]))
    (root / "a" / "wrong.tif").write_bytes(tiff(bands(0, 4)))
    return root


@pytest.fixture(scope="module")
def tile_set(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> manifests.Manifest:
    destination = tmp_path_factory.mktemp("sets") / "set"
    options = ["--channels", "13", "--bits", "16", "--samples-per-shard", "7", "--workers", "1"]
    assert cli.main(["shards", "create", str(folder), str(destination), *options]) == 0
    return manifests.load(destination)


def config_of(train: Path | str, **data: Any) -> Config:
    crops = {"global_crops": {"size": 12}, "local_crops": [{"size": 8, "count": 2}]}
    section = {"train": str(train), "workers": 0, "channels": CHANNELS, "bits": 16, **STATISTICS, **crops, **data}
    return validate({"data": section, "train": {"global_batch": 4}}, "test")


def test_manifest_records_pixel_format_and_others_are_quarantined(
    tile_set: manifests.Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (tile_set.samples, tile_set.channels, tile_set.bits) == (20, 13, 16)
    (row,) = [json.loads(line) for line in (tile_set.root / "quarantine.jsonl").read_text().splitlines()]
    assert row["file"] == "a/wrong.tif"
    assert row["reason"] == "4 channels of 16 bits, not 13 of 16 (channels 4 and bits 16 would fit)"
    assert cli.main(["shards", "verify", str(tile_set.root), "--workers", "1"]) == 0
    assert (
        cli.main(
            [
                "shards",
                "split",
                str(tile_set.root),
                str(tile_set.root.parent / "parts"),
                "--val-fraction",
                "0.3",
                "--workers",
                "1",
            ]
        )
        == 0
    )
    assert manifests.load(tile_set.root.parent / "parts" / "val").channels == 13
    capsys.readouterr()


def test_rgb_sets_have_unchanged_manifests(shard_set: manifests.Manifest) -> None:
    raw = json.loads((shard_set.root / "manifest.json").read_bytes())
    assert "channels" not in raw
    assert (shard_set.channels, shard_set.bits) == (3, 8)


@pytest.mark.parametrize("options", [[], ["--channels", "12", "--bits", "16"], ["--channels", "13"]])
def test_error_names_fitting_options_when_no_image_fits(
    folder: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["shards", "create", str(folder / "b"), str(tmp_path / "set"), *options, "--workers", "1"]) == 2
    assert "channels 13 and bits 16 would fit" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_arrays_are_read_from_folders_and_archives(tmp_path: Path, kind: str) -> None:
    files = {f"{'ab'[i % 2]}/t{i}.npy": npy(bands(i, 4, 8)) for i in range(4)}
    source = tmp_path / "source"
    source.mkdir()
    if kind == "tar":
        with tarfile.open(source / "x.tar", "w") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    elif kind == "zip":
        with zipfile.ZipFile(source / "x.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        for name, data in files.items():
            (source / name).parent.mkdir(exist_ok=True)
            (source / name).write_bytes(data)
    create = ["shards", "create", str(source), str(tmp_path / "set"), "--workers", "1", "--channels", "4"]
    assert cli.main(create) == 0
    assert manifests.load(tmp_path / "set").samples == 4
    assert cli.main(["shards", "verify", str(tmp_path / "set"), "--workers", "1"]) == 0


def test_statistics_equal_those_of_all_pixels(tile_set: manifests.Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    found = shard_stats.gather(tile_set.root)
    pixels = np.concatenate([bands(i).reshape(-1, CHANNELS) for i in range(20)]) / 65535
    np.testing.assert_allclose(found.mean, pixels.mean(0), atol=2e-6)
    np.testing.assert_allclose(found.std, pixels.std(0), atol=2e-6)
    assert cli.main(["shards", "stats", str(tile_set.root), "--workers", "1"]) == 0
    assert f"data.mean={json.dumps(found.mean)}" in capsys.readouterr().out


def test_contact_sheet_shows_the_chosen_bands(
    tile_set: manifests.Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show = ["shards", "show", str(tile_set.root), "--count", "4", "--out", str(tmp_path / "x.png")]
    assert cli.main([*show, "--bands", "4,3,2"]) == 0
    assert Image.open(tmp_path / "x.png").width > 600
    assert cli.main([*show, "--bands", "14"]) == 2
    assert "13 channels" in capsys.readouterr().err


def test_crops_keep_sixteen_bits(tile_set: manifests.Manifest) -> None:
    config = config_of(tile_set.root)
    (batch,) = batches(config, open_data(config), 0, 1, 2, 3)
    assert [(c.dtype, tuple(c.shape)) for c in batch.crops] == [
        (torch.uint16, (2, 4, CHANNELS, 12, 12)),
        (torch.uint16, (2, 4, CHANNELS, 8, 8)),
    ]
    for b, key in enumerate(batch.keys):
        source = bands(int(key[-2:]))
        view = place_crops(config, 0, key, 30, 24)[0]
        left, top, right, bottom = view.box
        x = torch.from_numpy(source[top:bottom, left:right].astype(np.float64)).permute(2, 0, 1)[None]
        expected = torch.nn.functional.interpolate(x, (12, 12), mode="bicubic", antialias=True)[0]
        expected = expected.flip(2) if view.flip else expected
        assert (batch.crops[0][0, b].double() - expected).abs().max() <= 1


def test_batches_are_equal_for_workers_ranks_and_plain_tars(tile_set: manifests.Manifest) -> None:
    config = config_of(tile_set.root)
    there = config_of(tile_set.root, workers=2)
    (one,), (two,) = (list(batches(c, open_data(c), 0, 1, 1, 2)) for c in (config, there))
    assert one.keys == two.keys
    for a, b in zip(one.crops, two.crops, strict=True):
        assert torch.equal(a.int(), b.int())
    tars = config_of(str(tile_set.root / "shard-{000000..000002}.tar"), epoch_samples=20)
    (streamed,) = batches(tars, open_data(tars), 0, 1, 0, 1)
    assert streamed.crops[0].dtype == torch.uint16


def test_augmentations_match_their_definition_for_channels() -> None:
    pixels = PixelFormat(5, 16, (0.3,) * 5, (0.1,) * 5)
    x = torch.from_numpy(np.stack([bands(i, 5, 16, 24, 24) for i in range(40)])).permute(0, 3, 1, 2)
    draws = [photometric.draw_params(np.random.default_rng(i), photometric.ESVIT[1]) for i in range(40)]
    params = photometric.stack([draws]).crops(0, 1)
    found = photometric.apply(x, params, pixels) * 0.1 + 0.3
    for i, draw in enumerate(draws):
        expected = x[i].double() / 65535
        for operation in photometric.ORDERS[draw.order] if draw.order >= 0 else ():
            if operation == 0:
                expected = (expected * draw.factors[0]).clamp(max=1)
            elif operation == 1:
                mean = expected.mean((1, 2), keepdim=True)
                expected = (mean + (expected - mean) * draw.factors[1]).clamp(0, 1)
        if draw.radius:
            matrix = photometric.blur_matrices(torch.tensor([draw.radius]), 24)[0].double()
            expected = matrix @ expected @ matrix.T
        torch.testing.assert_close(found[i].double(), expected, atol=2e-6, rtol=0)


# --- configs, evaluation, trunks ---------------------------------------------------------------------------------------


def test_config_with_wrong_pixel_format_is_an_error(tile_set: manifests.Manifest) -> None:
    with pytest.raises(
        UserError, match=r"there are no usual values for 13 channels of 16 bits; `esvit-scale shards stats"
    ):
        open_data(config_of(tile_set.root, mean=None, std=None))
    with pytest.raises(UserError, match=r"set data.channels=13 data.bits=16"):
        open_data(config_of(tile_set.root, channels=3, bits=8, mean=None, std=None))
    with pytest.raises(UserError, match=r"data.mean: 13 numbers for data.channels=4"):
        config_of(tile_set.root, channels=4)
    with pytest.raises(UserError, match=r"data.std: not set, but its pair is"):
        config_of(tile_set.root, std=None)
    with pytest.raises(UserError, match=r"workers computes 8-bit RGB, not 13 channels of 16 bits; nearest: device"):
        config_of(tile_set.root, photometric="workers")
    with pytest.raises(UserError, match=r"≤ 16"):
        config_of(tile_set.root, channels=17)
    assert pixel_format(validate({"data": {"mean": [0.5] * 3, "std": [1.0] * 3}}, "test").data).mean == (0.5,) * 3


def test_evaluation_reads_sets_and_folders_of_channels(
    tile_set: manifests.Manifest, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = pixel_format(config_of("").data)
    some = {}
    for source in (tile_set.root, folder):
        for batch in evaluation_batches(source, 14, 8, pixels=pixels):
            some |= {(source, key[2:5]): image for key, image in zip(batch.keys, batch.images, strict=True)}
    assert len(some) == 40
    assert "left out 1 bad images of 21 (first: a/wrong.tif: 4 channels of 16 bits" in caplog.text
    x = torch.from_numpy(bands(3).astype(np.float64)).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(x, (16, 20), mode="bicubic", antialias=True)[0, :, 1:15, 3:17]
    for source in (tile_set.root, folder):
        torch.testing.assert_close(some[source, "t03"].double(), (expected / 65535 - 0.3) / 0.1, atol=2e-4, rtol=0)
    with pytest.raises(UserError, match="its images have 13 channels of 16 bits"):
        next(evaluation_batches(tile_set.root, 14, 8))


def test_centre_crop_of_long_array_uses_little_memory() -> None:
    long = np.zeros((8, 65000, 2), np.uint16) + 7
    assert centre_crop(long, 14).shape == (2, 14, 14)
    assert (centre_crop(long.transpose(1, 0, 2), 14) == 7).all()


@pytest.mark.parametrize(
    "name", ["swin_t", "swinv2_t", "deit_s", "vit_s_moco", "resnet50", "cvt_s1", "vil_2262", "focal_t", "timm:resnet18"]
)
def test_every_trunk_accepts_any_number_of_channels(name: str) -> None:
    config = validate(
        {
            "model": {"trunk": name, "drop_path": 0.0},
            "data": {"channels": 5, "global_crops": {"size": 64}, "local_crops": [{"size": 64}]},
        },
        "test",
    )
    with torch.device("meta"):
        trunk = build_trunk(config)
        assert trunk.in_chans == 5
        assert trunk.patch_projection.weight.shape[1] == 5
        assert trunk([torch.zeros(2, 5, 64, 64)]).view.shape == (2, trunk.dim)


@pytest.mark.parametrize("name", ["swin_t", "swinv2_t", "deit_s", "focal_t"])
def test_channels_with_zero_weights_change_nothing(name: str) -> None:
    """A trunk of five channels, two of which have no weight, is the trunk of three."""
    model = {"trunk": name, "drop_path": 0.0, "window": 4}
    model |= {"deit_s": {"embed_dim": 12, "depths": [1], "heads": [2]}}.get(
        name, {"embed_dim": 8, "depths": [1, 1], "heads": [1, 2]} if name[:4] in ("swin", "foca") else {}
    )
    data = {"global_crops": {"size": 32}, "local_crops": [{"size": 30}]}
    three, five = (build_trunk(validate({"model": model, "data": data | {"channels": c}}, "test")) for c in (3, 5))
    torch.manual_seed(0)
    values = {n: torch.randn_like(p) * 0.1 for n, p in three.state_dict().items() if p.is_floating_point()}
    three.load_state_dict(values, strict=False)
    (projection,) = (n for n, p in five.named_parameters() if p is five.patch_projection.weight)
    weight = torch.zeros_like(five.patch_projection.weight)
    weight[:, [0, 2, 4]] = values[projection]
    five.load_state_dict(values | {projection: weight}, strict=False)
    crops = [torch.randn(2, 5, 32, 32), torch.randn(1, 5, 30, 30)]
    with torch.no_grad():
        found, expected = five.eval()(crops), three.eval()([c[:, [0, 2, 4]] for c in crops])
    torch.testing.assert_close(found.regions, expected.regions, atol=1e-5, rtol=1e-5)


def test_every_trunk_is_in_the_list() -> None:
    assert {"swin_t", "swinv2_t", "deit_s", "vit_s_moco", "resnet50", "cvt_s1", "vil_2262", "focal_t"} <= TRUNKS.keys()


def test_missing_tifffile_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raster, "tifffile", None)
    with pytest.raises(BadImage, match=r"pip install 'esvit-scale\[tiff\]'"):
        decode_as_stored(tiff(bands(0)), CHANNELS, 16)
