"""The optimizer that ZeRO steps: AdamW, SGD, the layer-wise LAMB and LARS, Muon, and NVIDIA apex's fused ones.

At stages 1 to 3, ZeRO hands an optimizer flat tensors that hold many parameters end to end. AdamW and SGD work element
by element, so that this changes nothing for them. LAMB and LARS scale the update of every parameter by its own norms:
they compute these by partition, with one all-reduce, and do the same at every stage. Muon's update of a matrix needs the
whole matrix, which ranks send to its owner (parallel/muon.py). apex's LAMB takes the norms of the
tensors that it is given, which would be whole buffers: it is refused at stages 1 to 3.
"""

import importlib
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esvit_scale.config import Optim
from esvit_scale.errors import UserError
from esvit_scale.objective.param_groups import MATRICES, kind_of
from esvit_scale.parallel.muon import Muon
from esvit_scale.parallel.zero import Partition

# Tensors that each optimizer keeps per parameter, by their names in `optimizer.state` and in checkpoints.
MOMENTS: dict[str, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "lamb": ("exp_avg", "exp_avg_sq"),
    "apex_adam": ("exp_avg", "exp_avg_sq"),
    "apex_lamb": ("exp_avg", "exp_avg_sq"),
    "muon": ("exp_avg", "exp_avg_sq"),  # of the parameters that it leaves to AdamW
    "sgd": ("momentum_buffer",),
    "lars": ("momentum_buffer",),
}
_MOMENTS_OF_MATRICES = ("momentum_buffer",)  # of Muon
LARS_TRUST = 1e-3
LAMB_EPS = 1e-6  # as apex's; AdamW's is 1e-8


def moments(name: str, group: str) -> tuple[str, ...]:
    """Return the names of the tensors that the optimizer `name` keeps for each parameter of a parameter group."""
    return _MOMENTS_OF_MATRICES if kind_of(group) == MATRICES else MOMENTS[name]


def build(config: Optim, groups: list[dict[str, Any]], flat: bool) -> torch.optim.Optimizer:
    """Return the optimizer of `optim.name`, given param groups {"name", "params"}; every step sets lr and weight decay.

    Args:
        flat: whether ZeRO gives the optimizer flat tensors that hold many parameters (`Layout.steps_flat_tensors`).

    Raises:
        UserError: the optimizer is apex's, and apex is not installed; or it is apex's LAMB, and `flat` is true.
    """
    start: dict[str, Any] = {"lr": 0.0, "weight_decay": 0.0}
    if config.name == "adamw":
        # One pass over the parameters instead of a dozen, on a CPU as well.
        return torch.optim.AdamW(groups, betas=config.betas, fused=True, **start)
    if config.name == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, **start)
    if config.name in ("lamb", "lars"):
        return LayerWise(groups, config)
    if config.name == "muon":
        return Muon(groups, config)
    apex = _apex(config.name)
    if config.name == "apex_adam":
        return apex.FusedAdam(groups, betas=config.betas, adam_w_mode=True, **start)
    if flat:
        raise UserError(
            "optim.name=apex_lamb: at ZeRO 1–3 it takes norms of whole buffers, not of parameters; use optim.name=lamb, "
            "which is right at every stage, or train.ds_config=zero0 train.precision=fp32"
        )
    return apex.FusedLAMB(groups, betas=config.betas, max_grad_norm=0.0, **start)


def _apex(name: str) -> Any:
    try:
        return importlib.import_module("apex.optimizers")  # the unrelated package of that name has no such module
    except ImportError:
        instead = {"apex_adam": "adamw (torch's, fused too)", "apex_lamb": "lamb"}[name]
        raise UserError(f"optim.name={name}: NVIDIA apex is not installed; use {instead}") from None


class LayerWise(torch.optim.Optimizer):
    """LAMB (You et al. 2020) or LARS (You et al. 2017, as MoCo v3 runs it) on flat partitions.

    LAMB: u = m̂/(√v̂ + ε) + wd·w;  w ← w − lr · ‖w‖/‖u‖ · u.
    LARS: u = g + wd·w;  b ← momentum·b + 0.001·‖w‖/‖u‖ · u;  w ← w − lr·b.
    Neither scales the updates of parameters without decay (biases, 1-D tensors).

    Call `own` before the first step.
    """

    def __init__(self, groups: list[dict[str, Any]], config: Optim) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self._lamb = config.name == "lamb"
        self._betas, self._momentum = config.betas, config.momentum
        self._by_flat: dict[int, list[Partition]] = defaultdict(list)
        self._index: dict[str, int] = {}

    def own(self, partitions: list[Partition], names: list[str], sum_over_ranks_: Callable[[Tensor], Tensor]) -> None:
        """Set which intervals of which parameters the tensors that this rank steps consist of.

        Args:
            partitions: the intervals that this rank owns.
            names: names of all trainable parameters, in the same order on every rank.
            sum_over_ranks_: sums in place what each rank measured on its partitions (`Layout.sum_over_ranks_`).
        """
        self._index = {name: i for i, name in enumerate(names)}
        for partition in partitions:
            self._by_flat[id(partition.flat)].append(partition)
        self._sum_over_ranks_ = sum_over_ranks_

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient; all ranks call it. `closure` is not used."""
        stepped = [(group, flat) for group in self.param_groups for flat in group["params"] if flat.grad is not None]
        updates = [self._update(flat, group) for group, flat in stepped]
        trusts = self._trusts(stepped, updates)
        for (group, flat), update in zip(stepped, updates, strict=True):
            if kind_of(group["name"]) != "no_decay":
                for p in self._by_flat[id(flat)]:
                    p.within(update).mul_(trusts[self._index[p.name]])
            if not self._lamb:
                state = self.state[flat]
                buffer = state.setdefault("momentum_buffer", torch.zeros_like(flat))
                update = buffer.mul_(self._momentum).add_(update)
            flat.add_(update, alpha=-group["lr"])

    def _update(self, flat: Tensor, group: dict[str, Any]) -> Tensor:
        if not self._lamb:
            return flat.grad.add(flat, alpha=group["weight_decay"])  # type: ignore[union-attr]
        state, (beta1, beta2) = self.state[flat], self._betas
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
        state["step"] += 1
        state["exp_avg"].lerp_(flat.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(flat.grad, flat.grad, value=1 - beta2)
        count = float(state["step"])
        root = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(LAMB_EPS)
        return (state["exp_avg"] / (1 - beta1**count)).div_(root).add_(flat, alpha=group["weight_decay"])

    def _trusts(self, stepped: list[tuple[dict[str, Any], Tensor]], updates: list[Tensor]) -> Tensor:
        """Return the trust ratio ‖w‖/‖u‖ of every parameter in this step [parameters], for LARS times LARS_TRUST; 1
        where a norm is zero."""
        squares = torch.zeros(2, len(self._index), device=updates[0].device if updates else None)
        for (_, flat), update in zip(stepped, updates, strict=True):
            for p in self._by_flat[id(flat)]:
                squares[0, self._index[p.name]] = p.master.norm() ** 2
                squares[1, self._index[p.name]] = p.within(update).norm() ** 2
        weights, of_updates = self._sum_over_ranks_(squares).sqrt()
        known = (weights > 0) & (of_updates > 0)
        return torch.where(known, weights / of_updates * (1.0 if self._lamb else LARS_TRUST), 1.0)
