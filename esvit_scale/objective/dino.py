"""DINO's objective (Caron et al. 2021): EsViT's without the region loss."""

from esvit_scale import config as configs
from esvit_scale.models.descriptions import ObjectiveCard
from esvit_scale.objective.esvit import EsViT


class DINO(EsViT):
    """EsViT's objective with the view loss alone."""

    def __init__(self, dim: int, config: configs.Objective) -> None:
        """Build the view head for trunk features of width `dim`."""
        super().__init__(dim, config.model_copy(update={"regions": False}))

    def card(self) -> ObjectiveCard:
        """Return what a model card says about the objective."""
        return super().card()._replace(method="", citation="")
