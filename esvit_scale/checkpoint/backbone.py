"""`esvit_scale.load_backbone`, which loads pretrained weights as a torch module, and that module, `Backbone`."""

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
    """A pretrained trunk as a torch module that maps a batch of equally large images, of any size, to features.

    Attributes:
        trunk: the wrapped trunk, which takes a list of batches, one for each image size (`trunk(crops) -> Features`).
        config: config of the run that trained the trunk.
        dim: C, the width of the features.
        size: side in pixels of the evaluation crop, which `preprocess` returns.
        channels, reductions: width and downscaling factor of each map of `pyramid`; empty for a trunk without stages.
    """

    def __init__(self, trunk: Trunk, config: Config) -> None:
        super().__init__()
        self.trunk, self.config = trunk, config
        self.dim, self.size = trunk.dim, config.data.global_crops.size
        self.channels, self.reductions = list(trunk.channels), list(trunk.reductions)

    def forward(self, images: Tensor) -> Tensor:
        """Return features [B, C] of normalised images [B, channels, H, W].

        They are the mean of the trunk's last tokens, or its class token.
        """
        return self.trunk([images]).view

    def regions(self, images: Tensor) -> Tensor:
        """Return the trunk's last feature map [B, C, H', W'] for normalised images [B, channels, H, W]."""
        features = self.trunk([images])
        [(n, h, w)] = features.grids
        return features.regions.view(n, h, w, -1).permute(0, 3, 1, 2)

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Return a feature map [B, C_s, H_s, W_s] for every stage s, finest first.

        Args:
            images: normalised images [B, channels, H, W].

        Raises:
            UserError: the trunk has no stages.
        """
        return Pyramid(self.trunk)(images)

    def preprocess(self, image: Image.Image | NDArray[Any], whole: bool = False) -> Tensor:
        """Apply the evaluation transform to one image and return a normalised tensor [channels, S, S], with S = `size`.

        The short side is resized to S·256/224 and the centre cropped; with `whole`, the whole image is resized to the
        square instead. A PIL image is turned upright by its EXIF
        orientation, and its transparent pixels become white.

        Args:
            image: a PIL image of any mode, for a backbone trained on 8-bit RGB; otherwise an array [H, W, channels] of
                uint8 or uint16.

        Raises:
            BadImage: the pixels are 32-bit, whose value range is not defined, or the PIL image's file cannot be
                decoded.
            UserError: the array's number of channels or bits is not that of the images the backbone was trained on.
        """
        wanted = pixel_format(self.config.data)
        if isinstance(image, Image.Image) and wanted.is_rgb8:
            shown: Image.Image | NDArray[Any] = decode.load(ImageOps.exif_transpose(image))
        else:
            shown = _array_of(np.asarray(image), wanted)
        pixels = torch.from_numpy((stream.whole_image if whole else stream.centre_crop)(shown, self.size).copy())
        return photometric.normalize_(photometric.unit(pixels[None], wanted), wanted)[0]


def _array_of(image: NDArray[Any], wanted: PixelFormat) -> Image.Image | NDArray[Any]:
    """Return an array [H, W, C] in the form that `stream.centre_crop` takes: as a PIL image if it is 8-bit RGB.

    An array [H, W] gets a channel axis.

    Raises:
        UserError: the shape, the number of channels or the type is not that of the wanted pixel format.
    """
    image = image[:, :, None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[2] != wanted.channels or image.dtype != wanted.dtype:
        shape = " x ".join(map(str, image.shape))
        raise UserError(f"preprocess: expected an array [H, W, C] of {wanted}; got {shape} of {image.dtype}")
    return Image.fromarray(image) if wanted.is_rgb8 else image


def load_backbone(weights: str | Path) -> Backbone:
    """Return pretrained weights as a torch module, in fp32 on the CPU and in eval mode.

    Args:
        weights: a run dir or a step folder (its teacher is used), an exported folder (safetensors, timm, huggingface),
            a .safetensors file, an official EsViT .pth, a file of a trunk that Swin, DeiT, DINO or timm published, or
            zoo:NAME, a backbone that ships with the package, or
            another network as `timm:NAME@FILE`, `timm:NAME` or `hf:FOLDER` (checkpoint/outside.py).

    Raises:
        UserError: the weights do not exist, are damaged, or are of an architecture that esvit-scale does not support.
    """
    trunk, config = convert.load_trunk(Path(weights).expanduser())
    return Backbone(trunk, config).eval()
