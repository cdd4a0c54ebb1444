"""Which part of every batch a process makes. Slots of the batch are dealt out to ranks, and a rank's to its workers, in
whole contiguous runs: the parts in worker order are the rank's batch in the order of positions."""

from dataclasses import dataclass

from torch.utils.data import get_worker_info

from esvit_scale.config import Config, nearest_multiple
from esvit_scale.errors import UserError


@dataclass(frozen=True)
class Job:
    config: Config
    rank: int
    world_size: int
    start: int  # batch indices
    stop: int
    steps: int  # per epoch

    @property
    def slots(self) -> range:
        """Of this rank."""
        share = self.config.slots // self.world_size
        return range(self.rank * share, (self.rank + 1) * share)

    @property
    def per_slot(self) -> int:
        return self.config.train.global_batch // self.config.slots

    def worker(self) -> tuple[int, int]:
        """This process's number among its rank's workers, and how many they are."""
        info = get_worker_info()
        return (info.id, info.num_workers) if info else (0, 1)

    def slots_of_worker(self) -> range:
        n, (worker, workers) = len(self.slots), self.worker()
        return self.slots[worker * n // workers : (worker + 1) * n // workers]

    @property
    def part_size(self) -> int:
        """Images of a batch that this worker makes."""
        return len(self.slots_of_worker()) * self.per_slot


def check_division(config: Config, world_size: int) -> None:
    """Raises UserError when the batch or its slots do not divide over the ranks."""
    batch, slots, ranks = config.train.global_batch, config.slots, world_size * config.train.grad_accum
    if batch % ranks:
        raise UserError(
            f"train.global_batch: {batch} does not divide into {world_size} ranks × {config.train.grad_accum} micro-batches; "
            f"nearest: {nearest_multiple(batch, ranks)}"
        )
    if slots % world_size:
        valid = [s for s in range(world_size, batch + 1, world_size) if batch % s == 0]
        best = min(valid, key=lambda s: abs(s - slots))
        raise UserError(f"data.slots: {slots} slots do not divide over {world_size} ranks; nearest: {best}")
