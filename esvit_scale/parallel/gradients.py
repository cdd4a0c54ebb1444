"""Between ZeRO's gradient reduction and the optimizer's step: clip per tensor, freeze the last layer, refuse NaN.

A public hook on the base optimizer (`register_step_pre_hook`) is the one place where this is exact at every ZeRO stage:
lr = 0 would still move the moments and decay, and `requires_grad` toggles confuse ZeRO's buckets.

Whether a step happens is decided here, in the hook's first call of a step, from the loss and the gradients of *all*
parameter groups: ZeRO 1–3 step one group after the other, and a later group's NaN must not find the first one moved.
DeepSpeed's own checks, which depend on its version, the stage, the precision and switches, come before and may refuse a
step too (with fp16 they drive the loss scale); nothing here relies on them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from esvit_scale.parallel import collectives
from esvit_scale.parallel.partitions import Partition

FREEZABLE = "last_layer"  # the `name` of the parameter group that `freeze` acts on


class GradientClipper:
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
        waiting: Callable[[], Iterable[Tensor]],
    ) -> None:
        """
        Args:
            names: of all trainable parameters.
            watched: those of them whose updates `watch` measures.
            device: where ranks exchange numbers (with offloading, gradients may lie elsewhere).
            waiting: this rank's reduced gradients that ZeRO has not handed to the optimizer yet.
        """
        self._loss: Tensor | None = None
        self._freeze = self._measure = False
        self.watched = watched
        self._watched = {name: i for i, name in enumerate(watched)}
        self._changes = torch.zeros(len(watched), 2, device=device)
        self._before: list[tuple[Partition, Tensor]] = []
        self.names = names
        self._index = {name: i for i, name in enumerate(names)}
        self._by_flat: dict[int, list[Partition]] = defaultdict(list)
        for partition in partitions:
            self._by_flat[id(partition.flat)].append(partition)
        self.device = device
        self._zero_stage, self._clip, self._clip_by = zero_stage, clip, clip_by
        self._waiting = waiting
        self._squares: list[Tensor] = []
        self._finite = True
        self._aside: list[tuple[Tensor, Tensor | None]] = []
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def prepare(self, loss: Tensor, freeze_last_layer: bool, measure_updates: bool) -> None:
        """Say what the next step of the optimizer is to do.

        Args:
            loss: this rank's; a step whose loss is not finite on some rank is refused.
            freeze_last_layer: withhold the gradients of the group FREEZABLE.
            measure_updates: measure the updates of the watched parameters, for `take_changes`.
        """
        self._loss, self._freeze, self._measure = loss, freeze_last_layer, measure_updates

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
        """Return False when a NaN or an infinity, on any rank, emptied the last step; the next one starts anew."""
        finite, self._finite = self._finite, True
        return finite

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        flats = [flat for group in optimizer.param_groups for flat in group["params"]]
        owned = [p for flat in flats if flat.grad is not None for p in self._by_flat[id(flat)]]
        first = not self._squares
        squares, others = self._tensor_squares(owned, first)  # [number of parameters], scalar
        self._squares.append(squares)
        if first:
            self._finite = bool(torch.isfinite(squares.sum() + others))
        if not self._finite:
            self._set_aside(flats)
            return
        self._scale(owned, squares.sqrt())
        for group in optimizer.param_groups:
            if self._freeze and group["name"] == FREEZABLE:
                self._set_aside(group["params"])
        if self._measure:
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

    def _tensor_squares(self, owned: list[Partition], first: bool) -> tuple[Tensor, Tensor]:
        """Return the squared norm of every parameter's gradient [number of parameters], zero for those not in this
        call, and, in the first call of a step, one number that is not finite when anything else of the step is not:
        a gradient that waits for a later call, or a rank's loss."""
        squares = torch.zeros(len(self._index) + 1, device=self.device)
        if owned:
            mine = torch.stack([p.grad.norm() for p in owned if p.grad is not None]).square()
            at = torch.tensor([self._index[p.name] for p in owned], device=self.device)
            squares[at] = mine.float().to(self.device)
        if first:
            squares[-1] = self._others()
        if self._zero_stage > 0:
            collectives.all_reduce_sum_(squares)
        elif first:
            collectives.all_reduce_sum_(squares[-1:])  # gradients are the same on all ranks, losses are not
        return squares[:-1], squares[-1]

    def _others(self) -> Tensor:
        """Return the sum of squared norms of all this rank's gradients, NaN when its loss is not finite."""
        in_place = (p.grad for partitions in self._by_flat.values() for p in partitions if p.grad is not None)
        gradients = [*self._waiting(), *in_place]
        total = torch.zeros((), device=self.device)
        if gradients:
            norms = torch._foreach_norm(gradients, 2, torch.float32)  # fp16 norms would overflow
            total += torch.stack([norm.to(self.device) for norm in norms]).square().sum()
        if self._loss is not None:
            total += torch.where(torch.isfinite(self._loss), 0.0, torch.nan).to(self.device)
        return total

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
