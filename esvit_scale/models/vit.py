"""Plain vision transformers on packed batches: DeiT as EsViT runs it, and MoCo v3's with fixed position embeddings.

DeiT (Touvron et al. 2021): the class token is the crop's view feature, and the learned position embeddings, of a 14×14
map, are resized bicubically to each crop's map. MoCo v3 (Chen, Xie and He 2021): sine-cosine position embeddings,
another initialisation, and a patch projection that the run freezes (`model.freeze_patch_embed`).

The tokens of all crops form one list [N, C], each crop's class token and registers before its patches, row-major:
norms, projections and MLPs run once over it, attention once per resolution. Crops whose sides are no multiple of 16 are
padded right and bottom with zeros, as in our Swin (the official code cuts the remainder off). Parameter names are the
official ones, which timm has too.

Registers (Darcet et al. 2024) are `model.registers` additional learned tokens without positions, which attend and are
attended to in every block, and which no feature contains.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.models.block_parts import GeluMlp, add_branch
from esvit_scale.models.descriptions import Tensors, TimmForm
from esvit_scale.models.distributions import Initializer, constant, normal, uniform
from esvit_scale.models.drop_path import keep_scales, linear_rates, token_factors
from esvit_scale.models.masking import Mask
from esvit_scale.models.patches import PatchProjection, pixel_rows
from esvit_scale.models.shape import Shape, overridden
from esvit_scale.models.tables import kept
from esvit_scale.models.tokens import groups
from esvit_scale.models.trunk import Features, Grid, MaskGeometry, TokenMap, Trunk
from esvit_scale.models.windows import Grids

PATCH = 16  # pixels
SIDE = 14  # of the map that the learned position embeddings are for: 224 pixels / PATCH
NORM_EPS = 1e-6


class ViT(Trunk):
    """A DeiT trunk: the region tokens are the patch tokens after the final norm, the view feature is the class token.

    Args:
        embed_dim: C.
        depth, heads: number of blocks, and of attention heads in each of them.
        drop_path: stochastic-depth rate of the last block; rates grow linearly from 0.
        registers: number of register tokens.
    """

    def __init__(self, embed_dim: int, depth: int, heads: int, drop_path: float = 0.0, registers: int = 0) -> None:
        super().__init__()
        self.dim, self.depths, self.registers = embed_dim, (depth,), registers
        self.drop_rates = linear_rates(drop_path, depth)
        self.patch_embed = PatchEmbed(embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, embed_dim)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + SIDE**2, embed_dim)) if self.learns_positions else None
        self._modules["blocks"] = nn.ModuleList(
            self.make_block(embed_dim, heads) for _ in range(depth)
        )  # `blocks` is a property
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)

    learns_positions = True
    timm_name = "deit_small_patch16_224"  # timm's network of this architecture; sizes are passed as arguments

    def make_block(self, dim: int, heads: int) -> nn.Module:
        """Return a new block of width `dim`; sparse trunks override this."""
        return Block(dim, heads)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, in order."""
        return cast(
            list[nn.Module], self._modules["blocks"]
        )  # the ModuleList itself, because torch.export looks up a submodule of this name

    @property
    def mask_geometry(self) -> MaskGeometry:
        """The geometry of masks, whose tokens `forward` replaces after the patch embedding."""
        return MaskGeometry(self.dim, PATCH, 1)

    @property
    def patch_projection(self) -> nn.Module:
        """The first layer, which `model.freeze_patch_embed` keeps at its random values."""
        return self.patch_embed.proj

    def initial_values(self) -> dict[str, Initializer]:
        """Return the initialisers of the class token, the registers (DINOv3's) and the position embeddings."""
        return {"cls_token": normal(0.02), "reg_token": normal(0.02), "pos_embed": normal(0.02)}

    def timm_form(self, size: int) -> TimmForm:
        """Return a description of the trunk as a timm network.

        Its position embeddings are resized for crops of `size` pixels.

        Raises:
            UserError: `size` is no multiple of 16, and timm does not pad crops.
        """
        if size % PATCH:
            raise UserError(f"timm pads no crop, and {size} pixels are no multiple of {PATCH}")
        heads = cast(Block, self.blocks[0]).attn.heads
        side = size // PATCH

        def tensors(trunk: Tensors) -> Tensors:
            positions = self.positions_for(trunk, side)
            if not self.registers:
                return trunk | {"pos_embed": positions[None]}
            # timm's networks with registers have positions of patches alone
            return trunk | {"cls_token": trunk["cls_token"] + positions[0], "pos_embed": positions[None, 1:]}

        arguments = {"img_size": size, "embed_dim": self.dim, "depth": self.depths[0], "num_heads": heads}
        if self.registers:
            arguments |= {"reg_tokens": self.registers, "no_embed_class": True}
        return TimmForm(
            self.timm_name,
            arguments,
            width=self.dim,
            reduction=PATCH,
            pool="token",
            first_conv="patch_embed.proj",
            classifier="head",
            tensors=tensors,
            fixed_size=True,
            from_tensors=with_class_position,
        )

    def positions_for(self, trunk: Tensors, side: int) -> Tensor:
        """Return the position embeddings of these weights, resized to side × side patches: [1 + side², C].

        `trunk` has the trunk's tensors by name.
        """
        return resized(trunk["pos_embed"][0], side, side)

    def forward(self, crops: list[Tensor], drop_keys: Tensor | None = None, mask: Mask | None = None) -> Features:
        """Compute the features of all crops (`Trunk.forward`), of any size."""
        *_, (tokens, grids) = self._block_outputs(crops, drop_keys, mask)
        regions, _, view = self._token_map(self.norm(tokens), grids)
        return Features(cast(Tensor, view), regions, grids)

    def block_maps(self, crops: list[Tensor]) -> Iterator[TokenMap]:
        """Yield the token map of every block; the view of a crop is its class token."""
        return (self._token_map(*output) for output in self._block_outputs(crops, None))

    def position(self, h: int, w: int, device: torch.device) -> Tensor:
        """Return the position embeddings of class token and h × w patches, [1 + h·w, C], in fp32 or wider."""
        return resized(cast(Tensor, self.pos_embed)[0], h, w)

    def _block_outputs(
        self, crops: list[Tensor], drop_keys: Tensor | None, mask: Mask | None = None
    ) -> Iterator[tuple[Tensor, list[Grid]]]:
        """Yield (tokens, grids) after each block: tokens [N, C], of each crop the class token, registers and patches."""
        grids = [(x.shape[0], -(-x.shape[-2] // PATCH), -(-x.shape[-1] // PATCH)) for x in crops]
        sequences: Grids = tuple((n, 1, 1 + self.registers + h * w) for n, h, w in grids)
        tokens = self._embed(crops, grids, mask)
        scales = keep_scales(drop_keys, torch.tensor(self.drop_rates)) if drop_keys is not None else None
        for i, block in enumerate(self.blocks):
            keep = token_factors(scales, self.drop_rates, i, sequences, tokens.dtype)
            tokens = self.run_block(block, tokens, sequences, *keep)
            yield tokens, grids

    def _embed(self, crops: list[Tensor], grids: list[Grid], mask: Mask | None) -> Tensor:
        """Map crops [N_g, channels, S_g, S_g] to tokens [N, C], with class tokens, registers and position embeddings."""
        patches = self.patch_embed(crops)
        if mask is not None:
            patches = mask.hide(patches, grids, self.mask_geometry.patches)
        sequences = []
        for group, (n, h, w) in groups(patches, grids):
            tokens = torch.cat([self.cls_token.expand(n, 1, -1), group.view(n, h * w, -1)], 1)
            tokens = tokens + self.position(h, w, tokens.device).to(tokens.dtype)
            if self.reg_token is not None:
                tokens = torch.cat([tokens[:, :1], self.reg_token.expand(n, -1, -1), tokens[:, 1:]], 1)
            sequences.append(tokens.flatten(0, 1))
        return torch.cat(sequences)

    def _token_map(self, tokens: Tensor, grids: list[Grid]) -> TokenMap:
        """Return the patch tokens of all crops as regions and the class tokens as views, without the registers."""
        regions, views, before = [], [], 1 + self.registers
        for group, (n, h, w) in zip(tokens.split([n * (before + h * w) for n, h, w in grids]), grids, strict=True):
            sequence = group.view(n, before + h * w, -1)
            views.append(sequence[:, 0])
            regions.append(sequence[:, before:].flatten(0, 1))
        return TokenMap(torch.cat(regions), grids, torch.cat(views))


class MoCoViT(ViT):
    """MoCo v3's vision transformer.

    Its position embeddings are fixed sines and cosines, computed for each map (zero for the class token). Weights are
    initialised by Xavier's rule, those of queries, keys and values as three separate matrices.
    """

    learns_positions = False
    timm_name = "vit_small_patch16_224"

    def position(self, h: int, w: int, device: torch.device) -> Tensor:
        """Return the fixed position embeddings of the class token and a map of h × w patches, [1 + h·w, C]."""
        return sine_cosine(h, w, self.dim, device)

    def positions_for(self, trunk: Tensors, side: int) -> Tensor:
        """Return the fixed position embeddings of the class token and side × side patches: [1 + side², C]."""
        return sine_cosine(side, side, trunk["cls_token"].shape[-1], torch.device("cpu"))

    def initial_values(self) -> dict[str, Initializer]:
        """Return the initialisers of class token and registers, of the weights of all linear layers, and the patch projection."""
        found = {"cls_token": normal(1e-6), "reg_token": normal(0.02)}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                fan_out = module.out_features // (3 if name.endswith(".qkv") else 1)
                found[f"{name}.weight"] = uniform(math.sqrt(6 / (module.in_features + fan_out)))
        found["patch_embed.proj.weight"] = uniform(math.sqrt(6 / (self.in_chans * PATCH**2 + self.dim)))
        return found | {"patch_embed.proj.bias": constant(0.0)}


class PatchEmbed(nn.Module):
    """Patch embedding: a linear projection of patches of 16×16 pixels to tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = PatchProjection(3, dim, PATCH)

    def forward(self, crops: list[Tensor]) -> Tensor:
        """Map crops, [N_g, channels, S_g, S_g] per resolution, to the tokens of their patches [ΣN_g·T_g, C]."""
        dtype = self.proj.weight.dtype
        return self.proj(torch.cat([pixel_rows(crop.to(dtype), PATCH) for crop in crops]))


class Block(nn.Module):
    """A pre-norm block: attention, then an MLP.

    It is called once per forward, for all crops: ZeRO-3 gathers it once, checkpointing recomputes it as a whole.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = GeluMlp(dim, ends_block=True)

    def forward(self, tokens: Tensor, sequences: Grids, keep_attn: Tensor | None, keep_mlp: Tensor | None) -> Tensor:
        """Map tokens [N, C] to [N, C]; keep_attn and keep_mlp [N, 1] scale the two branches (0: dropped, None: 1)."""
        tokens = add_branch(tokens, self.attn(self.norm1(tokens), sequences), keep_attn)
        return add_branch(tokens, self.mlp(self.norm2(tokens)), keep_mlp)


class Attention(nn.Module):
    """Multi-head self-attention, softmax(QKᵀ/√d) V, within each crop."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, sequences: Grids) -> Tensor:
        """Map tokens [N, C] to [N, C]; `sequences` has (crops, 1, tokens per crop) for each resolution."""
        dim, mixed = tokens.shape[1], []
        groups = self.qkv(tokens).split([n * length for n, _, length in sequences])
        for qkv, (n, _, length) in zip(groups, sequences, strict=True):
            q, k, v = self.heads_of(qkv, n, length)
            mixed.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n * length, dim))
        return self.proj(torch.cat(mixed))

    def heads_of(self, qkv: Tensor, n: int, length: int) -> tuple[Tensor, ...]:
        """Return queries, keys and values [n, heads, length, C / heads] of qkv [n·length, 3C]."""
        return qkv.view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def with_class_position(tensors: Tensors) -> Tensors:
    """Give position embeddings of patches alone, [1, side², C], a class token's position of zeros in front.

    timm's networks with registers store the class token with its position added. Other tensors are returned unchanged.
    """
    positions = tensors.get("pos_embed")
    if positions is None or positions.ndim != 3 or math.isqrt(positions.shape[1]) ** 2 != positions.shape[1]:
        return tensors
    return tensors | {"pos_embed": torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)}


def resized(learned: Tensor, h: int, w: int) -> Tensor:
    """Resize position embeddings [1 + 14², C] from a 14×14 map to an h×w map: [1 + h·w, C], in fp32 or wider.

    The class token's, which comes first, stays the same.
    """
    learned = learned.to(torch.promote_types(learned.dtype, torch.float32))
    if (h, w) == (SIDE, SIDE):
        return learned
    rows, columns = (resize_matrix(SIDE, n, learned.device).to(learned.dtype) for n in (h, w))
    patches = torch.einsum("yi,ijc->yjc", rows, learned[1:].view(SIDE, SIDE, -1))
    patches = torch.einsum("xj,yjc->yxc", columns, patches)
    return torch.cat([learned[:1], patches.flatten(0, 1)])


@kept
def resize_matrix(source: int, target: int, device: torch.device) -> Tensor:
    """Return the matrix of a bicubic interpolation from `source` to `target` samples, float64 [target, source].

    It gives torch's `interpolate(mode="bicubic")` at the scale target/source (Keys 1981 with a = −0.75, no
    antialiasing). Unlike torch's function, a product with the matrix has a deterministic backward on GPUs.
    """
    a = -0.75
    at = (np.arange(target) + 0.5) * source / target - 0.5
    first = np.floor(at).astype(np.int64)
    matrix = np.zeros((target, source))
    for offset in (-1, 0, 1, 2):
        d = np.abs(at - first - offset)
        near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        np.add.at(matrix, (np.arange(target), np.clip(first + offset, 0, source - 1)), np.where(d <= 1, near, far))
    return torch.from_numpy(matrix).to(device)


@kept
def sine_cosine(h: int, w: int, dim: int, device: torch.device) -> Tensor:
    """Return sine-cosine position embeddings, float32 [1 + h·w, C].

    The class token's, which comes first, is zero. A patch's is (sin y, cos y, sin x, cos x), each of C/4 values at the
    frequencies 10000^(−i/(C/4)).
    """
    frequencies = 10000.0 ** -(np.arange(dim // 4) / (dim // 4))
    y, x = np.divmod(np.arange(h * w), w)
    y, x = np.outer(y, frequencies), np.outer(x, frequencies)
    patches = np.concatenate([np.sin(y), np.cos(y), np.sin(x), np.cos(x)], 1)
    return torch.from_numpy(np.concatenate([np.zeros((1, dim)), patches])).float().to(device)


class Variant(NamedTuple):
    """A named plain vision transformer: its class, sizes and timm name."""

    kind: type[ViT]
    shape: Shape
    timm_name: str


VARIANTS = {
    "deit_s": Variant(ViT, Shape(384, (12,), (6,), (1,)), "deit_small_patch16_224"),
    "deit_b": Variant(ViT, Shape(768, (12,), (12,), (1,)), "deit_base_patch16_224"),
    "vit_s_moco": Variant(MoCoViT, Shape(384, (12,), (12,), (1,)), "vit_small_patch16_224"),
    "vit_b_moco": Variant(MoCoViT, Shape(768, (12,), (12,), (1,)), "vit_base_patch16_224"),
}


def build(config: Config) -> ViT:
    """Return the variant that `config.model.trunk` names.

    Raises:
        UserError: overrides do not fit together, or do not suit the position embeddings.
    """
    variant = VARIANTS[config.model.trunk]
    shape = overridden(config, variant.shape)
    if not variant.kind.learns_positions and shape.embed_dim % 4:
        near = max(4, round(shape.embed_dim / 4) * 4)
        raise UserError(
            f"model.embed_dim: sine-cosine positions need a multiple of 4, got {shape.embed_dim}; nearest: {near}"
        )
    model = config.model
    trunk = variant.kind(shape.embed_dim, shape.depths[0], shape.heads[0], model.drop_path, model.registers)
    trunk.timm_name = variant.timm_name
    return trunk
