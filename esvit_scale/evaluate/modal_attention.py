"""`esvit-scale evaluate attention SHARDS`: what each modality of a sample attends to in a multimodal trunk.

The view feature of a sequence is the output of its aggregation token, so its attention says which patches of the picture,
which stretches of the sound, which tubes of the video and which bytes of the text the feature is made of. It is given as a
multiple of an even share: 1 everywhere for a token that attends to everything alike. Sequences do not see each other, so
what a modality attends to depends on that modality alone.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esvit_scale import files
from esvit_scale.config import Config
from esvit_scale.data.evaluation_signals import SignalBatch, evaluation_signals
from esvit_scale.errors import UserError, nearest
from esvit_scale.evaluate import modalities
from esvit_scale.models.modal import ModalTrunk
from esvit_scale.models.modal_tokens import ImageTokens, TubeTokens

SAMPLES = 3  # that are shown by default
SEARCHED = 256  # samples from the first on among which those with the most modalities are taken


class Attended(NamedTuple):
    """One modality of a sample as the trunk reads it, and how much its aggregation token attends to each token."""

    modality: str
    values: Tensor  # image [C, S, S]; audio, video and text as data/signals.Signal has them, without the first axis
    length: int  # samples, frames or bytes that the sample has; 0 for images
    attention: NDArray[
        np.float64
    ]  # of every block, [blocks, heads, …]: image [h, w], audio [T], video [T, h, w], text [T]


class SampleAttention(NamedTuple):
    """A sample and what each of its modalities attends to."""

    key: str
    attended: list[Attended]


class ModalAttention(NamedTuple):
    """The samples that were looked at, and the trunk that looked."""

    config: Config
    trunk: ModalTrunk
    samples: list[SampleAttention]


def run_modal_attention(
    checkpoint: Path, data: Path, out: Path, keys: Sequence[str] = (), samples: int = SAMPLES
) -> ModalAttention:
    """Run `esvit-scale evaluate attention` on samples of a shard set: write `out`/attention.npz and return the result.

    The file has `keys`, and of sample n (from 1) an array `sample{n}_{modality}`, float32: the attention of the
    aggregation token, as `Attended` has it. report/modal_figure.py draws it.

    Args:
        keys: of the samples to show; empty: of the first SEARCHED samples, those with the most modalities.
        samples: how many to show without `keys`.

    Raises:
        UserError: the checkpoint is no run of several modalities, or the set has no sample of a key.
    """
    trained = modalities.load(checkpoint)
    trunk = cast(ModalTrunk, trained.network.trunk)
    chosen = _chosen(evaluation_signals(data, trained.config, 32), data, keys, samples)
    found = [SampleAttention(part.keys[b], attended(trunk, part, b)) for part, b in chosen]
    arrays = {
        f"sample{n}_{seen.modality}": seen.attention.astype(np.float32)
        for n, sample in enumerate(found, start=1)
        for seen in sample.attended
    }
    out.mkdir(parents=True, exist_ok=True)
    with files.replacing(out / "attention.npz") as tmp, tmp.open("wb") as file:
        np.savez_compressed(file, keys=np.array([sample.key for sample in found]), **arrays)  # type: ignore[arg-type]
    return ModalAttention(trained.config, trunk, found)


def attended(trunk: ModalTrunk, part: SignalBatch, b: int) -> list[Attended]:
    """Return what the trunk attends to in each modality that the b-th sample of a batch has."""
    there = {name: (s.values[b : b + 1], s.lengths[b : b + 1]) for name, s in part.signals.items() if s.lengths[b]}
    crops = [part.images[b : b + 1]] if part.has_image[b] else []
    found = []
    for modality, of in trunk.attention(crops, there).items():
        maps = from_aggregation([block[0] for block in of.blocks], of.valid[0])
        if modality == "image":
            patch = cast(ImageTokens, trunk.embed["image"]).patch
            grid = tuple(-(-side // patch) for side in part.images.shape[-2:])
            found.append(Attended(modality, part.images[b], 0, maps.reshape(*maps.shape[:2], *grid)))
            continue
        values, length = there[modality][0][0], int(there[modality][1][0])
        if modality == "video":
            side = cast(TubeTokens, trunk.embed["video"]).row_positions.shape[1]
            maps = maps.reshape(*maps.shape[:2], -1, side, side)
        found.append(Attended(modality, values, length, maps))
    return found


def from_aggregation(blocks: Sequence[Tensor], valid: Tensor) -> NDArray[np.float64]:
    """Return how much the aggregation token of a sequence attends to the T tokens behind it, [blocks, heads, T].

    It is a multiple of an even share, 1 / (1 + T).

    Args:
        blocks: attention probabilities of every block, [heads, 1 + T', 1 + T'] (query, key), aggregation token first.
        valid: bool [1 + T'], False for padding, which is left out.
    """
    of_tokens = torch.stack([block[:, 0, valid] for block in blocks]).double()
    return (of_tokens[:, :, 1:] * of_tokens.shape[2]).cpu().numpy()


def _chosen(
    parts: Iterator[SignalBatch], data: Path, keys: Sequence[str], samples: int
) -> list[tuple[SignalBatch, int]]:
    """Return the samples to show, each as its batch and its place there."""
    seen: list[tuple[SignalBatch, int]] = []
    if not keys:
        complete = 0
        for part in parts:
            seen += [(part, b) for b in range(len(part.keys))]
            complete += sum(_count(part, b) > len(part.signals) for b in range(len(part.keys)))
            if complete >= samples or len(seen) >= SEARCHED:
                break
        if not seen:
            raise UserError(f"{data}: has no readable sample")
        richest = sorted(range(len(seen)), key=lambda i: -_count(*seen[i]))[:samples]
        return [seen[i] for i in sorted(richest)]
    found: dict[str, tuple[SignalBatch, int]] = {}
    known: list[str] = []
    for part in parts:
        known += part.keys
        found |= {key: (part, b) for b, key in enumerate(part.keys) if key in keys}
        if len(found) == len(set(keys)):
            break
    if lacking := next((key for key in keys if key not in found), None):
        close = nearest(lacking, known)
        raise UserError(f"--keys: {data} has no readable sample {lacking!r}{close if 'did' in close else ''}")
    return [found[key] for key in keys]


def _count(part: SignalBatch, b: int) -> int:
    """Return how many modalities a sample has."""
    return int(part.has_image[b]) + sum(int(signal.lengths[b] > 0) for signal in part.signals.values())
