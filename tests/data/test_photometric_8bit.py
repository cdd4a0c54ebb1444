"""The workers' 8-bit operations against the batched float ones, and through the stream."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from esvit_scale.data import photometric, photometric_8bit
from esvit_scale.data.crops import keyed_generator
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.stream import batches
from esvit_scale.errors import UserError
from tests.data.conftest import config_with, picture
from tests.data.test_photometric import drawn, unit

pytest.importorskip("cv2")


@pytest.mark.parametrize("crop", [0, 1, 2])
def test_values_equal_the_device_path_up_to_rounding(crop: int) -> None:
    x = torch.from_numpy(np.stack([np.asarray(picture(i, 32, 32)) for i in range(60)])).permute(0, 3, 1, 2)
    expected = unit(photometric.apply(x, drawn(60, crop))).permute(0, 2, 3, 1).numpy() * 255
    errors = []
    for i in range(60):
        draw = photometric.draw_params(keyed_generator(0, 0, str(i), crop), photometric.ESVIT[min(crop, 2)])
        pixels = x[i].permute(1, 2, 0).numpy().copy()
        photometric_8bit.apply(pixels, draw)
        if not draw.solarize:  # a rounding at the threshold inverts a pixel
            errors.append(np.abs(pixels - expected[i]).mean())
    assert max(errors) < 3
    assert np.mean(errors) < 1


@pytest.mark.parametrize("radius", [0.1, 0.5, 0.99, 1.0, 1.4, 2.0])
def test_blur_equals_pillow_three_boxes(radius: float) -> None:
    """A Gaussian of the same radius is up to 34 levels away from them."""
    taps = photometric_8bit.box_taps(radius)
    np.testing.assert_allclose(
        taps, [w for w in photometric.box_taps(torch.tensor([radius]))[0].tolist() if w][-len(taps) :], atol=1e-6
    )
    checkers = np.repeat((np.indices((48, 40)).sum(0) % 2 * 255)[:, :, None], 3, 2)
    for pixels in (np.asarray(picture(0, 40, 48)), np.random.default_rng(0).integers(0, 256, (48, 40, 3)), checkers):
        image = Image.fromarray(pixels.astype(np.uint8))
        out = np.array(image)
        photometric_8bit.apply(out, photometric_8bit.IDENTITY._replace(radius=radius))
        error = np.abs(out.astype(int) - np.asarray(image.filter(ImageFilter.GaussianBlur(radius))))
        assert error.max() <= 3
        assert error.mean() < 1.1


def test_solarisation_is_exact() -> None:
    ramp = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    out = ramp.copy()
    photometric_8bit.apply(out, photometric_8bit.IDENTITY._replace(solarize=True))
    np.testing.assert_array_equal(out, np.where(ramp >= 128, 255 - ramp, ramp))
    photometric_8bit.apply(ramp, photometric_8bit.IDENTITY)
    assert ramp[0, 1, 0] == 1


def test_with_photometric_workers_the_device_only_normalises(shard_set: Manifest) -> None:
    config = config_with()
    there = config.model_copy(update={"data": config.data.model_copy(update={"photometric": "workers"})})
    (a,), (b,) = (list(batches(c, shard_set, 0, 1, 2, 3)) for c in (config, there))
    assert a.keys == b.keys
    assert (b.photometric.order == -1).all()
    assert not b.photometric.radius.any()
    for n, (before, after) in enumerate(zip(a.crops, b.crops, strict=True)):
        first = sum(len(c) for c in a.crops[:n])
        fields = a.photometric.crops(first, first + len(before))
        expected = unit(photometric.apply(before.flatten(0, 1), fields)) * 255
        error = (after.flatten(0, 1) - expected).abs().mean((1, 2, 3))[~fields.solarize]
        assert error.mean() < 1.5
        assert not torch.equal(before, after)


def test_missing_opencv_error_names_the_extra(shard_set: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photometric_8bit, "cv2", None)
    config = config_with()
    there = config.model_copy(update={"data": config.data.model_copy(update={"photometric": "workers"})})
    with pytest.raises(UserError, match=r"pip install 'esvit-scale\[opencv\]'"):
        batches(there, shard_set, 0, 1, 0, 1)
