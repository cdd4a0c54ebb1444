"""DINO's objective (Caron et al. 2021): EsViT's without regions."""

from esvit_scale import config as config_module
from esvit_scale.objective.esvit import EsViT


class DINO(EsViT):
    def __init__(self, dim: int, config: config_module.Objective) -> None:
        """Args: dim: C of the trunk."""
        super().__init__(dim, config.model_copy(update={"regions": False}))
