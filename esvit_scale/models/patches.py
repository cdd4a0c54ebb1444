"""Conversion of images to patches as rows of pixels, and the patch projection that is applied to such rows."""

from torch import Tensor, nn
from torch.nn import functional as F

from esvit_scale.models.products import linear


class PatchProjection(nn.Conv2d):
    """The patch projection of vision transformers, as a linear layer on patches that are rows.

    Parameters are those of the published strided convolution, with the same names and shapes.
    """

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__(channels, dim, patch, stride=patch)

    def for_channels(self, channels: int) -> "PatchProjection":
        """Return a new projection of the same width and patch size for images with `channels` channels."""
        return PatchProjection(channels, self.out_channels, self.kernel_size[0])

    def forward(self, patches: Tensor) -> Tensor:
        """Map patches [N, channels · patch²] to tokens [N, C]."""
        return linear(patches, self.weight.flatten(1), self.bias)


def pixel_rows(crop: Tensor, patch: int) -> Tensor:
    """Map images [n, C, H, W] to their patches as rows, [n · ⌈H/patch⌉ · ⌈W/patch⌉, C · patch²], row-major.

    Images are padded with zeros, right and bottom, to whole patches.
    """
    n, channels, height, width = crop.shape
    h, w = -(-height // patch), -(-width // patch)
    if (height, width) != (h * patch, w * patch):
        crop = F.pad(crop, (0, w * patch - width, 0, h * patch - height))
    rows = crop.reshape(n, channels, h, patch, w, patch).permute(0, 2, 4, 1, 3, 5)
    return rows.reshape(n * h * w, channels * patch**2)
