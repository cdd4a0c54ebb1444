"""Types in which trunks and objectives describe themselves to `plan`, model cards and exporters.

They are what methods such as `Trunk.formulas`, `Trunk.card` and `Trunk.timm_form` return. All of these methods are
optional: the base classes (models/trunk.py, objective/objective.py) return a default.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

Tensors = dict[str, Tensor]  # name of a parameter or buffer within the trunk → value

# How FLOPs are counted. A FLOP is a multiplication or an addition in a matrix product or a convolution; nothing else is
# counted (as in torch's FlopCounterMode).
#   "published"  the network as its paper runs it, work on padding included: the number to compare with other work
#   "executed"   the products that this package runs, including those that only its backward and its fused loss need
#   "useful"     "published" without any work on padding: the count for MFU, which padding must not raise
Count = Literal["published", "executed", "useful"]


class CropCost(NamedTuple):
    """The FLOPs of a trunk's forward on one crop, and the grid of region tokens that the crop yields."""

    flops: int  # per crop, without drop keys
    flops_with_keys: int  # per crop, with drop keys as in a student's forward: ViL then attends to fewer windows
    flops_per_forward: int  # once per forward, independent of the number of crops: position-bias networks
    grid: tuple[int, int]  # (H, W) of the region tokens; (0, 0) from a trunk without region tokens
    pixel_flops: int = 0  # the part of `flops` in the first layer, whose backward computes no gradient of the pixels


class Activations(NamedTuple):
    """Bytes that a forward keeps in memory for its backward, without parameters and cached index tables."""

    per_image: int
    per_step: int  # independent of the number of images: position-bias networks, gradients of the prototypes

    def total(self, images: int) -> int:
        """Return the bytes that a forward of `images` images keeps."""
        return images * self.per_image + self.per_step


class KeptActivations(NamedTuple):
    """What a forward keeps for its backward: one entry for each call of a block, and a sum for all other layers.

    A packed trunk calls each block once per forward; a timm network calls each block once for every crop size.
    """

    called: list[int]  # for each call, the index of its block in `Trunk.blocks`
    blocks: list[Activations]  # for each call, what it keeps without activation checkpointing
    inputs: list[Activations]  # for each call, what it keeps with activation checkpointing: the block's inputs
    products: list[Activations]  # for each call, what it keeps on top of its inputs with selective checkpointing
    outside: Activations  # all other layers: patch embedding, merging, norms, heads, loss


class TrunkFormulas(Protocol):
    """A trunk's costs in closed form. Trunks without formulas are traced on the meta device (models/traced.py)."""

    def crop_cost(self, size: int, count: Count) -> CropCost:
        """Return the cost of a forward on one crop of `size` × `size` pixels."""

    def kept(self, sizes: Sequence[int], element: int) -> KeptActivations:
        """Return what the trunk's forward keeps for its backward.

        Args:
            sizes: side in pixels of each crop of an image.
            element: bytes per number at the training precision.
        """


class ObjectiveFormulas(Protocol):
    """An objective's costs in closed form. Objectives without formulas are traced instead (objective/costs.py)."""

    def image_flops(self, grids: Sequence[tuple[int, int]], count: Count) -> int:
        """Return the FLOPs per image of the heads and the loss: student and teacher, forward and backward.

        Args:
            grids: (H, W) of the region tokens of each crop, the two global crops first.
        """

    def teacher_flops(self, grids: Sequence[tuple[int, int]], count: Count) -> int:
        """Return the part of `image_flops` that is the teacher's targets, which further students share."""

    def kept(self, grids: Sequence[tuple[int, int]], element: int) -> Activations:
        """Return what the student's heads and loss keep for the backward.

        Args:
            grids: (H, W) of the region tokens of each crop, the two global crops first.
            element: bytes per number at the training precision.
        """


class TrunkCard(NamedTuple):
    """The texts about a trunk in a model card."""

    tag: str  # tag on model hubs, such as "swin"
    description: str  # such as "Swin V2 (swinv2_t: width 96, depths 2-2-6-2, window 8)"
    input_sizes: str  # a sentence about images of other sizes than in training


class ObjectiveCard(NamedTuple):
    """The texts about an objective in a model card."""

    method: str = ""  # the pretraining method, in Markdown, as it follows "by"; empty: the objective's name
    rows: tuple[tuple[str, str], ...] = ()  # (key, value) of further rows in the table of settings
    citation: str = ""  # the paper, in Markdown


class PublishedWeights(NamedTuple):
    """The weights that the makers of a trunk published under its name."""

    tensors: Tensors  # by their names within the trunk; others may be there, too
    mean: tuple[float, ...]  # by which images are normalised, for each channel
    std: tuple[float, ...]


class TimmForm(NamedTuple):
    """How a trunk is exported as a network of the timm library."""

    architecture: str  # timm's name of the network
    arguments: dict[str, Any]  # keyword arguments of the network's constructor
    width: int  # C of the features
    reduction: int  # pixels along a side of a cell of the last map
    pool: str  # timm's `global_pool`
    first_conv: str  # timm's name of the first layer
    classifier: str  # timm's name of the classifier
    tensors: Callable[[Tensors], Tensors]  # maps the trunk's tensors to timm's names
    fixed_size: bool  # whether timm's features equal the trunk's only at the size of the global crops
    norm_eps: str = ""  # eps of the norms as a Python literal; empty: timm's default
    size_note: str = ""  # sentences for the model card about image sizes
    note: str = ""  # sentences for the model card about the code that loads the export
    imports: str = ""  # module that registers the network in timm; empty: timm has it
    from_tensors: Callable[[Tensors], Tensors] = lambda theirs: theirs  # undoes what `tensors` did to shapes


class HuggingFaceForm(NamedTuple):
    """How a trunk is exported as a model of the transformers library."""

    config: dict[str, Any]  # content of config.json
    names: Callable[[str], list[str]]  # our name of a tensor → transformers' names; three if it splits qkv, else one
    scale: Callable[[str], float]  # our name of a tensor → the factor that it is multiplied by for the export
    size_note: str = ""  # sentences for the model card about image sizes
    note: str = ""  # sentences for the model card about the features


class DetectorForm(NamedTuple):
    """How a trunk's weights are written for the Swin of a detection library."""

    tensors: Callable[[Tensors], Tensors]  # maps the trunk's tensors to the library's names and orders
    content: Callable[[Tensors], dict[str, Any]]  # of the .pth file, as the library's loader expects it
