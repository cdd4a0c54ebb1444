"""Each operation against torchvision's on float tensors, the whole against the official Pillow pipeline, the rates."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter, ImageOps

from esvit_scale.data import photometric
from esvit_scale.data.crops import keyed_generator
from tests.data.conftest import picture


def images(n: int = 6, size: int = 24) -> torch.Tensor:
    """uint8 [n, 3, size, size]: smooth pictures, noise, and black, white and grey."""
    smooth = [np.asarray(picture(i, size, size)) for i in range(n - 3)]
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    stack = np.stack([*smooth, noise, np.zeros_like(noise), np.full_like(noise, 255)])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous()


def params(n: int, **fields: torch.Tensor) -> photometric.BatchAugmentationParams:
    none = photometric.BatchAugmentationParams(
        order=torch.full((n,), -1),
        factors=torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(n, 1),
        grayscale=torch.zeros(n, dtype=torch.bool),
        radius=torch.zeros(n),
        solarize=torch.zeros(n, dtype=torch.bool),
    )
    return none._replace(**fields)


def unit(x: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation."""
    return x * torch.tensor(photometric.STD).view(3, 1, 1) + torch.tensor(photometric.MEAN).view(3, 1, 1)


def test_no_operations_equals_torchvision_normalize() -> None:
    x = images()
    expected = F.normalize(x.float() / 255, photometric.MEAN, photometric.STD)
    torch.testing.assert_close(photometric.apply(x, params(6)), expected, atol=1e-6, rtol=1e-6)


OPERATIONS = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]


@pytest.mark.parametrize("order", range(24))
def test_colour_jitter_equals_torchvision_in_every_order(order: int) -> None:
    """To 2e-3: torchvision's grey weighs red by .2989, Pillow's and ours by .299. Rows have their own factors."""
    x = images()
    factors = torch.tensor([[0.6, 0.7, 0.8, -0.1], [1.4, 1.3, 1.2, 0.1], [1.1, 0.6, 1.2, 0.05]]).repeat(2, 1)
    ours = unit(photometric.apply(x, params(6, order=torch.full((6,), order), factors=factors)))
    for i in range(6):
        expected = x[i].float() / 255
        for operation in photometric.ORDERS[order]:
            expected = OPERATIONS[operation](expected, float(factors[i, operation]))
        torch.testing.assert_close(ours[i], expected, atol=2e-3, rtol=0)


def test_jitter_orders_are_all_permutations() -> None:
    assert set(photometric.ORDERS) == set(itertools.permutations(range(4)))


def test_grayscale_and_solarize_equal_pillow() -> None:
    x = images()
    every = torch.ones(6, dtype=torch.bool)
    grey = unit(photometric.apply(x, params(6, grayscale=every))) * 255
    inverted = unit(photometric.apply(x, params(6, solarize=every))) * 255
    for i in range(6):
        image = Image.fromarray(x[i].permute(1, 2, 0).numpy())
        np.testing.assert_allclose(grey[i, 0], np.asarray(image.convert("L")), atol=0.6)
        assert (grey[i, 0] - grey[i, 2]).abs().max() < 1e-3
        np.testing.assert_allclose(inverted[i].permute(1, 2, 0), np.asarray(ImageOps.solarize(image)), atol=1e-3)


@pytest.mark.parametrize("size", [6, 24, 64])
def test_blur_equals_pillow(size: int) -> None:
    """To 3/255 at worst on noise (Pillow rounds after each of six passes) and .7/255 on average; borders too."""
    radii = torch.tensor([0.1, 0.3, 0.8, 1.2, 1.6, 2.0])
    x = images(6, size)
    ours = unit(photometric.apply(x, params(6, radius=radii))) * 255
    for shift in range(6):  # every picture with every radius
        rolled = x.roll(shift, 0)
        ours = unit(photometric.apply(rolled, params(6, radius=radii))) * 255
        for i in range(6):
            image = Image.fromarray(rolled[i].permute(1, 2, 0).numpy())
            expected = np.asarray(image.filter(ImageFilter.GaussianBlur(float(radii[i])))).astype(float)
            error = np.abs(ours[i].permute(1, 2, 0).numpy() - expected)
            assert error.max() < 3.2
            assert error.mean() < 1.2


def test_blur_keeps_the_mean_level_and_spreads_by_the_radius() -> None:
    matrix = photometric.blur_matrices(torch.tensor([0.5, 1.0, 2.0]), 31).double()
    torch.testing.assert_close(matrix.sum(2), torch.ones(3, 31, dtype=torch.double), atol=1e-5, rtol=0)
    offsets = torch.arange(31).double() - 15
    variance = (matrix[:, 15] * offsets**2).sum(1)
    torch.testing.assert_close(variance.sqrt(), torch.tensor([0.5, 1.0, 2.0]).double(), atol=1e-4, rtol=0)


def official(image: Image.Image, p: photometric.BatchAugmentationParams, i: int) -> np.ndarray:
    """The official pipeline in Pillow with given parameters: [S, S, 3], 0..255."""
    if p.order[i] >= 0:
        for operation in photometric.ORDERS[p.order[i]]:
            image = OPERATIONS[operation](image, float(p.factors[i, operation]))
    if p.grayscale[i]:
        image = F.to_grayscale(image, 3)
    if p.radius[i] > 0:
        image = image.filter(ImageFilter.GaussianBlur(float(p.radius[i])))
    if p.solarize[i]:
        image = ImageOps.solarize(image)
    return np.asarray(image).astype(float)


def drawn(n: int, crop: int, seed: int = 0) -> photometric.BatchAugmentationParams:
    return photometric.stack(
        [
            [
                photometric.draw_params(keyed_generator(seed, 0, str(i), crop), photometric.ESVIT[min(crop, 2)])
                for i in range(n)
            ]
        ]
    ).crops(0, 1)


@pytest.mark.parametrize("crop", [0, 1, 2])
def test_pipeline_equals_the_official_pillow_pipeline(crop: int) -> None:
    """Within Pillow's rounding: 1.5/255 on average over an image."""
    x = torch.from_numpy(np.stack([np.asarray(picture(i, 32, 32)) for i in range(48)])).permute(0, 3, 1, 2).contiguous()
    p = drawn(48, crop)
    ours = unit(photometric.apply(x, p)).permute(0, 2, 3, 1).numpy() * 255
    errors = []
    for i in range(48):
        if p.solarize[i]:
            continue  # a rounding at the threshold inverts a pixel
        errors.append(np.abs(ours[i] - official(Image.fromarray(x[i].permute(1, 2, 0).numpy()), p, i)).mean())
    assert max(errors) < 3
    assert np.mean(errors) < 1.5


def test_crops_of_a_batch_do_not_affect_each_other() -> None:
    x, p = images(), drawn(6, 1)
    together = photometric.apply(x, p)
    for i in range(6):
        alone = photometric.apply(x[i : i + 1], photometric.BatchAugmentationParams(*(field[i : i + 1] for field in p)))
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)
    assert torch.equal(photometric.apply(x, p), together)


def within(share: float, rate: float, n: int) -> bool:
    return abs(share - rate) < 4.5 * np.sqrt(rate * (1 - rate) / n) + 1e-9


@pytest.mark.parametrize(("crop", "blur", "solarize"), [(0, 1.0, 0.0), (1, 0.1, 0.2), (2, 0.5, 0.0), (9, 0.5, 0.0)])
def test_rates_and_ranges_match_the_recipe(crop: int, blur: float, solarize: float) -> None:
    n = 4000
    p = drawn(n, crop)
    jittered = p.order >= 0
    assert within(jittered.float().mean().item(), 0.8, n)
    assert within(p.grayscale.float().mean().item(), 0.2, n)
    assert within((p.radius > 0).float().mean().item(), blur, n)
    assert within(p.solarize.float().mean().item(), solarize, n)
    orders = Counter(p.order[jittered].tolist())
    assert all(within(orders[o] / int(jittered.sum()), 1 / 24, int(jittered.sum())) for o in range(24))
    for column, (centre, reach) in enumerate([(1, 0.4), (1, 0.4), (1, 0.2), (0, 0.1)]):
        values = p.factors[:, column]
        assert values.min() >= centre - reach - 1e-6
        assert values.max() <= centre + reach + 1e-6
        assert abs(values.mean().item() - centre) < 4.5 * reach / np.sqrt(3 * n)
        assert abs(values.std().item() - reach / np.sqrt(3)) < 0.03 * reach
    radii = p.radius[p.radius > 0]
    assert 0.1 <= radii.min() < 0.15
    assert 1.9 < radii.max() <= 2.0
    assert abs(radii.mean().item() - 1.05) < 4.5 * 0.55 / np.sqrt(len(radii))


def test_draws_of_fields_are_independent() -> None:
    p = drawn(4000, 1)
    columns = [p.order >= 0, *p.factors.T, p.grayscale, p.radius > 0, p.solarize]
    correlation = np.corrcoef(np.stack([np.asarray(c, dtype=float) for c in columns]))
    assert np.abs(correlation - np.eye(len(columns))).max() < 0.075


def test_flattened_parameters_match_flattened_crops() -> None:
    p = photometric.stack(
        [
            [
                photometric.draw_params(keyed_generator(0, 0, f"{v}/{b}", v), photometric.ESVIT[min(v, 2)])
                for b in range(3)
            ]
            for v in range(4)
        ]
    )
    assert p.order.shape == (4, 3)
    assert p.factors.shape == (4, 3, 4)
    flat = p.crops(1, 3)
    assert flat.factors.shape == (6, 4)
    assert torch.equal(flat.factors[4], p.factors[2, 1])


def test_demo_batch_takes_well_under_100_ms() -> None:
    """64 images of 2 × 64² + 4 × 32²: 20-30 ms on one idle core; the limit allows for a busy machine."""
    sizes = [(64, 2), (32, 4)]
    crops = [torch.randint(0, 256, (n * 64, 3, s, s), dtype=torch.uint8) for s, n in sizes]
    p = [
        photometric.concatenate([drawn(64, v) for v in range(2)], 0),
        photometric.concatenate([drawn(64, v) for v in range(2, 6)], 0),
    ]

    def seconds() -> float:
        start = time.process_time()
        for c, q in zip(crops, p, strict=True):
            photometric.apply(c, q)
        return time.process_time() - start

    assert min(seconds() for _ in range(8)) < 0.2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_gives_the_same_values() -> None:
    x, p = images(), drawn(6, 1)
    torch.testing.assert_close(photometric.apply(x.cuda(), p).cpu(), photometric.apply(x, p), atol=1e-4, rtol=1e-4)
