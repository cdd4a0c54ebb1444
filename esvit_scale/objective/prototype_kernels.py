"""The Triton kernels of the prototype loss; importing this module imports triton.

Logits and probabilities exist in registers only, as tiles of tokens × prototypes. `over_columns` walks over the
prototypes for a block of tokens, as flash attention does over keys: each token's log-sum-exp, entropy and mean prototype
under its probabilities. `gradient_of_rows` walks over the tokens for a block of prototypes, whose gradient is
complete at the end of the walk and is written once. Logits are computed in both, so there are four matrix products.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
# The logit of a column beyond the last one: finite, because 0 · −inf would be NaN in the sum of the entropy.
_LOWEST = tl.constexpr(-1.0e30)


# Letters: D numbers of a token or prototype, D_TILE the power of two that holds them, ROWS and COLUMNS of a tile.
# `WIDE` converts bf16 to fp32 right after the load, because the interpreter would compute with the bit patterns of bf16.


@triton.jit
def _load(pointer, first, count, D: tl.constexpr, D_TILE: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Load ROWS rows of a matrix [count, D] from row `first` on, as [ROWS, D_TILE]; zeros beyond the matrix."""
    rows, numbers = tl.arange(0, ROWS), tl.arange(0, D_TILE)
    inside = (rows < count - first)[:, None]
    if D < D_TILE:
        inside = inside & (numbers < D)[None, :]
    # Only the first row's place needs 64 bits; offsets in 64 bits would cost registers.
    pointer += tl.cast(first, tl.int64) * D
    values = tl.load(pointer + rows[:, None] * D + numbers[None, :], mask=inside, other=0.0)
    if WIDE:
        values = values.to(tl.float32)
    return values


@triton.jit
def _store(pointer, first, count, values, D: tl.constexpr, D_TILE: tl.constexpr, ROWS: tl.constexpr):
    """Store values [ROWS, D_TILE] in a matrix [count, D] from row `first` on, as far as it has them."""
    rows, numbers = tl.arange(0, ROWS), tl.arange(0, D_TILE)
    inside = (rows < count - first)[:, None] & (numbers < D)[None, :]
    pointer += tl.cast(first, tl.int64) * D
    tl.store(pointer + rows[:, None] * D + numbers[None, :], values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b):
    """Multiply matrices; fp32 as three products in tf32, which is as exact as fp32 to about 1e-6."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def over_columns(
    rows_of, columns_of, values_of, bias, log_sums, entropies, means, n, k, columns_per_split, scale,
    D: tl.constexpr, D_TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    MEANS: tl.constexpr, OTHER_VALUES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write, for each row of logits = rows columnsᵀ · scale + bias, log Σ exp(logits) over the columns of a split.

    With `MEANS`, write also the entropy of p = softmax(logits) and the mean p V, V = `values_of` if `OTHER_VALUES` and
    the columns otherwise.

    The grid is (blocks of rows, splits). `rows_of` is [n, D], `columns_of` and `values_of` [k, D], `bias` [k];
    `log_sums` and `entropies` are [splits, n], `means` [splits, n, D]. Every split begins before k.
    """
    first_row = tl.program_id(0) * ROWS
    tokens = _load(rows_of, first_row, n, D, D_TILE, ROWS, WIDE)
    top = tl.full((ROWS,), _LOWEST, tl.float32)  # top, logits and below are in units of ln 2
    total = tl.zeros((ROWS,), tl.float32)
    if MEANS:
        below = tl.zeros((ROWS,), tl.float32)  # Σ weights · (logits − top)
        mean = tl.zeros((ROWS, D_TILE), tl.float32)
    first = tl.program_id(1) * columns_per_split
    for start in range(first, tl.minimum(first + columns_per_split, k), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        block = _load(columns_of, start, k, D, D_TILE, COLUMNS, WIDE)
        added = tl.load(bias + columns, mask=columns < k, other=_LOWEST) * _LOG2_E
        logits = _dot(tokens, tl.trans(block)) * (scale * _LOG2_E) + added[None, :]
        higher = tl.maximum(top, tl.max(logits, 1))
        shrink = tl.exp2(top - higher)
        logits = logits - higher[:, None]
        weights = tl.exp2(logits)
        if MEANS:
            below = shrink * (below + total * (top - higher)) + tl.sum(weights * logits, 1)
            if OTHER_VALUES:
                block = _load(values_of, start, k, D, D_TILE, COLUMNS, WIDE)
            mean = mean * shrink[:, None] + _dot(weights.to(block.dtype), block)
        total = total * shrink + tl.sum(weights, 1)
        top = higher
    rows = first_row + tl.arange(0, ROWS)
    out = tl.program_id(1) * n + rows
    log_total = tl.log2(total)
    tl.store(log_sums + out, (top + log_total) * _LN_2, mask=rows < n)
    if MEANS:
        tl.store(entropies + out, (log_total - below / total) * _LN_2, mask=rows < n)
        _store(means + tl.program_id(1).to(tl.int64) * n * D, first_row, n, mean / total[:, None], D, D_TILE, ROWS)


@triton.jit
def _add_tokens(
    gradient, mass, prototypes, bias, tokens_of, towards, log_sums, n, scale,
    D: tl.constexpr, D_TILE: tl.constexpr, COLUMNS: tl.constexpr, GRADIENT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return gradient + Pᵀ towards and mass + Pᵀ 1, with P the probabilities of all tokens for a block of prototypes."""
    for start in range(0, n, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        tokens = _load(tokens_of, start, n, D, D_TILE, COLUMNS, WIDE)
        log_sum = tl.load(log_sums + columns, mask=columns < n, other=float("inf"))  # tokens beyond n: p = 0
        logits = _dot(prototypes, tl.trans(tokens)) * (scale * _LOG2_E) + bias[:, None]
        p = tl.exp2(logits - (log_sum * _LOG2_E)[None, :])
        mass += tl.sum(p, 1)
        if GRADIENT:
            target = _load(towards, start, n, D, D_TILE, COLUMNS, WIDE)
            gradient += _dot(p.to(target.dtype), target)
    return gradient, mass


@triton.jit
def gradient_of_rows(
    z_s, rows_s, log_sums_s, towards_s, z_t, rows_t, log_sums_t, towards_t, bias, grad_rows, mass,
    n_s, n_t, k, scale_s, scale_t,
    D: tl.constexpr, D_TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GRADIENT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write Σ over teacher tokens of their probabilities, `mass` [k]; with `GRADIENT` also Pᵀ towards, `grad_rows` [k, D].

    P are the probabilities exp(logits − log_sums) of student and teacher tokens, and towards [n_s + n_t, D] comes in two
    parts. The teacher's logits are z_t rows_tᵀ · scale_t + bias, the student's without a bias. The grid is blocks of
    prototypes.
    """
    first_row = tl.program_id(0) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    gradient = tl.zeros((ROWS, D_TILE), tl.float32)
    of_teacher = tl.zeros((ROWS,), tl.float32)
    added = tl.load(bias + rows, mask=rows < k, other=0.0) * _LOG2_E
    block = _load(rows_t, first_row, k, D, D_TILE, ROWS, WIDE)
    gradient, of_teacher = _add_tokens(
        gradient, of_teacher, block, added, z_t, towards_t, log_sums_t, n_t, scale_t, D, D_TILE, COLUMNS, GRADIENT, WIDE
    )
    tl.store(mass + rows, of_teacher, mask=rows < k)
    if GRADIENT:
        block = _load(rows_s, first_row, k, D, D_TILE, ROWS, WIDE)
        nothing = tl.zeros((ROWS,), tl.float32)
        gradient, _ = _add_tokens(
            gradient,
            nothing,
            block,
            nothing,
            z_s,
            towards_s,
            log_sums_s,
            n_s,
            scale_s,
            D,
            D_TILE,
            COLUMNS,
            GRADIENT,
            WIDE,
        )
        _store(grad_rows, first_row, k, gradient, D, D_TILE, ROWS)
