"""Exact nearest-neighbour search by cosine similarity, in one pass over features that need not fit in memory."""

import torch
from torch import Tensor
from torch.nn import functional as F

BANK_ROWS_PER_BLOCK, QUERIES_PER_BLOCK = 2**15, 2**8  # compared at a time: 32 MB of similarities


def nearest_neighbours(
    bank: Tensor, queries: Tensor, k: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Find each query's k nearest rows of the bank, nearest first.

    Return their cosine similarities, float32 [Q, k], and their row numbers, int64 [Q, k], both on the CPU. The bank is
    read once, in blocks of a fixed size; besides a block, only the queries in fp32 and the result are in memory.

    Args:
        bank: features [N, C] of any floating-point type, possibly memory-mapped.
        queries: features [Q, C], likewise.
        k: number of neighbours, at most N.
    """
    queries = F.normalize(queries.float(), dim=1).to(device)  # [Q, C]
    best = queries.new_full((len(queries), k), -torch.inf)
    rows = torch.zeros(len(queries), k, dtype=torch.int64, device=device)
    room = queries.new_empty(
        QUERIES_PER_BLOCK * BANK_ROWS_PER_BLOCK
    )  # reused by all blocks: allocating each time takes a third longer
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
