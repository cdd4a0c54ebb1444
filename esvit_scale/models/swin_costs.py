"""Closed-form FLOPs of a Swin and activation bytes that its backward needs, from the sizes of a built trunk.

The tests compare them with torch's FlopCounterMode and with what autograd saves. models/descriptions.py defines the
three ways of counting FLOPs; for Swin, "published" counts qkv and proj also on the zeros that pad a map to whole
windows, "executed" on real tokens only.

Forward multiply-adds ("published") of a crop of S pixels, H = ⌈S/4⌉ tokens a side, padded to P = ⌈H/w⌉·w, widths C:
    H²·48C  +  Σ blocks (4P²C² + 2P²w²C + 8H²C²)  +  Σ merges 8H'²C²   with H' = ⌈H/2⌉ after the merge and C before it
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from esvit_scale.models import recomputation
from esvit_scale.models.descriptions import Activations, Count, CropCost, KeptActivations

if TYPE_CHECKING:
    from esvit_scale.models.swin import Swin

WIDE = 4  # bytes of a number in fp32


class StageMap(NamedTuple):
    """The sizes of one stage's token map for one crop."""

    stage: int
    width: int  # C
    depth: int
    heads: int
    window: int
    side: int  # H, tokens along a side of the map
    padded: int  # P, the side H rounded up to whole windows
    last: bool  # whether this is the last stage


class SwinFormulas:
    """Formulas for the FLOPs and activation memory of a Swin V1."""

    def __init__(self, trunk: "Swin") -> None:
        self.trunk = trunk

    # --- FLOPs -------------------------------------------------------------------------------------------------------

    def crop_cost(self, size: int, count: Count) -> CropCost:
        """Return the forward FLOPs of one crop of `size` × `size` pixels, and the grid of its region tokens."""
        maps = list(self._maps(size))
        embedding = maps[0].side ** 2 * self._patch_values() * maps[0].width
        macs = embedding
        for m in maps:
            tokens, slots, width = m.side**2, m.padded**2, m.width
            projected = slots if count == "published" else tokens
            queries = tokens if count == "useful" else slots
            macs += m.depth * (4 * projected * width**2 + 2 * queries * m.window**2 * width + 8 * tokens * width**2)
            if not m.last:
                macs += _half(m.side) ** 2 * 8 * width**2
        return CropCost(2 * macs, 2 * macs, self._flops_per_forward(), (maps[-1].side,) * 2, 2 * embedding)

    def _flops_per_forward(self) -> int:
        return 0

    # --- activations -------------------------------------------------------------------------------------------------

    def kept(self, sizes: Sequence[int], element: int) -> KeptActivations:
        """Return the bytes that a forward of one crop of each of `sizes` saves for its backward.

        `element` is the number of bytes of a value in the run's precision.
        """
        blocks = [sum(column) for column in zip(*(self._kept_by_blocks(s, element) for s in sizes), strict=True)]
        inputs = [sum(column) for column in zip(*(self._block_inputs(s, element) for s in sizes), strict=True)]
        products = [sum(column) for column in zip(*(self._kept_products(s, element) for s in sizes), strict=True)]
        return KeptActivations(
            list(range(len(blocks))),
            [Activations(*both) for both in zip(blocks, self._kept_by_position_bias(element), strict=True)],
            [Activations(given, 0) for given in inputs],
            [Activations(*both) for both in zip(products, self._position_bias_product(), strict=True)],
            Activations(sum(self._kept_outside_blocks(size, element) for size in sizes), 0),
        )

    def _kept_by_blocks(self, size: int, element: int) -> list[int]:
        """Return the bytes that each block saves, in order, for one crop of `size` pixels."""
        found = []
        for m in self._maps(size):
            n, s, c = m.side**2, m.padded**2, m.width
            for i in range(m.depth):
                # q, k, v and the probabilities in window slots, and proj's input
                attention = (s * (3 * c + m.window**2 * m.heads) + n * c) * element
                stats = 2 * 2 * n * WIDE  # mean and 1/σ of two norms
                # inputs of two norms, qkv and fc1 (C each) and of GELU (4C)
                own = attention + 8 * n * c * element + stats + self._kept_by_version(m, i, element)
                found.append(own + self._keep_factors(m, i, element))
        return found

    def _kept_by_version(self, m: StageMap, index: int, element: int) -> int:
        """Return the bytes that a block of another Swin version saves on top of a V1 block's; 0 for V1 itself."""
        return 0

    def _block_inputs(self, size: int, element: int) -> list[int]:
        return [
            m.side**2 * m.width * element + self._keep_factors(m, i, element)
            for m in self._maps(size)
            for i in range(m.depth)
        ]

    def _kept_products(self, size: int, element: int) -> list[int]:
        """Return the bytes of each block's products that selective checkpointing keeps, for one crop."""
        return [
            self._values_of_products(m.width) * m.side**2 * m.width * element
            for m in self._maps(size)
            for _ in range(m.depth)
        ]

    def _values_of_products(self, width: int) -> int:
        """Return how many times C values per token are kept: 3 of qkv, 1 of proj and 4 of fc1, or none.

        The last product of V1, that of fc2, is only added to the residual stream.
        """
        return 8 if width >= recomputation.MIN_INNER_DIMENSION else 0

    def _position_bias_product(self) -> list[int]:
        """Return the bytes that selective checkpointing keeps of each block's position-bias network: V1 has none."""
        return [0] * sum(self.trunk.depths)

    def _keep_factors(self, m: StageMap, index: int, element: int) -> int:
        """Return the bytes of the drop factors of a block's two branches for one crop; 0 if its drop rate is 0."""
        rate = self.trunk.drop_rates[sum(self.trunk.depths[: m.stage]) + index]
        return 2 * m.side**2 * element if rate else 0

    def _kept_outside_blocks(self, size: int, element: int) -> int:
        """Return the bytes that patch embedding, patch merging and the final norm save for one crop."""
        maps = list(self._maps(size))
        first, last = maps[0], maps[-1]
        kept = first.side**2 * ((self._patch_values() + first.width) * element + 2 * WIDE)
        for m in maps[:-1]:
            kept += _half(m.side) ** 2 * (self._kept_by_merging(m.width) * element + 2 * WIDE)
        return kept + last.side**2 * (last.width * element + 2 * WIDE)

    def _kept_by_merging(self, width: int) -> int:
        """Return the number of values saved per merged token: the inputs of the norm and the reduction, 4C each."""
        return 8 * width

    def _kept_by_position_bias(self, element: int) -> list[int]:
        """Return the bytes saved for each block's position bias: none in V1, which looks it up in a parameter."""
        return [0] * sum(self.trunk.depths)

    # --- sizes -------------------------------------------------------------------------------------------------------

    def _patch_values(self) -> int:
        return self.trunk.in_chans * self.trunk.reductions[0] ** 2

    def _maps(self, size: int) -> Iterator[StageMap]:
        """Yield the sizes of each stage's map for a crop of `size` pixels."""
        trunk = self.trunk
        side, last = -(-size // trunk.reductions[0]), len(trunk.depths) - 1
        for s, stage in enumerate(trunk.stages):
            padded = -(-side // stage.window) * stage.window
            yield StageMap(s, trunk.channels[s], trunk.depths[s], trunk.heads[s], stage.window, side, padded, s == last)
            side = _half(side)


class SwinV2Formulas(SwinFormulas):
    """Formulas for the FLOPs and activation memory of a Swin V2; attention, norms and position bias differ from V1."""

    def _flops_per_forward(self) -> int:
        """Return the FLOPs of the position-bias networks, which run once per forward whatever the number of crops."""
        maps = self._maps(self.trunk.reductions[0])
        return 2 * sum(m.depth * (2 * m.window - 1) ** 2 * self._bias_hidden() * (2 + m.heads) for m in maps)

    def _kept_by_version(self, m: StageMap, index: int, element: int) -> int:
        """Return the bytes that a block saves on top of a V1 block's.

        They are the rescaled queries and keys with v, the inverse lengths of queries and keys, and an extra norm.
        """
        kept = m.padded**2 * (3 * m.width * element + 2 * m.heads * WIDE)
        if self.trunk.stages[m.stage].blocks[index].extra_norm is not None:
            kept += m.side**2 * m.width * element + 2 * m.side**2 * WIDE
        return kept

    def _values_of_products(self, width: int) -> int:
        """Return V1's values and the output of fc2, whose inner dimension is 4C, because a norm reads it."""
        return super()._values_of_products(width) + (4 * width >= recomputation.MIN_INNER_DIMENSION)

    def _position_bias_product(self) -> list[int]:
        """Return the bytes of the last layer's output: one fp32 value per head and distance."""
        if self._bias_hidden() < recomputation.MIN_INNER_DIMENSION:
            return super()._position_bias_product()
        maps = self._maps(self.trunk.reductions[0])
        return [(2 * m.window - 1) ** 2 * m.heads * WIDE for m in maps for _ in range(m.depth)]

    def _kept_by_merging(self, width: int) -> int:
        """Return how many values are saved per merged token: the inputs of the reduction, 4C, and of the norm, 2C."""
        return 6 * width

    def _kept_by_position_bias(self, element: int) -> list[int]:
        """Return the bytes that each block's position-bias network saves."""
        found, hidden = [], self._bias_hidden()
        for m in self._maps(self.trunk.reductions[0]):
            weights = 0 if element == WIDE else hidden * m.heads  # its last layer's, copied to fp32
            rows = (2 * m.window - 1) ** 2
            found += [rows * (2 + hidden + m.heads) * WIDE + weights * WIDE] * m.depth
        return found

    def _bias_hidden(self) -> int:
        return int(self.trunk.stages[0].blocks[0].attn.cpb_mlp[0].out_features)  # type: ignore[union-attr, index, operator, arg-type]


def _half(side: int) -> int:
    return -(-side // 2)
