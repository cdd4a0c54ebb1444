"""Muon for the matrices of hidden layers, and AdamW for all other parameters, at every ZeRO stage.

For a matrix W [m, n] with gradient G, as its author publishes it (Jordan 2024, kellerjordan.github.io/posts/muon), with
the weight decay and the scale of Moonlight (Liu et al. 2025, arXiv 2502.16982, equation 4):

    B ← μ B + (1 − μ) G
    O ← NewtonSchulz((1 − μ) G + μ B)                      Nesterov; the update with its singular values near 1
    W ← W − lr (0.2 √max(m, n) · O + wd · W)

The scale gives the update the root mean square that AdamW's updates have, 0.2, so that both take the same lr and weight
decay: one that was found for AdamW can be kept.

O depends on the whole matrix, and a rank owns intervals of flat tensors. So every matrix has one owner; the costly ones
are given away first, each to the rank with the least to do. The ranks send the owner their intervals, it orthogonalises
the matrix, and it sends the intervals of the result back, in one exchange before and one after. The numbers are those of one process. At ZeRO 0,
where all ranks have the whole matrix, only the results travel.

Everything is computed in fp32: 5 iterations cost about 20·min(m, n) FLOPs per element, divided over the ranks, which is
3.3·min(m, n)/(tokens of a step) of the forward and backward.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from esvit_scale import ranges
from esvit_scale.config import Optim
from esvit_scale.objective.param_groups import MATRICES, Matrix, kind_of
from esvit_scale.parallel import collectives
from esvit_scale.parallel.zero import Partition

# Jordan's quintic polynomial and number of iterations: it brings singular values from 0.01 to 1 to between about 0.7 and 1.15.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7  # a smaller norm than this is rounding noise, and is not scaled up to 1
UPDATE_RMS = 0.2  # of AdamW's updates, as Moonlight measured it
BATCH = 2**24  # elements of the matrices that are orthogonalised at once


def newton_schulz(matrices: Tensor) -> Tensor:
    """Return matrices [N, m, n] with the same singular vectors and all singular values near 1 (about 0.7 to 1.15).

    Every matrix X, divided by its norm, goes through X ← a X + (b X Xᵀ + c (X Xᵀ)²) X. A matrix of zeros stays one.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices  # X Xᵀ is then the smaller one
    x = x / x.flatten(1).norm(dim=1).clamp(min=EPS)[:, None, None]
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon for the parameter groups of the kind MATRICES, and torch's fused AdamW for the other groups.

    Call `own` before the first step.
    """

    def __init__(self, groups: list[dict[str, Any]], config: Optim) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        others = [group for group in self.param_groups if kind_of(group["name"]) != MATRICES]
        # AdamW shares these groups, and so their tensors, lr and weight decay; `step` gives it the state, too.
        self._adamw = torch.optim.AdamW(others, lr=0.0, betas=config.betas, fused=True) if others else None
        self._momentum = config.muon_momentum
        self._exchanges: dict[frozenset[int], _Exchange] = {}

    def own(
        self,
        matrices: list[Matrix],
        partitions: list[Partition],
        stepped: dict[str, Tensor],
        device: torch.device,
    ) -> None:
        """Set what the tensors that this rank steps consist of; all ranks call it.

        Args:
            matrices: all matrices of these groups, in the same order on every rank.
            partitions: the intervals of parameters that this rank owns.
            stepped: the tensor that is stepped for every parameter (`Layout.stepped_tensors`).
            device: where matrices are orthogonalised and exchanged.
        """
        self._matrices, self._stepped, self._device = matrices, stepped, device
        self._partitions = {p.name: p for p in partitions}
        intervals = {p.name: (p.start, p.start + p.length) for p in partitions}
        everyone = collectives.gather_objects({m.name: intervals[m.name] for m in matrices if m.name in intervals})
        owners = _owners(matrices, len(everyone))
        self._shares = [_Share(m, owner, everyone) for m, owner in zip(matrices, owners, strict=True)]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient; all ranks call it. `closure` is not used."""
        for group in self.param_groups:
            if kind_of(group["name"]) == MATRICES:
                self._step_matrices(group, [flat for flat in group["params"] if flat.grad is not None])
        others = [group for group in self.param_groups if kind_of(group["name"]) != MATRICES]
        if self._adamw is not None and others:
            self._adamw.param_groups, self._adamw.state = others, self.state
            self._adamw.step()

    def _step_matrices(self, group: dict[str, Any], flats: list[Tensor]) -> None:
        """Update flat tensors of matrices; it uses their gradients as workspace."""
        if not flats:  # on all ranks alike: the step is skipped
            return
        for flat in flats:
            state = self.state[flat]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(flat)
            buffer = state["momentum_buffer"]
            buffer.lerp_(flat.grad, 1 - self._momentum)
            flat.grad.lerp_(buffer, self._momentum)  # type: ignore[union-attr]
        self._orthogonalise(flats)
        for flat in flats:
            flat.mul_(1 - group["lr"] * group["weight_decay"])
            flat.add_(flat.grad, alpha=-group["lr"])  # type: ignore[arg-type]

    @ranges.named("newton-schulz")
    def _orthogonalise(self, flats: list[Tensor]) -> None:
        """Replace the gradients of flat tensors by the scaled orthogonal matrices; all ranks call it."""
        key = frozenset(map(id, flats))
        if key not in self._exchanges:
            shares = [s for s in self._shares if id(self._stepped[s.matrix.name]) in key]
            self._exchanges[key] = _Exchange(shares, self._partitions)
        self._exchanges[key].run(self._device)


class _Share:
    """A matrix, its owner, and the interval of it [start, stop) that each rank has.

    Attributes:
        held: rank → interval of the flattened matrix that it has.
        sent: the part of `held` that ranks send to the owner: nothing if the owner has the whole matrix.
    """

    def __init__(self, matrix: Matrix, owner: int, intervals: list[dict[str, tuple[int, int]]]) -> None:
        size = matrix.rows * matrix.columns
        self.matrix, self.owner = matrix, owner
        self.held: dict[int, tuple[int, int]] = {}
        for rank, of_rank in enumerate(intervals):
            if matrix.name in of_rank:
                start, stop = (min(max(end - matrix.start, 0), size) for end in of_rank[matrix.name])
                if start < stop:
                    self.held[rank] = start, stop
        whole = self.held.get(owner) == (0, size)
        self.sent = {owner: self.held[owner]} if whole else self.held


class _Exchange:
    """The sending and orthogonalising of the matrices that are stepped at once, as this rank takes part in it."""

    def __init__(self, shares: list[_Share], partitions: dict[str, Partition]) -> None:
        rank, world = collectives.rank(), collectives.world_size()
        self._partitions = partitions
        self._mine = [s for s in shares if s.owner == rank]
        # In both directions, the intervals of all matrices of one owner are end to end, in the order of the matrices.
        owned_by: dict[int, list[_Share]] = defaultdict(list)
        for share in shares:
            owned_by[share.owner].append(share)
        self._to_owners = [[s for s in owned_by[owner] if rank in s.sent] for owner in range(world)]
        self._from_ranks = [[s for s in self._mine if r in s.sent] for r in range(world)]
        self._to_ranks = [[s for s in self._mine if r in s.held] for r in range(world)]
        self._from_owners = [[s for s in owned_by[owner] if rank in s.held] for owner in range(world)]
        self._rank = rank

    def run(self, device: torch.device) -> None:
        """Replace this rank's intervals of the gradients by those of the scaled orthogonal matrices."""
        intervals = [[self._local(s) for s in of_owner] for of_owner in self._to_owners]
        received = _exchange(
            intervals, [[_length(s.sent[r]) for s in of] for r, of in enumerate(self._from_ranks)], device
        )
        whole = self._assemble(received)
        for batch in _batches(self._mine):
            rows, columns = batch[0].matrix.rows, batch[0].matrix.columns
            stack = torch.stack([whole[id(s)] for s in batch]).view(-1, rows, columns)
            scaled = newton_schulz(stack).mul_(UPDATE_RMS * max(rows, columns) ** 0.5)
            whole |= {id(s): matrix.flatten() for s, matrix in zip(batch, scaled, strict=True)}
        results = [[whole[id(s)][slice(*s.held[r])] for s in of_rank] for r, of_rank in enumerate(self._to_ranks)]
        lengths = [[_length(s.held[self._rank]) for s in of_owner] for of_owner in self._from_owners]
        for of_owner, parts in zip(self._from_owners, _exchange(results, lengths, device), strict=True):
            for share, part in zip(of_owner, parts, strict=True):
                self._local(share).copy_(part)

    def _assemble(self, received: list[list[Tensor]]) -> dict[int, Tensor]:
        """Return this rank's matrices, flattened, by id of the share, from the intervals that came from each rank."""
        whole: dict[int, Tensor] = {}
        for r, (of_rank, parts) in enumerate(zip(self._from_ranks, received, strict=True)):
            for share, part in zip(of_rank, parts, strict=True):
                size = share.matrix.rows * share.matrix.columns
                if len(part) == size:
                    whole[id(share)] = part
                else:
                    whole.setdefault(id(share), part.new_empty(size))[slice(*share.sent[r])] = part
        return whole

    def _local(self, share: _Share) -> Tensor:
        """Return this rank's interval of a matrix in the gradient, as a view."""
        partition, (start, stop) = self._partitions[share.matrix.name], share.held[self._rank]
        assert partition.grad is not None
        return partition.grad.narrow(0, share.matrix.start + start - partition.start, stop - start)


def _exchange(parts: list[list[Tensor]], lengths: list[list[int]], device: torch.device) -> list[list[Tensor]]:
    """Send a list of 1-D tensors to every rank, and return the lists that came from every rank, on `device`.

    Args:
        lengths: the lengths of the tensors that come from each rank.
    """
    dtypes = [part.dtype for to_rank in parts for part in to_rank]
    nothing = torch.empty(0, device=device, dtype=dtypes[0] if dtypes else torch.float32)
    joined = [torch.cat([nothing, *(part.to(device) for part in to_rank)]) for to_rank in parts]
    received = collectives.exchange(joined, [sum(of_rank) for of_rank in lengths])
    return [list(t.split(of_rank)) if of_rank else [] for t, of_rank in zip(received, lengths, strict=True)]


def _length(interval: tuple[int, int]) -> int:
    return interval[1] - interval[0]


def _cost(matrix: Matrix) -> int:
    """Return a number in proportion to the FLOPs of `newton_schulz`."""
    return matrix.rows * matrix.columns * min(matrix.rows, matrix.columns)


def _owners(matrices: list[Matrix], ranks: int) -> list[int]:
    """Return the rank that orthogonalises each matrix: the costly ones first, each to the rank with the least to do."""
    loads, owners = [0] * ranks, [0] * len(matrices)
    for i in sorted(range(len(matrices)), key=lambda i: -_cost(matrices[i])):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += _cost(matrices[i])
    return owners


def _batches(shares: list[_Share]) -> Iterator[list[_Share]]:
    """Yield the matrices in lists of one shape and at most BATCH elements (or one matrix)."""
    by_shape: dict[tuple[int, int], list[_Share]] = defaultdict(list)
    for share in shares:
        by_shape[share.matrix.rows, share.matrix.columns].append(share)
    for (rows, columns), alike in by_shape.items():
        at_once = max(1, BATCH // (rows * columns))
        for i in range(0, len(alike), at_once):
            yield alike[i : i + at_once]
