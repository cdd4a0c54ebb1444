"""FLOPs and activation bytes of a trunk, counted by running it; trunks with `Trunk.formulas` use this in tests only.

The trunk runs on the meta device, where tensors have shapes but no values: this takes no memory, and a second for the
largest trunk. FLOPs are those of torch's FlopCounterMode (matrix products and convolutions, also those within custom
autograd functions), so work on padding is counted where a trunk does it. Activations are the storages that autograd
saves, each counted once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from esvit_scale.config import Config
from esvit_scale.models import recomputation
from esvit_scale.models.descriptions import CropCost
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.trunk import Features, Trunk
from esvit_scale.parallel import collectives


def crop_cost(config: Config, size: int) -> CropCost:
    """Return the traced forward FLOPs of the config's trunk for one crop of `size` × `size` pixels, and its token grid.

    Raises:
        UserError: the trunk cannot be built.
    """
    return _crop_cost(_built_from(config), size)


def signals_cost(config: Config) -> tuple[int, int]:
    """Return the traced forward FLOPs of the config's trunk for all signals of a sample, without and with drop keys.

    Drop keys let DropToken shorten sequences, as in the student's forward.
    """
    return _signals_cost(_built_from(config))


def example_signals(
    config: Config, samples: int, dtype: torch.dtype = torch.float32
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return uninitialised signals (values and lengths) in the shapes that a config's batches of `samples` have."""
    data, found = config.data, {}
    for name, views in config.signal_views.items():
        n = views * samples
        if name == "audio":
            values = torch.empty(n, round(data.audio.rate * data.audio.seconds), dtype=dtype)
        elif name == "video":
            values = torch.empty(n, 3, data.video.frames, data.video.size, data.video.size, dtype=dtype)
        else:
            values = torch.empty(n, data.text.length, dtype=torch.int64)
        found[name] = (values, torch.empty(n, dtype=torch.int64))
    return found


def _built_from(config: Config) -> str:
    """Return the part of the config that determines its trunk, as JSON; caches use it as their key."""
    of_data = {"global_crops", "local_crops", "channels", "audio", "video", "text"}
    return config.model_dump_json(include={"model": True, "data": of_data})


@lru_cache(maxsize=256)
def _crop_cost(values: str, size: int) -> CropCost:
    with on_meta():
        trunk = build_trunk(Config.model_validate_json(values)).eval()
        without, keyed = ([_forward_flops(trunk, size, n, keys) for n in (2, 3)] for keys in (False, True))
        grid = _features(trunk, size, 1, False).grids[0][1:]
    each = without[1] - without[0]
    return CropCost(each, keyed[1] - keyed[0], without[0] - 2 * each, grid)


@lru_cache(maxsize=256)
def _signals_cost(values: str) -> tuple[int, int]:
    config = Config.model_validate_json(values)
    if not config.signal_views:
        return 0, 0
    found = []
    with on_meta():
        trunk = build_trunk(config).eval()
        for keyed in (False, True):
            totals = []
            for samples in (2, 3):
                keys = drop_keys(0, 0, torch.arange(samples), sum(config.signal_views.values())) if keyed else None
                with torch.no_grad(), flop_counter() as counter:
                    trunk([], keys, example_signals(config, samples))
                totals.append(counter.get_total_flops())
            found.append(totals[1] - totals[0])
    return found[0], found[1]


def _forward_flops(trunk: Trunk, size: int, crops: int, keys: bool) -> int:
    with flop_counter() as counter:
        _features(trunk, size, crops, keys)
    return counter.get_total_flops()


@torch.no_grad()
def _features(trunk: Trunk, size: int, crops: int, keys: bool) -> Features:
    return trunk(
        [torch.empty(crops, trunk.in_chans, size, size)], drop_keys(0, 0, torch.arange(crops), 1) if keys else None
    )


@contextmanager
def on_meta() -> Iterator[None]:
    """Within the context, make tensors on the meta device and run collectives as if there were no other ranks."""
    with torch.device("meta"), collectives.alone():
        yield


def flop_counter() -> FlopCounterMode:
    """Return torch's FLOP counter with an added formula for `addmm_`, which it lacks.

    The prototype loss accumulates with `addmm_`.
    """
    product = lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]  # noqa: E731
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product})


class FusedAttention(TorchFunctionMode):
    """A mode in which scaled_dot_product_attention saves what a fused kernel saves: queries, keys, values and output.

    On GPU and CPU torch uses fused kernels. On the meta device it would fall back to plain operations, which save all
    attention probabilities and would be counted as such.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        return _fused(function, *args, **(kwargs or {}))


def _fused(
    function: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa or (attn_mask is not None and attn_mask.requires_grad):  # no fused kernel on every device
        return function(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


class Kept:
    """A count of the bytes that autograd saves in floating-point storages, each storage once.

    Parameters and buffers of `module` are not counted, nor are integer index tables.
    """

    def __init__(self, module: nn.Module) -> None:
        own = [*module.parameters(), *module.buffers()]
        # Storages are told apart by identity, as all have address 0 on the meta device; references keep it unique.
        self._seen = {_identity(x): x.untyped_storage() for x in own}
        self.bytes = 0

    def note(self, x: Tensor) -> Tensor:
        """Add the bytes of x's storage to the count unless it was counted before; return x."""
        if x.is_floating_point() and _identity(x) not in self._seen:
            self._seen[_identity(x)] = x.untyped_storage()
            self.bytes += x.untyped_storage().nbytes()
        return x

    def hooks(self) -> saved_tensors_hooks:
        """Return a context manager under which every tensor that autograd saves is counted."""
        return saved_tensors_hooks(self.note, lambda x: x)

    def note_attributes(self, root: Any) -> None:
        """Count the tensors that custom autograd functions keep as attributes of their nodes in the graph below `root`.

        The prototype loss keeps its gradients that way.
        """
        waiting, visited = [root], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            for x in tree_leaves(list(getattr(node, "__dict__", {}).values())):
                if isinstance(x, Tensor):
                    self.note(x)
            waiting += [following for following, _ in node.next_functions]


class KeptByBlocks:
    """A replacement for `Trunk.run_block` that records, per call, the block and the bytes it saved and was given."""

    def __init__(self, kept: Kept, blocks: list[nn.Module]) -> None:
        self.kept = kept
        self.index = {id(block): i for i, block in enumerate(blocks)}
        self.called: list[int] = []  # index of the block in the trunk
        self.saved: list[int] = []  # bytes saved for the backward
        self.inputs: list[int] = []  # bytes of inputs that activation checkpointing keeps
        self.products: list[int] = []  # bytes of results that selective checkpointing keeps on top of the inputs

    def __call__(self, block: Callable[..., Any], tokens: Any, *others: Any) -> Any:
        """Run the block, record the bytes that it saved and was given, and return its output."""
        before = self.kept.bytes
        with recomputation.KeepResults() as kept:
            result = block(tokens, *others)
        self.called.append(self.index[id(getattr(block, "__self__", block))])  # a block itself, or its bound method
        self.saved.append(self.kept.bytes - before)
        given = [x for x in tree_leaves((tokens, others[1:])) if isinstance(x, Tensor) and x.is_floating_point()]
        for counts, tensors in ((self.inputs, given), (self.products, kept.tensors)):
            counts.append(sum({_identity(x): x.untyped_storage().nbytes() for x in tensors}.values()))
        return result


def _identity(x: Tensor) -> int:
    return x.untyped_storage()._cdata
