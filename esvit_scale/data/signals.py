"""Signals: what a sample has beside its image, as fixed-size tensors (`data.audio`, `data.video`, `data.text`).

A signal's views are stacked like crops: view v of the b-th of B images is row v · B + b.
"""

from typing import NamedTuple

from torch import Tensor

MODALITIES = ("audio", "video", "text")  # the sections of `data` of the same names, in this order


class Signal(NamedTuple):
    """One modality of one micro-batch; a sample without it has zeros of length 0."""

    values: Tensor  # audio: float32 [V·B, samples] in -1..1; video: float32 [V·B, 3, T, S, S], normalised as images;
    # text: int64 [V·B, L], byte + 1, 0 past the end
    lengths: Tensor  # int64 [V·B]: samples, frames or tokens that the sample has; 0: it lacks the modality
