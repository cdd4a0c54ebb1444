"""Sinkhorn-Knopp centring (SwAV, Caron et al. 2020; successors of DINO and iBOT centre their teacher with it).

Targets are made so that over the batch of all ranks every prototype gets the same share. The slow algorithm, which the
tests use as their oracle (z of all ranks):

    p = exp(z Wᵀ / temp)                      # [n, K]
    for _ in range(iterations):
        p = p / p.sum(0)                      # every prototype: the same share
        p = p / p.sum(1)                      # every token: a distribution

The loop only scales rows and columns: p_ik = u_i · exp(z_i·w_k/τ) · v_k. Since its last line makes each row a softmax
over k, the column scales v determine the result, and they act as a centre: p = softmax((z Wᵀ − c)/τ) with c_k =
−τ·log v_k. The loss is therefore that of objective/prototypes.py, and no tokens × K matrix is stored here either: each
half of an iteration is a pass of log-sum-exps over tiles of prototypes. Ranks exchange K numbers per iteration.
"""

import torch
from torch import Tensor

from esvit_scale.objective.objective import fixed_precision
from esvit_scale.objective.prototype_passes import Passes, Side
from esvit_scale.objective.prototype_tiles import TilePasses
from esvit_scale.parallel import collectives

ITERATIONS = 3  # as in all published recipes


@torch.no_grad()
def sinkhorn_center(z: Tensor, rows: Tensor, temp: float, passes: Passes | None = None) -> Tensor:
    """Return the centre c for which softmax((z Wᵀ − c)/temp) are the Sinkhorn-Knopp targets. All ranks must call it.

    Args:
        z: [n, D] unit rows of this rank; n is the same on all ranks.
        rows: [K, D] prototypes W.
        temp: temperature τ.
        passes: the implementation of the passes over all logits; None: `TilePasses`.

    Returns:
        The centre [K], in fp32 (fp64 for fp64).
    """
    z = z.to(rows.dtype)
    passes = passes or TilePasses()
    with fixed_precision(z.device):
        side = Side(z, rows, temp, None)
        log_u = z.new_zeros(len(z), dtype=torch.promote_types(z.dtype, torch.float32))
        center = temp * _column_log_sums(side, log_u, passes)
        for _ in range(ITERATIONS - 1):
            log_u = -passes.log_sum_exp(side._replace(center=center))
            center = temp * _column_log_sums(side, log_u, passes)
    return center


def _column_log_sums(side: Side, log_u: Tensor, passes: Passes) -> Tensor:
    """Return log Σ_i u_i exp(logit_ik) for each prototype k, over the tokens i of all ranks, [K]."""
    return collectives.log_add_exp_(passes.column_log_sum_exp(side, log_u))
