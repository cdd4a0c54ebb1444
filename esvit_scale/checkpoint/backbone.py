"""Pretrained weights as an ordinary torch module: `esvit_scale.load_backbone`."""

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
    """A pretrained trunk that takes a batch of images of one size, which can be any size.

    Attributes:
        trunk: the trunk itself, which takes several image sizes at once (`trunk(crops) -> Features`).
        config: the run config that it was trained with.
        dim: C, the width of its features.
        size: side in pixels of the images that evaluation uses.
        channels, reductions: width and downscaling factor of each map of `pyramid`; empty for a trunk without stages.
    """

    def __init__(self, trunk: Trunk, config: Config) -> None:
        super().__init__()
        self.trunk, self.config = trunk, config
        self.dim, self.size = trunk.dim, config.data.global_crops.size
        self.channels, self.reductions = list(trunk.channels), list(trunk.reductions)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images [B, channels, H, W] to features [B, C]: the mean of the trunk's tokens, or its class token."""
        return self.trunk([images]).view

    def regions(self, images: Tensor) -> Tensor:
        """Map normalised images [B, channels, H, W] to the trunk's last tokens, as maps [B, C, H', W']."""
        features = self.trunk([images])
        [(n, h, w)] = features.grids
        return features.regions.view(n, h, w, -1).permute(0, 3, 1, 2)

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Map normalised images [B, channels, H, W] to a map [B, C_s, H_s, W_s] of every stage s, finest first.

        Raises:
            UserError: the trunk has no stages.
        """
        return Pyramid(self.trunk)(images)

    def preprocess(self, image: Image.Image | NDArray[Any]) -> Tensor:
        """Return an image as evaluation presents it: a normalised tensor [channels, S, S], with S = `size`.

        The short side is resized to S·256/224 and the centre cropped. A PIL image is turned upright by its EXIF
        orientation, and its transparent pixels become white.

        Args:
            image: a PIL image of any mode, for a backbone trained on 8-bit RGB; otherwise an array [H, W, channels] of
                uint8 or uint16.

        Raises:
            BadImage: the pixels have no agreed range (32-bit), or the file cannot be decoded.
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
    """Return an image as evaluation takes it; raise UserError if it is not [H, W, C] in the wanted pixel format."""
    image = image[:, :, None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[2] != wanted.channels or image.dtype != wanted.dtype:
        shape = " x ".join(map(str, image.shape))
        raise UserError(f"preprocess: expected an array [H, W, C] of {wanted}; got {shape} of {image.dtype}")
    return Image.fromarray(image) if wanted.is_rgb8 else image


def load_backbone(weights: str | Path) -> Backbone:
    """Return pretrained weights as a torch module, in fp32 on the CPU and in eval mode.

    Args:
        weights: a run dir or a step folder (its teacher is used), an exported folder (safetensors, timm, huggingface), a
            .safetensors file, an official EsViT .pth, or a file of a trunk that Swin, DeiT, DINO or timm published.

    Raises:
        UserError: no such weights, damaged, or of another architecture.
    """
    trunk, config = convert.load_trunk(Path(weights).expanduser())
    return Backbone(trunk, config).eval()
