"""torch.hub entry points: `torch.hub.load("…/esvit-scale", "backbone", "weights.safetensors")`."""

from pathlib import Path

from torch import nn

dependencies = ["torch", "safetensors", "pydantic", "yaml", "numpy", "PIL"]


def backbone(weights: str | Path) -> nn.Module:
    """Return pretrained weights (run dir, exported folder, .safetensors or official .pth) as one module in eval mode."""
    from esvit_scale.checkpoint.backbone import load_backbone

    return load_backbone(weights)


def trunk(preset: str = "swin_t") -> nn.Module:
    """Return the untrained trunk of a preset, with the initial values of a run with seed 0."""
    from esvit_scale import config as configs
    from esvit_scale.checkpoint.backbone import Backbone
    from esvit_scale.models.initialize import initialize
    from esvit_scale.objective.network import build_network

    resolved = configs.resolve(preset)
    network = build_network(resolved)
    initialize(network, resolved.seed)
    return Backbone(network.trunk, resolved).eval()
