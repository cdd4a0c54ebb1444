"""The text tower of a CLIP in a folder of transformers, for zero-shot classification.

The tower and its tokenizer run in transformers (extra `clip`); the weights are read like all others, and a folder
must hold the tokenizer's files. The image tower is read by outside.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from esvit_scale.checkpoint import official, outside
from esvit_scale.errors import UserError, first_line

PROJECTION = "visual_projection.weight"
TEXTS_AT_ONCE = 64


class TextTower:
    """A text tower with its tokenizer, and the projection of image features into the common space of D dimensions.

    Attributes:
        projection: float32 [D, C], applied to the view features of the image tower.
    """

    def __init__(self, folder: Path) -> None:
        """Load the tower from a folder.

        Raises:
            UserError: transformers is not installed, or the folder lacks a tokenizer or a part of the tower.
        """
        try:
            from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection
        except ImportError:
            raise UserError(f"{folder}: its text tower needs transformers; pip install 'esvit-scale[clip]'") from None
        about = outside.read_json(folder / "config.json")
        tensors = official.read_network(outside.weights_in(folder))
        values = about.get("text_config", {}) | {"projection_dim": about.get("projection_dim", 512)}
        self.length = int(values.get("max_position_embeddings", 77))
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # transformers raises many kinds for files that are missing or damaged
            raise UserError(f"{folder}: no tokenizer that transformers can read: {first_line(error)}") from None
        self._model: Any = CLIPTextModelWithProjection(CLIPTextConfig(**values)).eval()
        text = {n: t.float() for n, t in tensors.items() if n.startswith(("text_model.", "text_projection."))}
        text = {n: t for n, t in text.items() if not n.endswith("position_ids")}
        try:
            self._model.load_state_dict(text)
            self.projection = tensors[PROJECTION].float()
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{folder}: its text tower is incomplete: {' '.join(str(error).split())[:200]}") from None

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of n texts, float32 [n, D] of length 1. Longer texts than the tower takes are cut."""
        found = []
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            some = list(texts[first : first + TEXTS_AT_ONCE])
            tokens = self._tokenizer(
                some, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
            )
            with torch.no_grad():
                found.append(self._model(tokens["input_ids"], tokens["attention_mask"]).text_embeds.float())
        return F.normalize(torch.cat(found), dim=1)
