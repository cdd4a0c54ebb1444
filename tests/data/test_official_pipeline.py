"""The whole input pipeline against the official one, rebuilt from torchvision's transforms: statistics of what the
trunk sees, crop by crop."""

import io
import random

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms as T

from esvit_scale.config import validate
from esvit_scale.data import photometric
from esvit_scale.data.worker_batch import DecodedSample, decode_for_crops, make_worker_batch
from tests.data.conftest import encoded

SIZE, LOCAL, N = 48, 24, 240  # crops' sides; draws a picture


def official(crop: int) -> T.Compose:
    """The official DataAugmentationDINO for crop 0 and 1 (globals) and 2 (local)."""
    scale = (0.4, 1.0) if crop < 2 else (0.05, 0.4)

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    steps = [
        T.RandomResizedCrop(SIZE if crop < 2 else LOCAL, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
        T.RandomHorizontalFlip(0.5),
        T.RandomApply([T.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8),
        T.RandomGrayscale(p=0.2),
        T.RandomApply([T.Lambda(blur)], p=(1.0, 0.1, 0.5)[crop]),
    ]
    if crop == 1:
        steps.append(T.RandomApply([T.Lambda(ImageOps.solarize)], p=0.2))
    return T.Compose([*steps, T.ToTensor(), T.Normalize(photometric.MEAN, photometric.STD)])


def features(x: torch.Tensor) -> np.ndarray:
    """[N, 3, S, S] → [N, 13]: channel means and deviations, left against right, top against bottom, detail, grey."""
    half = x.shape[-1] // 2
    columns = [
        x.mean((2, 3)),
        x.std((2, 3)),
        (x[..., :half] - x[..., half:]).mean((2, 3)),
        (x[:, :, :half] - x[:, :, half:]).mean((1, 2, 3))[:, None],
        (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))[:, None],
        (x - x.mean(1, keepdim=True)).abs().mean((1, 2, 3))[:, None],
        (x[:, 0] * photometric.STD[0] + photometric.MEAN[0] > 0.5).float().mean((1, 2))[:, None],
    ]
    return torch.cat(columns, 1).numpy()


@pytest.mark.parametrize("where", ["device", "workers"])
def test_augmented_crops_are_distributed_as_in_official_pipeline(where: str) -> None:
    if where == "workers":
        pytest.importorskip("cv2")
    data = encoded(Image.fromarray(skimage.data.astronaut()).resize((150, 110)), "JPEG", quality=95)
    config = validate(
        {
            "data": {
                "photometric": where,
                "global_crops": {"size": SIZE},
                "local_crops": [{"size": LOCAL, "count": 1}],
            }
        },
        "test",
    )
    samples = [DecodedSample(i, str(i), -1, *decode_for_crops(config, 0, str(i), data), []) for i in range(N)]
    part = make_worker_batch(config, 0, samples, N)
    params = photometric.BatchAugmentationParams(*map(torch.from_numpy, part.photometric))
    pixels = [part.crops[0][0], part.crops[0][1], part.crops[1][0]]
    random.seed(0)
    torch.manual_seed(0)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    for crop in range(3):
        ours = features(photometric.apply(pixels[crop].permute(0, 3, 1, 2), params.crops(crop, crop + 1)))
        theirs = features(torch.stack([official(crop)(image) for _ in range(N)]))
        error = np.sqrt(ours.var(0) / N + theirs.var(0) / N)
        assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4.5 * error).all(), (crop, ours.mean(0), theirs.mean(0), error)
        spread = np.log(ours.std(0) / theirs.std(0))
        assert (np.abs(spread) < 0.35).all(), (crop, spread)  # a deviation of N draws is good to 1/√(2N), 5 %
