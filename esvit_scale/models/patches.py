"""Pixels → patches as rows, and the convolution that such rows need."""

from torch import Tensor, nn
from torch.nn import functional as F


class PatchProjection(nn.Conv2d):
    """A convolution over patches that do not overlap (its published parameters and shapes), on patches that are rows."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__(channels, dim, patch, stride=patch)

    def for_channels(self, channels: int) -> "PatchProjection":
        """Return a new projection like this one for images of another number of channels."""
        return PatchProjection(channels, self.out_channels, self.kernel_size[0])

    def forward(self, patches: Tensor) -> Tensor:
        """Map patches [N, channels · patch²] to tokens [N, C]."""
        return F.linear(patches, self.weight.flatten(1), self.bias)


def pixel_rows(crop: Tensor, patch: int) -> Tensor:
    """Map a crop [n, C, H, W] to its patches as rows, [n · ⌈H/patch⌉ · ⌈W/patch⌉, C · patch²].

    What the last patches lack, right and bottom, is zero.
    """
    n, channels, height, width = crop.shape
    h, w = -(-height // patch), -(-width // patch)
    if (height, width) != (h * patch, w * patch):
        crop = F.pad(crop, (0, w * patch - width, 0, h * patch - height))
    rows = crop.reshape(n, channels, h, patch, w, patch).permute(0, 2, 4, 1, 3, 5)
    return rows.reshape(n * h * w, channels * patch**2)
