"""The tokenizers of a multimodal transformer: each maps the raw values of its modality to sequences of tokens.

modality | token | position
-------- | ----- | --------
image | patch of p × p pixels | learned for the map of a global crop, resized bicubically to other maps
audio | piece of a waveform (128 samples by default), or 4 frames of a log-mel spectrogram | learned
video | tube of 4 frames × p × p pixels | a sum of three learned ones: frame, row and column
text | token of the vocabulary | learned

A sequence begins with the modality's learned aggregation token. DropToken (Akbari et al. 2021) removes a random part of
the tokens behind it, so that the transformer sees a shorter sequence. Which ones is a function of the sequence's drop
key, a hash of (seed, step, position of the sample in the global batch, view): it does not depend on rank, world size,
micro-batches or recomputation.
"""

import math
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esvit_scale.config import Config
from esvit_scale.models.distributions import Initializer, normal
from esvit_scale.models.drop_path import draw_of
from esvit_scale.models.patches import PatchProjection, pixel_rows
from esvit_scale.models.tables import kept
from esvit_scale.models.vit import resize_matrix

TUBE_FRAMES = 4
MELS = 64  # bands of a spectrogram
HOP_SECONDS, WINDOW_SECONDS = 0.010, 0.025
PATCH_FRAMES = 4  # frames of a spectrogram in a token
QUIET = 1e-6  # added to the power of a band, for a signal within ±1
VOCABULARIES = {"bytes": 257}  # token ids of a text, with 0 for padding
_FIRST_DRAW = 1 << 18  # of `draw_of`, above those of models/masking.py


class Sequences(NamedTuple):
    """Equally long sequences of tokens, some of them padded."""

    tokens: Tensor  # [n, 1 + T, C], the aggregation token first
    valid: Tensor | None  # bool [n, 1 + T], False for padding; None: no sequence is padded


class Tokenizer(nn.Module):
    """The base class of the tokenizers of signals, with the aggregation token of the modality."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.aggregate = nn.Parameter(torch.zeros(1, 1, dim))

    def initial_values(self) -> dict[str, Initializer]:
        """Return the initialiser of the module's own parameters: aggregation token and positions."""
        return {name: normal(0.02) for name, _ in self.named_parameters(recurse=False)}

    def finish(self, tokens: Tensor, counts: Tensor, keys: Tensor | None, rate: float) -> Sequences:
        """Drop a part of the tokens and put the aggregation token before the others.

        Args:
            tokens: [n, T, C], with positions.
            counts: int64 [n], how many tokens at the beginning of each sequence are no padding.
            keys: int64 [n], the sequences' drop keys.
            rate: fraction of a sequence's valid tokens that DropToken removes.
        """
        valid = torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]
        if rate and keys is not None:
            index, valid = kept_tokens(counts, tokens.shape[1], keys, rate)
            tokens = tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([self.aggregate.to(tokens.dtype).expand(len(tokens), 1, -1), tokens], 1)
        return Sequences(tokens, F.pad(valid, (1, 0), value=True))


@torch.no_grad()
def kept_tokens(counts: Tensor, length: int, keys: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Return the indices of the tokens that DropToken keeps, int64 [n, T'], in order, and which are valid, bool [n, T'].

    T' is ⌈(1 − rate) · length⌉; of a sequence with `counts` valid tokens, ⌈(1 − rate) · counts⌉ of them are kept, every
    subset equally likely, and padding fills the rest.
    """
    place = torch.arange(length, device=keys.device)
    draw = draw_of(keys[:, None], _FIRST_DRAW + place, 1 << 24)
    unique = draw * length + place  # breaks ties by place, so that any sort gives the same order
    unique = torch.where(place < counts[:, None], unique, unique + (length << 24))  # padding last
    kept_length = length - math.floor(rate * length)
    index = unique.argsort(1)[:, :kept_length]
    valid = torch.arange(kept_length, device=keys.device) < (counts - (rate * counts.double()).floor().long())[:, None]
    index, order = torch.where(valid, index, index + length).sort(1)  # valid ones first, in their order
    return index % length, valid.gather(1, order)


class ImageTokens(Tokenizer):
    """The tokenizer of images: patches of p × p pixels, and positions for a map of `side` × `side` patches."""

    def __init__(self, dim: int, patch: int, side: int) -> None:
        super().__init__(dim)
        self.patch, self.side = patch, side
        self.proj = PatchProjection(3, dim, patch)
        self.positions = nn.Parameter(torch.zeros(side**2, dim))

    def forward(self, crops: list[Tensor]) -> list[Sequences]:
        """Map crops, [N_g, channels, S_g, S_g] per resolution, to their sequences, one per resolution."""
        found = []
        for crop in crops:
            h, w = (-(-side // self.patch) for side in crop.shape[-2:])
            tokens = self.proj(pixel_rows(crop.to(self.proj.weight.dtype), self.patch)).view(len(crop), h * w, -1)
            tokens = tokens + self._positions(h, w).to(tokens.dtype)
            found.append(
                Sequences(torch.cat([self.aggregate.to(tokens.dtype).expand(len(crop), 1, -1), tokens], 1), None)
            )
        return found

    def _positions(self, h: int, w: int) -> Tensor:
        wide = self.positions.to(torch.promote_types(self.positions.dtype, torch.float32))
        if (h, w) == (self.side, self.side):
            return wide
        rows, columns = (resize_matrix(self.side, n, wide.device).to(wide.dtype) for n in (h, w))
        resized = torch.einsum("yi,ijc->yjc", rows, wide.view(self.side, self.side, -1))
        return torch.einsum("xj,yjc->yxc", columns, resized).flatten(0, 1)


class WaveformTokens(Tokenizer):
    """The tokenizer of raw audio: pieces of `patch` samples."""

    def __init__(self, dim: int, patch: int, samples: int) -> None:
        super().__init__(dim)
        self.patch = patch
        self.proj = nn.Linear(patch, dim)
        self.positions = nn.Parameter(torch.zeros(-(-samples // patch), dim))

    def forward(self, values: Tensor, lengths: Tensor, keys: Tensor | None, rate: float) -> Sequences:
        """Map waveforms [n, samples], of the given lengths, to sequences; `finish` explains keys and rate."""
        padded = F.pad(values, (0, len(self.positions) * self.patch - values.shape[1]))
        pieces = padded.view(len(values), -1, self.patch).to(self.proj.weight.dtype)
        counts = (lengths + self.patch - 1) // self.patch
        return self.finish(self.proj(pieces) + self.positions, counts, keys, rate)


class SpectrogramTokens(Tokenizer):
    """The tokenizer of audio as a log-mel spectrogram: all bands of PATCH_FRAMES frames of 10 ms.

    The log powers of a sound are scaled to mean 0 and standard deviation 1, over all bands and frames, so that loudness
    does not matter.
    """

    def __init__(self, dim: int, rate: int, samples: int) -> None:
        super().__init__(dim)
        self.rate, self.hop = rate, round(HOP_SECONDS * rate)
        self.frames = -(-samples // self.hop)
        self.proj = nn.Linear(MELS * PATCH_FRAMES, dim)
        self.positions = nn.Parameter(torch.zeros(-(-self.frames // PATCH_FRAMES), dim))

    def forward(self, values: Tensor, lengths: Tensor, keys: Tensor | None, rate: float) -> Sequences:
        """Map waveforms [n, samples], of the given lengths, to sequences; `finish` explains keys and rate."""
        frames = (lengths + self.hop - 1) // self.hop
        powers = self.spectrogram(values, frames)  # [n, frames, MELS]
        padded = F.pad(powers, (0, 0, 0, len(self.positions) * PATCH_FRAMES - self.frames))
        pieces = padded.view(len(values), -1, PATCH_FRAMES * MELS).to(self.proj.weight.dtype)
        counts = (frames + PATCH_FRAMES - 1) // PATCH_FRAMES
        return self.finish(self.proj(pieces) + self.positions, counts, keys, rate)

    @torch.no_grad()
    def spectrogram(self, values: Tensor, frames: Tensor) -> Tensor:
        """Return scaled log powers [n, frames, MELS] of waveforms [n, samples]; those behind the `frames` [n] are 0."""
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        window = hann(round(WINDOW_SECONDS * self.rate), wide.device).to(wide.dtype)
        padded = F.pad(wide, (0, (self.frames - 1) * self.hop + len(window) - wide.shape[1]))
        size = 1 << (len(window) - 1).bit_length()
        spectrum = torch.fft.rfft(padded.unfold(1, len(window), self.hop) * window, n=size)
        power = spectrum.real.square() + spectrum.imag.square()
        with _without_autocast(wide.device):
            logs = (power @ mel_bands(self.rate, size, wide.device).to(wide.dtype) + QUIET).log()
        heard = (torch.arange(self.frames, device=wide.device) < frames[:, None])[:, :, None].to(wide.dtype)
        numbers = (heard.sum((1, 2), keepdim=True) * MELS).clamp_min(1)
        centred = (logs - (logs * heard).sum((1, 2), keepdim=True) / numbers) * heard
        spread = (centred.square().sum((1, 2), keepdim=True) / numbers).sqrt()
        return centred / spread.clamp_min(1e-3)


class TubeTokens(Tokenizer):
    """The tokenizer of videos: tubes of TUBE_FRAMES frames × `patch` × `patch` pixels."""

    def __init__(self, dim: int, patch: int, frames: int, size: int) -> None:
        super().__init__(dim)
        self.patch = patch
        steps, side = -(-frames // TUBE_FRAMES), -(-size // patch)
        self.proj = nn.Linear(3 * TUBE_FRAMES * patch**2, dim)
        self.frame_positions = nn.Parameter(torch.zeros(steps, 1, 1, dim))
        self.row_positions = nn.Parameter(torch.zeros(1, side, 1, dim))
        self.column_positions = nn.Parameter(torch.zeros(1, 1, side, dim))

    def forward(self, values: Tensor, lengths: Tensor, keys: Tensor | None, rate: float) -> Sequences:
        """Map videos [n, 3, T, S, S], of the given numbers of frames, to sequences; `finish` explains keys and rate."""
        steps, side = self.frame_positions.shape[0], self.row_positions.shape[1]
        n, channels, frames, height, width = values.shape
        to_tubes = (0, side * self.patch - width, 0, side * self.patch - height, 0, steps * TUBE_FRAMES - frames)
        cut = F.pad(values, to_tubes).view(n, channels, steps, TUBE_FRAMES, side, self.patch, side, self.patch)
        tubes = cut.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(n, steps, side, side, -1).to(self.proj.weight.dtype)
        tokens = self.proj(tubes) + (self.frame_positions + self.row_positions + self.column_positions)
        counts = (lengths + TUBE_FRAMES - 1) // TUBE_FRAMES * side**2
        return self.finish(tokens.flatten(1, 3), counts, keys, rate)


class TextTokens(Tokenizer):
    """The tokenizer of texts, whose tokens are ids; 0 is padding."""

    def __init__(self, dim: int, vocabulary: int, length: int) -> None:
        super().__init__(dim)
        self.table = WordTable(vocabulary, dim)
        self.positions = nn.Parameter(torch.zeros(length, dim))

    def forward(self, values: Tensor, lengths: Tensor, keys: Tensor | None, rate: float) -> Sequences:
        """Map ids [n, L], of the given lengths, to sequences; `finish` explains keys and rate."""
        return self.finish(self.table(values) + self.positions, lengths, keys, rate)


class WordTable(nn.Embedding):
    """The learned vectors of a vocabulary."""

    def initial_values(self) -> dict[str, Initializer]:
        """Return the initialiser of the table."""
        return {"weight": normal(0.02)}


def tokenizers(config: Config, dim: int) -> dict[str, Tokenizer]:
    """Return the tokenizer of the image and of every signal that a config reads, for tokens of width `dim`."""
    data, modal = config.data, config.model.modalities
    found: dict[str, Tokenizer] = {"image": ImageTokens(dim, modal.patch, -(-data.global_crops.size // modal.patch))}
    samples = round(data.audio.rate * data.audio.seconds)
    for name in config.signal_views:
        if name == "audio" and modal.audio == "waveform":
            found[name] = WaveformTokens(dim, modal.waveform_patch, samples)
        elif name == "audio":
            found[name] = SpectrogramTokens(dim, data.audio.rate, samples)
        elif name == "video":
            found[name] = TubeTokens(dim, modal.patch, data.video.frames, data.video.size)
        else:
            found[name] = TextTokens(dim, VOCABULARIES[data.text.vocabulary], data.text.length)
    return found


@kept
def hann(length: int, device: torch.device) -> Tensor:
    """Return a periodic Hann window, float64 [length]."""
    return torch.from_numpy(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)).to(device)


@kept
def mel_bands(rate: int, size: int, device: torch.device) -> Tensor:
    """Return triangular filters, float64 [size / 2 + 1, MELS], from powers of a Fourier transform to bands.

    The centres lie evenly between 0 and half the rate on the mel scale 2595 · log10(1 + f / 700).
    """
    mels = np.linspace(0, 2595 * np.log10(1 + rate / 2 / 700), MELS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)  # Hz
    frequency = np.arange(size // 2 + 1)[:, None] * rate / size
    rising = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequency) / (edges[2:] - edges[1:-1])
    return torch.from_numpy(np.clip(np.minimum(rising, falling), 0, None)).to(device)


def _without_autocast(device: torch.device):  # type: ignore[no-untyped-def]
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
