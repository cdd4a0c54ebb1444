"""A sparse plain vision transformer as a network of timm; importing this module registers it there as `esvit_sparse_vit`.

    import esvit_scale.models.sparse_timm
    model = timm.create_model("local-dir:FOLDER", pretrained=True)

It prunes at inference and in training alike, by the highest scores: it is for using weights, not for learning to prune.
"""

from typing import Any

import torch
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from esvit_scale.models.sparse_parts import KeepPredictor, count_kept, highest
from esvit_scale.models.sparse_vit import places


class SparseVisionTransformer(VisionTransformer):
    """timm's vision transformer, whose blocks compute the tokens that `sparse_vit.SparseViT` keeps.

    Args:
        keep: fraction of the tokens it is given that a pruning stage keeps.
        arguments: those of timm's class.
    """

    def __init__(self, *, keep: float = 0.7, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.places = places(len(self.blocks))
        self.ratios = tuple(keep ** (s + 1) for s in range(len(self.places)))
        self.predictors = nn.ModuleList(KeepPredictor(self.embed_dim) for _ in self.places)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map images [B, channels, S, S] to class token, registers and the tokens kept last, [B, L, C]."""
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        patches = x.shape[1] - self.num_prefix_tokens
        for i, block in enumerate(self.blocks):
            if i in self.places:
                x = self._prune(x, self.places.index(i), patches)
            x = block(x)
        return self.norm(x)

    def _prune(self, x: Tensor, stage: int, patches: int) -> Tensor:
        first, rest = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        n, length, dim = rest.shape
        scores = self.predictors[stage](rest.flatten(0, 1), [(n, 1, length)]).view(n, length)
        best = highest(scores, min(count_kept(self.ratios[stage], patches), length))
        return torch.cat([first, rest.gather(1, best[:, :, None].expand(-1, -1, dim))], 1)


@register_model
def esvit_sparse_vit(pretrained: bool = False, **arguments: Any) -> SparseVisionTransformer:
    """Return a sparse vision transformer with timm's arguments, and `keep`."""
    return build_model_with_cfg(SparseVisionTransformer, "esvit_sparse_vit", pretrained, **arguments)
