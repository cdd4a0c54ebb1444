"""The Triton kernels of window attention, forward and backward; importing this module imports triton.

Scores and probabilities exist in registers only, as tiles of query rows × key columns of one head in one window.
Windows of up to 64 slots are one tile: a program keeps the tile's position bias, looks at a share of the windows, and
the backward is one kernel, `backward_whole`. Larger windows are several tiles per head, and the backward is three
kernels: gradients of queries, of keys and values, and of the table.
"""

import triton
import triton.language as tl

from esvit_scale.models.windows import MASKED

LARGEST_TILE = 64  # rows and columns; windows of more slots have several tiles …
SIDE_OF_SEVERAL = 32  # … of this side: with 64, their kernels would spill registers
WARPS, STAGES = 4, 1  # of a program

_MASKED = tl.constexpr(MASKED)


def tile_side(window: int) -> int:
    """Return the rows and columns of the tiles for windows of side `window`."""
    side = max(16, triton.next_power_of_2(window**2))
    return side if side <= LARGEST_TILE else SIDE_OF_SEVERAL


# Letters: S rows and columns of a tile, L slots of a window, D values of a head. `WIDE` converts bf16 to fp32 right
# after the load, because the interpreter would compute with the bit patterns of bf16. The grid of every kernel is
# (shares of the windows, heads, tiles).


@triton.jit
def _at(pointer, window, head, stride, L: tl.constexpr, D: tl.constexpr):
    """Return where the values of one head begin, in the first slot of a window."""
    return pointer + window * tl.full((), L, tl.int64) * stride + head * D


@triton.jit
def _rowwise_at(pointer, window, slots, head, heads, L: tl.constexpr):
    """Return where the two numbers of one head begin, for some slots of a window."""
    return pointer + ((window * tl.full((), L, tl.int64) + slots) * heads + head) * 2


@triton.jit
def _load(pointer, slots, stride, L: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr):
    """Load the values [S, D] of one head at some slots of a window; zeros beyond the window."""
    values = tl.load(pointer + slots[:, None] * stride + tl.arange(0, D)[None, :], mask=slots[:, None] < L, other=0.0)
    if WIDE:
        values = values.to(tl.float32)
    return values


@triton.jit
def _store(pointer, slots, stride, values, L: tl.constexpr, D: tl.constexpr):
    """Store the values [S, D] of one head at those of the slots that are in the window."""
    where = pointer + slots[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(where, values.to(pointer.dtype.element_ty), mask=slots[:, None] < L)


@triton.jit
def _dot(a, b):
    """Multiply matrices; fp32 as three products in tf32, which is as exact as fp32 to about 1e-6."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _bias(table, head, heads, queries, keys, WINDOW: tl.constexpr):
    """Look up the position bias of one head for broadcast queries and keys; −inf for keys beyond the window."""
    inside = (queries < WINDOW * WINDOW) & (keys < WINDOW * WINDOW)
    dy = queries // WINDOW - keys // WINDOW + WINDOW - 1
    dx = queries % WINDOW - keys % WINDOW + WINDOW - 1
    found = tl.load(table + (dy * (2 * WINDOW - 1) + dx) * heads + head, mask=inside, other=0.0)
    return tl.where((keys < WINDOW * WINDOW) & (queries >= 0), found, -float("inf"))


@triton.jit
def _region(slots, window, start1, start2, start3, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """Return the region of the unrolled map that each slot of a shifted window is in, a number of two bits.

    Windows are sorted by kind: interior, then from start1 last column, from start2 last row, from start3 corner.
    """
    last_row = window >= start2
    last_column = ((window >= start1) & (window < start2)) | (window >= start3)
    below = (slots // WINDOW >= WINDOW - SHIFT) & last_row
    right = (slots % WINDOW >= WINDOW - SHIFT) & last_column
    return below.to(tl.int32) * 2 + right.to(tl.int32)


@triton.jit
def _scores(a, b, scale, bias, of_rows, of_columns, SHIFT: tl.constexpr):
    """Return a bᵀ · scale + bias, plus the mask between slots of different regions, [S, S] in fp32."""
    scores = _dot(a, tl.trans(b)) * scale + bias
    if SHIFT > 0:
        scores = tl.where(of_rows[:, None] != of_columns[None, :], scores + _MASKED, scores)
    return scores


@triton.jit
def forward(
    qkv, table, out, rowwise, windows, start1, start2, start3, heads, scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, D: tl.constexpr, S: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the attention output; of windows of several tiles also each query's log Σ exp(scores), rowwise[…, 0].

    `rowwise` is [slots, heads, 2]. Tiles are blocks of query rows.
    """
    L: tl.constexpr = WINDOW * WINDOW
    WHOLE: tl.constexpr = L <= S
    head, width = tl.program_id(1), heads * D
    rows = tl.program_id(2) * S + tl.arange(0, S)
    if WHOLE:
        bias = _bias(table, head, heads, rows[:, None], tl.arange(0, S)[None, :], WINDOW)
    for window in range(tl.program_id(0), windows, tl.num_programs(0)):
        base = _at(qkv, window, head, 3 * width, L, D)
        q = _load(base, rows, 3 * width, L, D, WIDE)
        of_rows = _region(rows, window, start1, start2, start3, WINDOW, SHIFT)
        top = tl.full((S,), -float("inf"), tl.float32)
        total = tl.zeros((S,), tl.float32)
        mixed = tl.zeros((S, D), tl.float32)
        for first in range(0, L, S):
            columns = first + tl.arange(0, S)
            if not WHOLE:
                bias = _bias(table, head, heads, rows[:, None], columns[None, :], WINDOW)
            k = _load(base + width, columns, 3 * width, L, D, WIDE)
            v = _load(base + 2 * width, columns, 3 * width, L, D, WIDE)
            of_columns = _region(columns, window, start1, start2, start3, WINDOW, SHIFT)
            scores = _scores(q, k, scale, bias, of_rows, of_columns, SHIFT)
            higher = tl.maximum(top, tl.max(scores, 1))
            shrink = tl.exp(top - higher)
            weights = tl.exp(scores - higher[:, None])
            total = total * shrink + tl.sum(weights, 1)
            mixed = mixed * shrink[:, None] + _dot(weights.to(v.dtype), v)
            top = higher
        _store(_at(out, window, head, width, L, D), rows, width, mixed / total[:, None], L, D)
        if not WHOLE:
            tl.store(_rowwise_at(rowwise, window, rows, head, heads, L), top + tl.log(total), mask=rows < L)


@triton.jit
def backward_whole(
    qkv, table, grad, grad_qkv, partials, windows, start1, start2, start3, heads, scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, D: tl.constexpr, S: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the gradients of queries, keys and values, and a partial one of the table, for windows of one tile.

    `partials` is [shares, 1, heads, (2·WINDOW − 1)²].
    """
    L: tl.constexpr = WINDOW * WINDOW
    head, width = tl.program_id(1), heads * D
    rows = tl.arange(0, S)
    bias = _bias(table, head, heads, rows[:, None], rows[None, :], WINDOW)
    grad_bias = tl.zeros((S, S), tl.float32)
    for window in range(tl.program_id(0), windows, tl.num_programs(0)):
        base = _at(qkv, window, head, 3 * width, L, D)
        q = _load(base, rows, 3 * width, L, D, WIDE)
        k = _load(base + width, rows, 3 * width, L, D, WIDE)
        regions = _region(rows, window, start1, start2, start3, WINDOW, SHIFT)
        scores = _scores(q, k, scale, bias, regions, regions, SHIFT)
        weights = tl.exp(scores - tl.max(scores, 1)[:, None])
        weights = weights / tl.sum(weights, 1)[:, None]
        of_output = _load(_at(grad, window, head, width, L, D), rows, width, L, D, WIDE)
        base_grad = _at(grad_qkv, window, head, 3 * width, L, D)
        grad_v = _dot(tl.trans(weights.to(of_output.dtype)), of_output)
        _store(base_grad + 2 * width, rows, 3 * width, grad_v, L, D)
        v = _load(base + 2 * width, rows, 3 * width, L, D, WIDE)
        grad_weights = _dot(of_output, tl.trans(v))
        grad_scores = weights * (grad_weights - tl.sum(weights * grad_weights, 1)[:, None])
        grad_bias += grad_scores
        scaled = (grad_scores * scale).to(k.dtype)
        _store(base_grad, rows, 3 * width, _dot(scaled, k), L, D)
        _store(base_grad + width, rows, 3 * width, _dot(tl.trans(scaled), q), L, D)
    partials += (tl.program_id(0) * heads + head) * (2 * WINDOW - 1) * (2 * WINDOW - 1)
    _store_table(partials, grad_bias, rows, 0, WINDOW, S)


@triton.jit
def backward_queries(
    qkv, table, out, grad, grad_qkv, rowwise, windows, start1, start2, start3, heads, scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, D: tl.constexpr, S: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the gradients of queries, and Σ output · its gradient of each query into rowwise[…, 1].

    Tiles are blocks of query rows.
    """
    L: tl.constexpr = WINDOW * WINDOW
    head, width = tl.program_id(1), heads * D
    rows = tl.program_id(2) * S + tl.arange(0, S)
    for window in range(tl.program_id(0), windows, tl.num_programs(0)):
        base = _at(qkv, window, head, 3 * width, L, D)
        q = _load(base, rows, 3 * width, L, D, WIDE)
        of_output = _load(_at(grad, window, head, width, L, D), rows, width, L, D, WIDE)
        mixed = _load(_at(out, window, head, width, L, D), rows, width, L, D, WIDE)
        inner = tl.sum(mixed.to(tl.float32) * of_output.to(tl.float32), 1)
        where = _rowwise_at(rowwise, window, rows, head, heads, L)
        log_total = tl.load(where, mask=rows < L, other=0.0)
        tl.store(where + 1, inner, mask=rows < L)
        of_rows = _region(rows, window, start1, start2, start3, WINDOW, SHIFT)
        grad_q = tl.zeros((S, D), tl.float32)
        for first in range(0, L, S):
            columns = first + tl.arange(0, S)
            bias = _bias(table, head, heads, rows[:, None], columns[None, :], WINDOW)
            k = _load(base + width, columns, 3 * width, L, D, WIDE)
            v = _load(base + 2 * width, columns, 3 * width, L, D, WIDE)
            of_columns = _region(columns, window, start1, start2, start3, WINDOW, SHIFT)
            weights = tl.exp(_scores(q, k, scale, bias, of_rows, of_columns, SHIFT) - log_total[:, None])
            grad_weights = _dot(of_output, tl.trans(v))
            grad_q += _dot((weights * (grad_weights - inner[:, None]) * scale).to(k.dtype), k)
        _store(_at(grad_qkv, window, head, 3 * width, L, D), rows, 3 * width, grad_q, L, D)


@triton.jit
def backward_keys(
    qkv, table, grad, grad_qkv, rowwise, windows, start1, start2, start3, heads, scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, D: tl.constexpr, S: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the gradients of keys and values.

    Tiles are blocks of keys, and scores are transposed: keys are rows and queries columns.
    """
    L: tl.constexpr = WINDOW * WINDOW
    head, width = tl.program_id(1), heads * D
    rows = tl.program_id(2) * S + tl.arange(0, S)
    for window in range(tl.program_id(0), windows, tl.num_programs(0)):
        base = _at(qkv, window, head, 3 * width, L, D)
        k = _load(base + width, rows, 3 * width, L, D, WIDE)
        v = _load(base + 2 * width, rows, 3 * width, L, D, WIDE)
        of_rows = _region(rows, window, start1, start2, start3, WINDOW, SHIFT)
        grad_k = tl.zeros((S, D), tl.float32)
        grad_v = tl.zeros((S, D), tl.float32)
        for first in range(0, L, S):
            columns = first + tl.arange(0, S)
            bias = _bias(table, head, heads, columns[None, :], rows[:, None], WINDOW)
            q = _load(base, columns, 3 * width, L, D, WIDE)
            of_output = _load(_at(grad, window, head, width, L, D), columns, width, L, D, WIDE)
            where = _rowwise_at(rowwise, window, columns, head, heads, L)
            log_total = tl.load(where, mask=columns < L, other=0.0)
            inner = tl.load(where + 1, mask=columns < L, other=0.0)
            of_columns = _region(columns, window, start1, start2, start3, WINDOW, SHIFT)
            weights = tl.exp(_scores(k, q, scale, bias, of_rows, of_columns, SHIFT) - log_total[None, :])
            grad_v += _dot(weights.to(v.dtype), of_output)
            grad_weights = _dot(v, tl.trans(of_output))
            grad_k += _dot((weights * (grad_weights - inner[None, :]) * scale).to(k.dtype), q)
        base_grad = _at(grad_qkv, window, head, 3 * width, L, D)
        _store(base_grad + width, rows, 3 * width, grad_k, L, D)
        _store(base_grad + 2 * width, rows, 3 * width, grad_v, L, D)


@triton.jit
def backward_table(
    qkv, table, grad, partials, rowwise, windows, start1, start2, start3, heads, scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, D: tl.constexpr, S: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write a partial gradient of the table, [shares, tiles, heads, (2·WINDOW − 1)²]; tiles are pairs of blocks."""
    L: tl.constexpr = WINDOW * WINDOW
    BLOCKS: tl.constexpr = (L + S - 1) // S
    head, width = tl.program_id(1), heads * D
    rows = tl.program_id(2) // BLOCKS * S + tl.arange(0, S)
    first = tl.program_id(2) % BLOCKS * S
    columns = first + tl.arange(0, S)
    bias = _bias(table, head, heads, rows[:, None], columns[None, :], WINDOW)
    grad_bias = tl.zeros((S, S), tl.float32)
    for window in range(tl.program_id(0), windows, tl.num_programs(0)):
        base = _at(qkv, window, head, 3 * width, L, D)
        q = _load(base, rows, 3 * width, L, D, WIDE)
        k = _load(base + width, columns, 3 * width, L, D, WIDE)
        v = _load(base + 2 * width, columns, 3 * width, L, D, WIDE)
        of_output = _load(_at(grad, window, head, width, L, D), rows, width, L, D, WIDE)
        where = _rowwise_at(rowwise, window, rows, head, heads, L)
        log_total = tl.load(where, mask=rows < L, other=0.0)
        inner = tl.load(where + 1, mask=rows < L, other=0.0)
        of_rows = _region(rows, window, start1, start2, start3, WINDOW, SHIFT)
        of_columns = _region(columns, window, start1, start2, start3, WINDOW, SHIFT)
        weights = tl.exp(_scores(q, k, scale, bias, of_rows, of_columns, SHIFT) - log_total[:, None])
        grad_bias += weights * (_dot(of_output, tl.trans(v)) - inner[:, None])
    program = (tl.program_id(0) * tl.num_programs(2) + tl.program_id(2)) * heads + head
    _store_table(partials + program * (2 * WINDOW - 1) * (2 * WINDOW - 1), grad_bias, rows, first, WINDOW, S)


@triton.jit
def _store_table(pointer, grad_bias, rows, first_column, WINDOW: tl.constexpr, S: tl.constexpr):
    """Sum a tile's gradient of the position bias [S, S] by table entry. A query meets each entry at one key at most."""
    SIDE: tl.constexpr = 2 * WINDOW - 1
    for first in range(0, SIDE * SIDE, S):
        entries = first + tl.arange(0, S)
        y = (rows // WINDOW)[:, None] - (entries // SIDE - (WINDOW - 1))[None, :]  # of the key, [S, S]
        x = (rows % WINDOW)[:, None] - (entries % SIDE - (WINDOW - 1))[None, :]
        column = y * WINDOW + x - first_column
        inside = (y >= 0) & (y < WINDOW) & (x >= 0) & (x < WINDOW) & (rows < WINDOW * WINDOW)[:, None]
        inside = inside & (column >= 0) & (column < S) & (entries < SIDE * SIDE)[None, :]
        found = tl.gather(grad_bias, tl.where(inside, column, 0), 1)
        tl.store(pointer + entries, tl.sum(tl.where(inside, found, 0.0), 0), mask=entries < SIDE * SIDE)
