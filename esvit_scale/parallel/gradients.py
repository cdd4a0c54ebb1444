"""Hooks between ZeRO's reduction of gradients and the optimizer's step: they clip gradients, freeze parts, and skip a step whose loss or gradients are not finite.

They are step hooks of the base optimizer (`register_step_pre_hook`), the one place that sees exact gradients at every
ZeRO stage. The last layer and the trunk are frozen by hiding their gradients from the optimizer, because with lr = 0 its moments would
still change, and changes of `requires_grad` confuse ZeRO's buckets.

The first hook call of a step decides whether the step happens, from the loss and the gradients of *all* parameter
groups: ZeRO 1–3 step one group after the other, and if a later group has a NaN, the first must not have moved.
Depending on its version, the stage, the precision and settings, DeepSpeed checks for NaN earlier and may skip a step as
well (with fp16 this drives the loss scale); nothing here relies on its checks.

This decision is the one point of a step at which the host waits for the GPU: the optimizer is called by the host, so it
must know. The same reduction and the same read carry the flags that ranks tell each other (train/signals.py).
"""

from collections import defaultdict
from typing import Any, Literal

import torch
from torch import Tensor

from esvit_scale.objective.param_groups import TRUNK, kind_of
from esvit_scale.parallel.zero import Layout, Partition

FLAGS = 8  # bits of the flags that ranks exchange


class GradientClipper:
    """The hooks around an optimizer step, with what they measure: gradient norms, update sizes, whether all is finite.

    ZeRO 1–3 step one parameter group at a time, so that the hooks run several times per step; each call handles the
    groups that are about to be stepped.

    Attributes:
        names: names of all trainable parameters.
        watched: names of the parameters whose updates are measured.
        device: device of the tensors that ranks exchange (with offloading, gradients may be elsewhere).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        layout: Layout,
        names: list[str],
        watched: list[str],
        clip: float | None,
        clip_by: Literal["tensor", "global"],
        device: torch.device,
    ) -> None:
        """Register the hooks on the base optimizer. They scale gradients down to a norm of at most `clip`, of each
        parameter or of all together; None: no clipping."""
        self._loss: Tensor | None = None
        self._freeze_last_layer = self._freeze_trunk = self._measure = False
        self._own_flags = 0
        self._flags: int | None = None  # of all ranks
        self.names, self.watched, self.device = names, watched, device
        self._index = {name: i for i, name in enumerate(names)}
        self._watched = {name: i for i, name in enumerate(watched)}
        self._layout, self._clip, self._clip_by = layout, clip, clip_by
        self._by_flat: dict[int, list[Partition]] = defaultdict(list)
        for partition in layout.partitions:
            self._by_flat[id(partition.flat)].append(partition)
        self._finite = True
        self._squares: list[Tensor] = []  # one [number of parameters] per call of the hook in the step under way
        self._changes = torch.zeros(len(watched), 2, device=device)
        self._places: dict[tuple[int, ...], Tensor] = {}  # see `_places_of`
        self._before: list[tuple[Partition, Tensor]] = []
        self._withheld: list[tuple[Tensor, Tensor | None]] = []
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def prepare(
        self,
        loss: Tensor,
        freeze_last_layer: bool,
        measure_updates: bool,
        flags: int = 0,
        freeze_trunk: bool = False,
    ) -> None:
        """Set what the hooks do in the next step of the optimizer.

        Args:
            loss: this rank's loss; the step is skipped if it is not finite on some rank.
            freeze_last_layer: keep values and optimizer state of the prototypes as they are.
            measure_updates: measure the updates of the watched parameters, for `take_changes`.
            flags: this rank's flags for all ranks, up to FLAGS bits.
            freeze_trunk: keep values and optimizer state of the trunk as they are; it needs parameter groups of its own.
        """
        self._loss, self._measure, self._own_flags = loss, measure_updates, flags
        self._freeze_last_layer, self._freeze_trunk = freeze_last_layer, freeze_trunk

    def take_squares(self) -> Tensor:
        """Return, and forget, the last step's squared gradient norm of every parameter [number of parameters], before
        clipping; NaN when ZeRO skipped the step."""
        squares, self._squares = self._squares, []
        return torch.stack(squares).sum(0) if squares else torch.full((len(self._index),), torch.nan)

    def take_changes(self) -> Tensor:
        """Return, and forget, the squared norms of the last step's update and of the value before it, for every watched
        parameter [watched, 2]. All ranks call it, after a step that was prepared with `measure_updates`."""
        changes, self._changes = self._changes, torch.zeros(len(self._watched), 2, device=self.device)
        return self._layout.sum_over_ranks_(changes)

    def take_finite(self) -> bool:
        """Return, and forget, whether loss and gradients of the last step were finite on all ranks; if not, the hooks
        skipped the step."""
        finite, self._finite = self._finite, True
        return finite

    def take_flags(self) -> int | None:
        """Return, and forget, the bitwise OR of all ranks' flags; None on all ranks when ZeRO skipped the step before
        the hooks ran, so that nothing was exchanged."""
        flags, self._flags = self._flags, None
        return flags

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        flats = [flat for group in optimizer.param_groups for flat in group["params"]]
        owned = [p for flat in flats if flat.grad is not None for p in self._by_flat[id(flat)]]
        first = not self._squares
        squares, others, flags = self._tensor_squares(owned, first)  # [number of parameters], scalar, [FLAGS]
        self._squares.append(squares)
        if first:
            finite = torch.isfinite(squares.sum() + others)
            is_finite, *counts = torch.cat([finite[None].float(), flags]).tolist()  # the step's one wait for the device
            self._finite, self._flags = bool(is_finite), sum(1 << i for i, count in enumerate(counts) if count)
        if not self._finite:
            self._withhold(flats)
            return
        self._scale(owned, squares.sqrt())
        for group in optimizer.param_groups:
            if self._is_frozen(group["name"]):
                self._withhold(group["params"])
        if self._measure:
            self._before = [(p, p.master.clone()) for p in owned if p.name in self._watched]

    def _is_frozen(self, group: str) -> bool:
        """Return whether the parameter group of this name does not move in this step."""
        if self._freeze_trunk and group.startswith(TRUNK):
            return True
        return self._freeze_last_layer and kind_of(group) == "last_layer"

    def _withhold(self, flats: list[Tensor]) -> None:
        """Hide gradients from the optimizer, so that it changes neither values nor moments nor its step count."""
        for flat in flats:
            self._withheld.append((flat, flat.grad))
            flat.grad = None

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Put hidden gradients back (with offloading, ZeRO writes the next ones into the same tensors), and measure how
        far the watched parameters moved."""
        for flat, grad in self._withheld:
            flat.grad = grad
        self._withheld.clear()
        for p, before in self._before:
            pair = torch.stack([(p.master - before).norm() ** 2, before.norm() ** 2])
            self._changes[self._watched[p.name]] += pair.to(self.device)
        self._before = []

    def _tensor_squares(self, owned: list[Partition], first: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the squared gradient norms over all ranks, a scalar that tells if the rest of the step is finite, and
        for every flag the number of ranks that set it.

        There is one norm for every parameter [number of parameters], zero for parameters that this call does not step.
        The scalar is not finite if some rank's loss, or a gradient that a later call steps, is not;
        it and the flags are filled in the `first` call of a step, and are 0 otherwise.
        """
        count = len(self._index)
        squares = torch.zeros(count + 1 + FLAGS, device=self.device)
        if owned:
            mine = torch.stack([p.grad.norm() for p in owned if p.grad is not None]).square()
            squares.index_copy_(0, self._places_of(owned), mine.float().to(self.device))
        if first:
            squares[count] = self._others()
            for i in range(FLAGS):
                if self._own_flags >> i & 1:
                    squares[count + 1 + i].fill_(1)
        # The losses and flags differ between ranks at every stage.
        self._layout.sum_over_ranks_(squares, per_rank=1 + FLAGS)
        return squares[:count], squares[count], squares[count + 1 :]

    def _places_of(self, owned: list[Partition]) -> Tensor:
        """Return the indices of the partitions' parameters in `names`, on the device: kept from step to step, since the
        host would wait for the GPU to copy them."""
        key = tuple(map(id, owned))
        if key not in self._places:
            self._places[key] = torch.tensor([self._index[p.name] for p in owned], device=self.device)
        return self._places[key]

    def _others(self) -> Tensor:
        """Return the sum of the squared norms of all gradients of this rank, in place and pending; NaN when this rank's
        loss is not finite."""
        in_place = (p.grad for partitions in self._by_flat.values() for p in partitions if p.grad is not None)
        gradients = [*self._layout.pending_gradients(), *in_place]
        total = torch.zeros((), device=self.device)
        if gradients:
            norms = torch._foreach_norm(gradients, 2, torch.float32)  # fp16 norms would overflow
            total += torch.stack([norm.to(self.device) for norm in norms]).square().sum()
        if self._loss is not None:
            total += torch.where(torch.isfinite(self._loss), 0.0, torch.nan).to(self.device)
        return total

    def _scale(self, owned: list[Partition], norms: Tensor) -> None:
        """Clip the gradients of `owned` in place, given the gradient norms of all parameters [number of parameters]."""
        if self._clip is None or not owned:
            return
        if self._clip_by == "tensor":
            factors = (self._clip / (norms + 1e-6)).clamp(max=1.0)  # [number of parameters]
            for p in owned:
                p.grad.mul_(factors[self._index[p.name]].to(p.grad.device))  # type: ignore[union-attr]
        elif not self._layout.deepspeed_clips_globally:
            factor = (self._clip / (norms.square().sum().sqrt() + 1e-6)).clamp(max=1.0)
            for p in owned:
                p.grad.mul_(factor)  # type: ignore[union-attr]
