"""torch.hub entry points: `torch.hub.load("…/esvit-scale", "backbone", "weights.safetensors")`."""

from pathlib import Path

from torch import nn

dependencies = ["torch", "safetensors", "pydantic", "yaml", "numpy", "PIL"]


def backbone(weights: str | Path) -> nn.Module:
    """Pretrained weights (run dir, exported folder, .safetensors or official .pth) as one module; `load_backbone`."""
    from esvit_scale.checkpoint.backbone import load_backbone

    return load_backbone(weights)


def trunk(preset: str = "swin_t") -> nn.Module:
    """The untrained trunk of a preset, initialised as a run with seed 0 is."""
    from esvit_scale import config as configs
    from esvit_scale.checkpoint.backbone import Backbone
    from esvit_scale.models.initialize import initialize
    from esvit_scale.objective.network import build_network

    resolved = configs.resolve(preset)
    network = build_network(resolved)
    initialize(network, resolved.seed)
    return Backbone(network.trunk, resolved).eval()
