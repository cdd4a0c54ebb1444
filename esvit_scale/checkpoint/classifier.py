"""`esvit_scale.load_classifier`, which loads fine-tuned weights as a torch module, and that module, `Classifier`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from esvit_scale.checkpoint import convert
from esvit_scale.checkpoint.backbone import Backbone
from esvit_scale.checkpoint.weights import OBJECTIVE, TRUNK, check_network
from esvit_scale.errors import UserError
from esvit_scale.objective.network import Network, TeacherNetwork, build_teacher


class Classifier(nn.Module):
    """A fine-tuned network as a torch module that maps a batch of images to class scores.

    Attributes:
        backbone: the trunk with its pixel format; `backbone.preprocess` prepares an image.
        classes: the names of the classes; empty if the training set had none.
    """

    def __init__(self, network: Network, backbone: Backbone, classes: Sequence[str]) -> None:
        super().__init__()
        self.network, self.backbone, self.classes = network, backbone, tuple(classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, K] of normalised images [B, channels, H, W]."""
        logits: Tensor = self.network([images])
        return logits


def load_classifier(weights: str | Path) -> Classifier:
    """Return fine-tuned weights as a torch module, in fp32 on the CPU and in eval mode.

    Args:
        weights: a run dir or a step folder (its averaged weights are used), or what `convert --to safetensors --heads`
            wrote.

    Raises:
        UserError: the weights do not exist, are damaged, or have no classifier.
    """
    path = Path(weights).expanduser()
    found = convert.read(path)
    tensors = found.networks.get("teacher") or next(iter(found.networks.values()))
    network = build_teacher(found.config) if found.config.objective.classes else None
    if network is None or not any(name.startswith(OBJECTIVE) for name in tensors):
        raise UserError(
            f"{path}: holds no classifier; give a run of `esvit-scale finetune`, or what `convert --to safetensors --heads` "
            "wrote of one"
        )
    check_network(path, tensors, found.config)
    _load(network, tensors)
    backbone = Backbone(network.trunk, found.config)
    return Classifier(network, backbone, found.config.objective.class_names).eval()


@torch.no_grad()
def _load(network: TeacherNetwork, tensors: dict[str, Tensor]) -> None:
    network.load_state_dict({name: tensor for name, tensor in tensors.items() if name.startswith((TRUNK, OBJECTIVE))})
