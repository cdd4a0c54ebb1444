"""What a trunk or an objective says about itself to `plan`, model cards, exporters and the attention evaluation.

All of it is optional: the base classes answer for whoever does not (models/trunk.py, objective/objective.py).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

Tensors = dict[str, Tensor]  # by name within the trunk

# How FLOPs are counted. A FLOP is a multiplication or an addition of a matrix product or a convolution; nothing else is
# counted (as torch's FlopCounterMode does).
#   "published"  the network as its paper runs it, work on padding included: the number to compare with other work
#   "executed"   the products that this package runs, the backward's and the fused loss's own included
#   "useful"     "published" without any work on padding: what MFU counts, so that padding never looks like progress
Count = Literal["published", "executed", "useful"]


class CropCost(NamedTuple):
    """What one crop costs in a trunk's forward, in FLOPs, and the map of region tokens that it becomes."""

    flops: int  # of each crop
    flops_with_keys: int  # of each crop with drop keys, as a student runs it: ViL then looks at fewer windows
    flops_per_forward: int  # whatever the number of crops: position-bias networks
    grid: tuple[int, int]  # H, W of the region tokens; 0, 0 from a trunk without
    pixel_flops: int = 0  # of `flops` the first layer's, whose backward computes no gradient of the pixels


class Activations(NamedTuple):
    """Bytes that a forward keeps for its backward (without parameters and cached index tables)."""

    per_image: int
    per_step: int  # whatever the number of images: position-bias networks, gradients of the prototypes

    def total(self, images: int) -> int:
        """Return the bytes of a forward of `images` images."""
        return images * self.per_image + self.per_step


class KeptActivations(NamedTuple):
    """What a forward keeps for its backward, call by call of the trunk's blocks, and outside them.

    A packed trunk calls each block once a forward; timm's networks call each once for every crop size.
    """

    called: list[int]  # index in `Trunk.blocks` of the block that each call runs
    blocks: list[Activations]  # what each call keeps
    inputs: list[Activations]  # what is kept of each call under activation checkpointing
    outside: Activations  # all else: patch embedding, merging, norms, heads, loss


class TrunkFormulas(Protocol):
    """A trunk's costs in closed form; a trunk without formulas is run on the meta device and counted."""

    def crop_cost(self, size: int, count: Count) -> CropCost:
        """Return what one crop of `size` × `size` pixels costs."""

    def kept(self, sizes: Sequence[int], element: int) -> KeptActivations:
        """Return what the trunk's forward of one crop of each of these sizes keeps, at `element` bytes a number."""


class ObjectiveFormulas(Protocol):
    """An objective's costs in closed form; an objective without formulas is run on the meta device and counted."""

    def image_flops(self, grids: Sequence[tuple[int, int]], count: Count) -> int:
        """Return the FLOPs of an image in both networks' objectives, forward and backward.

        Args:
            grids: H, W of the region tokens of each crop, the two global crops first.
        """

    def kept(self, grids: Sequence[tuple[int, int]], element: int) -> Activations:
        """Return what the student's objective keeps for its backward, at `element` bytes a number."""


class TrunkCard(NamedTuple):
    """What a model card says about a trunk."""

    tag: str  # for model hubs: "swin"
    description: str  # "Swin V2 (swinv2_t: width 96, depths 2-2-6-2, window 8)"
    input_sizes: str  # a sentence about images of other sizes than the training's


class ObjectiveCard(NamedTuple):
    """What a model card says about an objective."""

    method: str = ""  # how the trunk was pretrained, in Markdown: "… by {method}"; empty: the objective's name
    rows: tuple[tuple[str, str], ...] = ()  # of the table of settings: (key, value)
    citation: str = ""  # the paper, in Markdown


class TimmForm(NamedTuple):
    """A trunk as a network of the timm library."""

    architecture: str  # timm's name of it
    arguments: dict[str, Any]  # of its constructor
    width: int  # C of the features
    reduction: int  # pixels along a side of a cell of the last map
    pool: str  # timm's global_pool
    first_conv: str  # timm's names of the first layer and of the classifier
    classifier: str
    tensors: Callable[[Tensors], Tensors]  # the trunk's tensors → by timm's names
    fixed_size: bool  # features are the trunk's at the size of the global crops alone
    norm_eps: str = ""  # eps of the norms where it is not timm's default, as Python writes it
    size_note: str = ""  # sentences for the model card: about image sizes,
    note: str = ""  # and about the code that loads the folder


class HuggingFaceForm(NamedTuple):
    """A trunk as a model of the transformers library."""

    config: dict[str, Any]  # config.json
    names: Callable[[str], list[str]]  # a tensor's name → transformers'; three where it splits queries, keys and values
    scale: Callable[[str], float]  # a tensor's name → the factor that it is stored with
    size_note: str = ""  # sentences for the model card: about image sizes,
    note: str = ""  # and about the features
