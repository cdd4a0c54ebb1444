"""A transformer over several modalities of a sample: image, audio, video and text, as in VATT (Akbari et al. 2021).

Every modality has a tokenizer of its own (models/modal_tokens.py). The transformer is one for all modalities, or one for
each (`model.modalities.backbone`). A sequence, such as one crop of one image or one cut of one sound, begins with its
modality's aggregation token, whose output is the sequence's view feature. Sequences do not see each other.

The tokens of all sequences form one list [N, C], modality by modality: norms, projections and MLPs run once over it,
attention once per group of equally long sequences, with a mask where sequences are padded. Without signals the trunk is a
plain vision transformer on images, which every objective and every evaluation of images can use.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.models import vit
from esvit_scale.models.attention_maps import BlockAttention, before_forward
from esvit_scale.models.drop_path import keep_scales, linear_rates, token_factors
from esvit_scale.models.modal_tokens import ImageTokens, Sequences, tokenizers
from esvit_scale.models.shape import Shape, overridden
from esvit_scale.models.trunk import Features, Grid, SignalFeatures, TokenMap, Trunk

SHARED = "shared"  # name of the transformer of all modalities
SHAPES = {
    "modal_small": Shape(128, (4,), (4,), (1,)),
    # Published sizes of VATT's shared backbones, of 155.0 and 306.1 million parameters with their tokenizers.
    "modal_medium": Shape(1024, (12,), (16,), (1,)),
    "modal_large": Shape(1024, (24,), (16,), (1,)),
}


class Packing(NamedTuple):
    """How a packed list of tokens [N, C] divides into sequences."""

    groups: tuple[Grid, ...]  # (sequences, 1, tokens of each), in order
    masks: tuple[Tensor | None, ...]  # of each group: bool [n, 1, 1, tokens], False for padding; None: no padding


class SequenceAttention(NamedTuple):
    """The attention probabilities within the sequences of one modality, whose first token is the aggregation token."""

    blocks: list[Tensor]  # of every block, [n, heads, 1 + T, 1 + T] (query, key); 0 for keys that are padding
    valid: Tensor  # bool [n, 1 + T], False for padding


class ModalTrunk(Trunk):
    """The trunk of all modalities: tokenizers, and one shared or several separate transformers.

    Args:
        shape: C, number of blocks and of attention heads; that of every transformer, if they are separate.
        embed: the tokenizer of every modality, "image" first.
        separate: whether every modality has a transformer of its own.
        drop_path: stochastic-depth rate of the last block; rates grow linearly from 0.
        drop_tokens: fraction of its tokens that DropToken removes from every sequence of a modality, in training.
    """

    has_attention_maps = True

    def __init__(
        self,
        shape: Shape,
        embed: Mapping[str, nn.Module],
        separate: bool = False,
        drop_path: float = 0.0,
        drop_tokens: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        dim, depth, heads = shape.embed_dim, shape.depths[0], shape.heads[0]
        self.dim, self.depths = dim, (depth,)
        self.drop_rates = linear_rates(drop_path, depth)
        self.drop_tokens = dict(drop_tokens or {})
        self.embed = nn.ModuleDict(embed)
        self.modalities = tuple(name for name in embed if name != "image")  # in the order of their drop keys
        names = list(embed) if separate else [SHARED]
        self.transformers = nn.ModuleDict({name: Transformer(dim, depth, heads) for name in names})

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all transformers, one transformer after the other."""
        return [block for one in self.transformers.values() for block in cast(Transformer, one).blocks]

    @property
    def norm(self) -> nn.Module:  # type: ignore[override]
        """The final norm of the image's transformer."""
        return self._transformer("image").norm

    @property
    def patch_projection(self) -> nn.Module:
        """The first layer of images, which `model.freeze_patch_embed` keeps at its random values."""
        return cast(ImageTokens, self.embed["image"]).proj

    def forward(
        self,
        crops: list[Tensor],
        drop_keys: Tensor | None = None,
        signals: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> Features:
        """Compute the features of all crops (`Trunk.forward`), of any size, and of the signals beside them.

        Args:
            crops: one tensor per resolution group; an empty list computes features of signals alone.
            drop_keys: int64, one key per crop image and then one per view of each signal, in the order of `modalities`.
            signals: by modality, values and lengths of all its views (data/signals.Signal).
        """
        sequences = self._sequences(crops, drop_keys, signals or {})
        normed: dict[str, list[Tensor]] = {}
        for name, members in self._of_transformers(sequences).items():
            *_, tokens = self._block_outputs(name, members, drop_keys, sequences)
            tokens = self._transformer(name).norm(tokens)
            for (modality, (embedded, _)), group in zip(members, _split(tokens, members), strict=True):
                normed.setdefault(modality, []).append(group.view(*embedded.shape[:2], -1))
        found = {}
        for modality, (_, valid) in sequences:
            if modality != "image":
                [group] = normed[modality]
                assert valid is not None
                found[modality] = SignalFeatures(group[:, 0], group[:, 1:], valid[:, 1:], valid[:, 1:].any(1))
        return self._with_grids(normed.get("image", []), crops)._replace(signals=found)

    def block_maps(self, crops: list[Tensor]) -> Iterator[TokenMap]:
        """Yield the token map of every block on images; the view of a crop is its aggregation token."""
        sequences = self._sequences(crops, None, {})
        for tokens in self._block_outputs(self._name_of("image"), sequences, None, sequences):
            groups = [
                group.view(*x.shape[:2], -1)
                for group, (_, (x, _)) in zip(_split(tokens, sequences), sequences, strict=True)
            ]
            features = self._with_grids(groups, crops)
            yield TokenMap(features.regions, features.grids, features.view)

    @torch.no_grad()
    def attention(
        self, crops: list[Tensor], signals: Mapping[str, tuple[Tensor, Tensor]]
    ) -> dict[str, SequenceAttention]:
        """Return the attention of every block by modality, without DropToken.

        Args:
            crops: at most one resolution group, [n, channels, S, S].
            signals: as for `forward`.
        """
        if len(crops) > 1:
            raise ValueError("crops of one size only")
        sequences = self._sequences(crops, None, signals)
        found: dict[str, SequenceAttention] = {}
        for modality, (tokens, valid) in sequences:
            there = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if valid is None else valid
            found[modality] = SequenceAttention([], there)
        for name, members in self._of_transformers(sequences).items():

            def record(
                module: MaskedAttention, inputs: tuple[Tensor, Packing], members: list[tuple[str, Sequences]] = members
            ) -> None:
                for (modality, _), probabilities in zip(members, module.probabilities(*inputs), strict=True):
                    found[modality].blocks.append(probabilities)

            blocks = self._transformer(name).blocks
            with before_forward([cast(Block, block).attn for block in blocks], record):
                for _ in self._block_outputs(name, members, None, sequences):
                    pass
        return found

    def attention_maps(self, image: Tensor) -> list[BlockAttention]:
        """Return every block's attention on one normalised image [channels, H, W], whose patches are one window.

        The aggregation token has the cell −1.
        """
        patch = cast(ImageTokens, self.embed["image"]).patch
        h, w = (-(-side // patch) for side in image.shape[-2:])
        cells = torch.arange(-1, h * w)[None]
        blocks = self.attention([image[None]], {})["image"].blocks
        return [BlockAttention(0, i, (h, w), found.cpu(), cells) for i, found in enumerate(blocks)]

    def _sequences(
        self, crops: list[Tensor], drop_keys: Tensor | None, signals: Mapping[str, tuple[Tensor, Tensor]]
    ) -> list[tuple[str, Sequences]]:
        """Return (modality, token sequences) of every resolution group and then of every signal."""
        if unknown := set(signals) - set(self.modalities):
            raise ValueError(f"{self.name} has no tokenizer of {', '.join(sorted(unknown))}")
        found = [("image", group) for group in self.embed["image"](crops)] if crops else []
        first = sum(len(x) for x in crops)
        for modality in self.modalities:
            if modality in signals:
                values, lengths = signals[modality]
                keys = None if drop_keys is None else drop_keys[first : first + len(values)]
                rate = 0.0 if keys is None else self.drop_tokens.get(modality, 0.0)
                found.append((modality, self.embed[modality](values, lengths, keys, rate)))
                first += len(values)
        return found

    def _of_transformers(self, sequences: list[tuple[str, Sequences]]) -> dict[str, list[tuple[str, Sequences]]]:
        """Return the groups of sequences of every transformer that has any."""
        found: dict[str, list[tuple[str, Sequences]]] = {}
        for modality, group in sequences:
            found.setdefault(self._name_of(modality), []).append((modality, group))
        return found

    def _block_outputs(
        self,
        transformer: str,
        members: list[tuple[str, Sequences]],
        drop_keys: Tensor | None,
        sequences: list[tuple[str, Sequences]],
    ) -> Iterator[Tensor]:
        """Yield the packed tokens [N, C] of some of all `sequences` after each block of a transformer."""
        groups: tuple[Grid, ...] = tuple((len(x), 1, x.shape[1]) for _, (x, _) in members)
        masks = tuple(None if valid is None else valid[:, None, None, :] for _, (_, valid) in members)
        tokens = torch.cat([x.flatten(0, 1) for _, (x, _) in members])
        scales = None
        if drop_keys is not None:
            of_groups = drop_keys.split([len(x) for _, (x, _) in sequences])
            chosen = {id(group) for _, group in members}
            keys = [of for of, (_, group) in zip(of_groups, sequences, strict=True) if id(group) in chosen]
            scales = keep_scales(torch.cat(keys), torch.tensor(self.drop_rates))
        packing = Packing(groups, masks)
        for i, block in enumerate(self._transformer(transformer).blocks):
            keep = token_factors(scales, self.drop_rates, i, groups, tokens.dtype)
            tokens = self.run_block(block, tokens, packing, *keep)
            yield tokens

    def _with_grids(self, groups: list[Tensor], crops: list[Tensor]) -> Features:
        """Return the features of image sequences [n, 1 + T, C] per resolution, aggregation tokens as views."""
        patch = cast(ImageTokens, self.embed["image"]).patch
        grids = [(len(x), -(-x.shape[-2] // patch), -(-x.shape[-1] // patch)) for x in crops]
        if not groups:
            nothing = next(self.parameters()).new_zeros(0, self.dim)
            return Features(nothing, nothing, [])
        view = torch.cat([group[:, 0] for group in groups])
        return Features(view, torch.cat([group[:, 1:].flatten(0, 1) for group in groups]), grids)

    def _name_of(self, modality: str) -> str:
        return SHARED if SHARED in self.transformers else modality

    def _transformer(self, name: str) -> "Transformer":
        return cast(Transformer, self.transformers[self._name_of(name) if name != SHARED else SHARED])


class Transformer(nn.Module):
    """The blocks of a transformer and its final norm; the trunk runs them."""

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=vit.NORM_EPS)


class Block(vit.Block):
    """A vision transformer's pre-norm block, whose attention leaves padding out."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.attn = MaskedAttention(dim, heads)


class MaskedAttention(vit.Attention):
    """Multi-head self-attention within each sequence; padding is attended to by nobody."""

    def forward(self, tokens: Tensor, packing: Packing) -> Tensor:  # type: ignore[override]
        """Map tokens [N, C] to [N, C]."""
        mixed = []
        for (q, k, v), mask in zip(self._heads(tokens, packing), packing.masks, strict=True):
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            mixed.append(attended.transpose(1, 2).reshape(-1, tokens.shape[1]))
        return self.proj(torch.cat(mixed))

    def probabilities(self, tokens: Tensor, packing: Packing) -> list[Tensor]:
        """Return the attention probabilities of every group of sequences, [n, heads, length, length] (query, key)."""
        found = []
        for (q, k, _), mask in zip(self._heads(tokens, packing), packing.masks, strict=True):
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            found.append((scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1))
        return found

    def _heads(self, tokens: Tensor, packing: Packing) -> Iterator[tuple[Tensor, ...]]:
        """Yield queries, keys and values [n, heads, length, C / heads] of every group of sequences."""
        groups = self.qkv(tokens).split([n * length for n, _, length in packing.groups])
        return (self.heads_of(qkv, n, length) for qkv, (n, _, length) in zip(groups, packing.groups, strict=True))


def _split(tokens: Tensor, members: list[tuple[str, Sequences]]) -> tuple[Tensor, ...]:
    """Split packed tokens [N, C] into one tensor [n · L, C] per group of sequences."""
    return tokens.split([x.shape[0] * x.shape[1] for _, (x, _) in members])


def build(config: Config) -> ModalTrunk:
    """Return the variant that `config.model.trunk` names, with a tokenizer for every modality that the config reads.

    Raises:
        UserError: overrides do not fit together, or keys do not suit several transformers.
    """
    shape, modal = overridden(config, SHAPES[config.model.trunk]), config.model.modalities
    separate = modal.backbone == "separate"
    if separate and config.optim.layer_decay < 1:
        raise UserError(
            "optim.layer_decay: not with model.modalities.backbone=separate, whose blocks are no single sequence; set "
            "optim.layer_decay=1"
        )
    rates = {"audio": modal.drop_audio, "video": modal.drop_video}
    return ModalTrunk(shape, tokenizers(config, shape.embed_dim), separate, config.model.drop_path, rates)
