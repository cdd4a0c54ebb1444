"""Pretrained weights as one ordinary torch module: `esvit_scale.load_backbone`."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn

from esvit_scale.checkpoint import convert
from esvit_scale.config import Config
from esvit_scale.data import decode, photometric, stream
from esvit_scale.data.pixel_format import PixelFormat, pixel_format
from esvit_scale.errors import UserError
from esvit_scale.models.pyramid import Pyramid
from esvit_scale.models.trunk import Trunk


class Backbone(nn.Module):
    """A pretrained trunk that takes a batch of images of one size, any size.

    Attributes:
        trunk: the trunk itself, which takes several sizes at once (`trunk(crops) -> Features`).
        config: the run config that it was trained with.
        dim: C, the width of its features.
        size: pixels of the images that evaluation shows it.
        channels, reductions: of the maps of `pyramid`, one number a stage; empty for a trunk without stages.
    """

    def __init__(self, trunk: Trunk, config: Config) -> None:
        super().__init__()
        self.trunk, self.config = trunk, config
        self.dim, self.size = trunk.dim, config.data.global_crops.size
        self.channels, self.reductions = list(trunk.channels), list(trunk.reductions)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, channels, H, W], normalised → features [B, C]: what the trunk pools its tokens to (the mean, or a
        class token's)."""
        return self.trunk([images]).view

    def regions(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] → the trunk's last tokens as a map [B, C, H', W']."""
        features = self.trunk([images])
        [(n, h, w)] = features.grids
        return features.regions.view(n, h, w, -1).permute(0, 3, 1, 2)

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W] → a map [B, C_s, H_s, W_s] for every stage s, finest first (models/pyramid.py).

        Raises:
            UserError: a trunk without stages.
        """
        return Pyramid(self.trunk)(images)

    def preprocess(self, image: Image.Image | NDArray[Any]) -> Tensor:
        """Return an image as [channels, S, S], as evaluation shows it: short side to S·256/224, centre crop, normalised;
        a picture upright and with transparency on white.

        Args:
            image: a picture of any mode, for a backbone of 8-bit RGB; else an array [H, W, channels] of uint8 or uint16.

        Raises:
            BadImage: pixels without an agreed range (32-bit), or a file that cannot be decoded.
            UserError: an array of other channels or bits than the backbone was trained on.
        """
        wanted = pixel_format(self.config.data)
        if isinstance(image, Image.Image) and wanted.is_rgb8:
            shown: Image.Image | NDArray[Any] = decode.load(ImageOps.exif_transpose(image))
        else:
            shown = _array_of(np.asarray(image), wanted)
        pixels = torch.from_numpy(stream.centre_crop(shown, self.size).copy())
        return photometric.normalize_(photometric.unit(pixels[None], wanted), wanted)[0]


def _array_of(image: NDArray[Any], wanted: PixelFormat) -> Image.Image | NDArray[Any]:
    """Return an array [H, W, C] as evaluation takes it. Raises UserError where it is of another format."""
    image = image[:, :, None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[2] != wanted.channels or image.dtype != wanted.dtype:
        shape = " x ".join(map(str, image.shape))
        raise UserError(f"preprocess: an array [H, W, C] of {wanted} is wanted; got {shape} of {image.dtype}")
    return Image.fromarray(image) if wanted.is_rgb8 else image


def load_backbone(weights: str | Path) -> Backbone:
    """Return the backbone of a run dir, a step folder, an exported folder (safetensors, timm, huggingface), a .safetensors
    file or an official EsViT .pth; also of a trunk alone that Swin, DeiT, DINO or timm published.

    Of a run it is the EMA teacher's, in fp32 on the CPU and in eval mode; `.to("cuda")` and `.train()` as any module.

    Raises:
        UserError: no such weights, damaged, or of another architecture.
    """
    trunk, config = convert.load_trunk(Path(weights).expanduser())
    return Backbone(trunk, config).eval()
