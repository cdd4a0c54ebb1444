"""Pretrained weights as one ordinary torch module: `esvit_scale.load_backbone`."""

from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from esvit_scale.checkpoint import convert
from esvit_scale.config import Config
from esvit_scale.data import decode, photometric, stream
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
        """images [B, 3, H, W], normalised → features [B, C]: what the trunk pools its tokens to (the mean, or a
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

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return a picture of any mode as [3, S, S], as evaluation shows it: upright, transparency on white, short side to
        S·256/224, centre crop, normalised.

        Raises:
            BadImage: pixels without an agreed range (32-bit), or a file that cannot be decoded.
        """
        upright = decode.load(ImageOps.exif_transpose(image))
        pixels = torch.from_numpy(stream.centre_crop(upright, self.size).copy())
        return photometric.normalize_(pixels[None].float() / 255)[0]


def load_backbone(weights: str | Path) -> Backbone:
    """Return the backbone of a run dir, a step folder, an exported folder (safetensors, timm, huggingface), a .safetensors
    file or an official EsViT .pth; also of a trunk alone that Swin, DeiT, DINO or timm published.

    Of a run it is the EMA teacher's, in fp32 on the CPU and in eval mode; `.to("cuda")` and `.train()` as any module.

    Raises:
        UserError: no such weights, damaged, or of another architecture.
    """
    trunk, config = convert.load_trunk(Path(weights).expanduser())
    return Backbone(trunk, config).eval()
