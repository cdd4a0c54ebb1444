"""The most similar training samples of every test sample: exact, in one pass over a bank that need not fit in memory."""

import torch
from torch import Tensor
from torch.nn import functional as F

BANK_ROWS_PER_BLOCK, QUERIES_PER_BLOCK = 2**15, 2**8  # compared at once: 32 MB of similarities


def nearest_neighbours(
    bank: Tensor, queries: Tensor, k: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Cosine similarity float32 [Q, k] and row in `bank` int64 [Q, k] of every query's k nearest, best first, on the CPU.

    bank [N, C] and queries [Q, C] may be of any floating type and mapped from files; k ≤ N. Memory: the queries in fp32,
    the result, and fixed blocks, whatever N is. The bank is read once.
    """
    queries = F.normalize(queries.float(), dim=1).to(device)  # [Q, C]
    best = queries.new_full((len(queries), k), -torch.inf)
    rows = torch.zeros(len(queries), k, dtype=torch.int64, device=device)
    room = queries.new_empty(
        QUERIES_PER_BLOCK * BANK_ROWS_PER_BLOCK
    )  # one for all blocks: fresh memory each time costs a third more
    for first in range(0, len(bank), BANK_ROWS_PER_BLOCK):
        some = F.normalize(bank[first : first + BANK_ROWS_PER_BLOCK].to(device).float(), dim=1)  # [n, C]
        for start in range(0, len(queries), QUERIES_PER_BLOCK):
            block = slice(start, start + QUERIES_PER_BLOCK)
            q = queries[block]
            similarity = torch.mm(q, some.T, out=room[: len(q) * len(some)].view(len(q), len(some)))
            values, index = similarity.topk(min(k, len(some)))
            best[block], place = torch.cat([best[block], values], 1).topk(k)
            rows[block] = torch.cat([rows[block], index + first], 1).gather(1, place)
    return best.cpu(), rows.cpu()
