"""Zero-shot classification: images are compared with texts that name the classes (Radford et al. 2021).

Only a model with a text tower can do it. A class's embedding is the mean of those of its prompts, such as "a photo of a
cat."; the class with the highest cosine wins. Nothing is learned and nothing is selected.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from esvit_scale.checkpoint import outside
from esvit_scale.checkpoint.text_tower import TextTower

PROMPTS = ("a photo of a {}.",)


def text_tower(source: str) -> TextTower | None:
    """Return the text tower of a source of weights; None if it has none (everything but a CLIP of transformers)."""
    if not source.startswith(outside.FOLDER) or not outside.is_clip(outside.folder_of(source)):
        return None
    return TextTower(outside.folder_of(source))


def class_embeddings(tower: TextTower, classes: Sequence[str], prompts: Sequence[str] = PROMPTS) -> Tensor:
    """Return an embedding for each of K classes, float32 [K, D] of length 1.

    Args:
        classes: names of the classes; underscores in them are read as spaces.
        prompts: texts with {} in the place of a class's name.
    """
    names = [name.replace("_", " ") for name in classes]
    texts = [prompt.replace("{}", name) for name in names for prompt in prompts]
    return F.normalize(tower.encode(texts).view(len(names), len(prompts), -1).mean(1), dim=1)


def scores(tower: TextTower, features: Tensor, classes: Tensor) -> Tensor:
    """Return the cosines of images and classes, float32 [N, K].

    Args:
        features: view features of the image tower [N, C].
        classes: embeddings of the classes [K, D].
    """
    parts = [F.normalize(part.float() @ tower.projection.T, dim=1) @ classes.T for part in features.split(2**14)]
    return torch.cat(parts)
