"""Between ZeRO's gradient reduction and the optimizer's step: clip per tensor, freeze the last layer, refuse NaN.

A public hook on the base optimizer (`register_step_pre_hook`) is the one place where this is exact at every ZeRO stage:
lr = 0 would still move the moments and decay, and `requires_grad` toggles confuse ZeRO's buckets.
"""

from collections import defaultdict
from typing import Any, Literal

import torch
from torch import Tensor

from esvit_scale.parallel import collectives
from esvit_scale.parallel.partitions import Partition

FREEZABLE = "last_layer"  # the `name` of the parameter group that `freeze` acts on


class GradientGate:
    """The hooks around a step and what they leave behind: gradient norms, sizes of updates, and whether all was finite.

    ZeRO 1–3 step one flat group at a time, so the hook runs several times a step; each run looks only at the groups
    that are about to be stepped.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        partitions: list[Partition],
        names: list[str],
        watched: list[str],
        zero_stage: int,
        clip: float | None,
        clip_by: Literal["tensor", "global"],
        device: torch.device,
    ) -> None:
        """
        Args:
            names: of all trainable parameters.
            watched: those of them whose updates `watch` measures.
            device: where ranks exchange numbers (with offloading, gradients may lie elsewhere).
        """
        self.watch = False
        self.watched = watched
        self._watched = {name: i for i, name in enumerate(watched)}
        self._changes = torch.zeros(len(watched), 2, device=device)
        self._before: list[tuple[Partition, Tensor]] = []
        self.freeze = False
        self.names = names
        self._index = {name: i for i, name in enumerate(names)}
        self._by_flat: dict[int, list[Partition]] = defaultdict(list)
        for partition in partitions:
            self._by_flat[id(partition.flat)].append(partition)
        self.device = device
        self._zero_stage, self._clip, self._clip_by = zero_stage, clip, clip_by
        self._squares: list[Tensor] = []
        self._finite = True
        self._aside: list[tuple[Tensor, Tensor | None]] = []
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def take_squares(self) -> Tensor:
        """Squared gradient norm of every parameter [number of parameters], before the clip; NaN for a step that ZeRO
        left out. The next step starts anew."""
        squares, self._squares = self._squares, []
        return torch.stack(squares).sum(0) if squares else torch.full((len(self._index),), torch.nan)

    def take_changes(self) -> Tensor:
        """Squared norms of the watched parameters' update and value [watched, 2]; all ranks call it after a step that
        ran with `watch` set."""
        changes, self._changes = self._changes, torch.zeros(len(self._watched), 2, device=self.device)
        return collectives.all_reduce_sum_(changes) if self._zero_stage > 0 else changes

    def take_finite(self) -> bool:
        """False when stage 0's step was emptied because of a NaN or an infinity (ZeRO 1–3 find it themselves)."""
        finite, self._finite = self._finite, True
        return finite

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        flats = [flat for group in optimizer.param_groups for flat in group["params"]]
        owned = [p for flat in flats if flat.grad is not None for p in self._by_flat[id(flat)]]
        norms = self._tensor_norms(owned)  # [number of parameters]
        self._squares.append(norms.square())
        if self._zero_stage == 0 and not torch.isfinite(self._squares[-1].sum()):
            self._finite = False
            self._set_aside(flats)
            return
        self._scale(owned, norms)
        for group in optimizer.param_groups:
            if self.freeze and group["name"] == FREEZABLE:
                self._set_aside(group["params"])
        if self.watch:
            self._before = [(p, p.master.clone()) for p in owned if p.name in self._watched]

    def _set_aside(self, flats: list[Tensor]) -> None:
        """No gradient, no step: not for the moments, the decay or the count."""
        for flat in flats:
            self._aside.append((flat, flat.grad))
            flat.grad = None

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """With offloading, ZeRO writes the next gradients into the same tensors."""
        for flat, grad in self._aside:
            flat.grad = grad
        self._aside.clear()
        for p, before in self._before:
            pair = torch.stack([(p.master - before).norm() ** 2, before.norm() ** 2])
            self._changes[self._watched[p.name]] += pair.to(self.device)
        self._before = []

    def _tensor_norms(self, owned: list[Partition]) -> Tensor:
        """Norm of every parameter's gradient [number of parameters]; zero for those not in this call."""
        squares = torch.zeros(len(self._index), device=self.device)
        if owned:
            mine = torch.stack([p.grad.norm() for p in owned if p.grad is not None]).square()
            at = torch.tensor([self._index[p.name] for p in owned], device=self.device)
            squares[at] = mine.float().to(self.device)
        if self._zero_stage > 0:
            collectives.all_reduce_sum_(squares)
        return squares.sqrt()

    def _scale(self, owned: list[Partition], norms: Tensor) -> None:
        if self._clip is None or not owned:
            return
        if self._clip_by == "tensor":
            factors = (self._clip / (norms + 1e-6)).clamp(max=1.0)  # [number of parameters]
            for p in owned:
                p.grad.mul_(factors[self._index[p.name]].to(p.grad.device))  # type: ignore[union-attr]
        elif self._zero_stage == 0:
            factor = (self._clip / (norms.square().sum().sqrt() + 1e-6)).clamp(max=1.0)
            for p in owned:
                p.grad.mul_(factor)  # type: ignore[union-attr]
