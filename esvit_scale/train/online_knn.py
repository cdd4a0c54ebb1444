"""The teacher's k-NN accuracy while it trains, on a few labelled images: the number that an unstable run loses first."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from esvit_scale.config import Config
from esvit_scale.data.evaluation import evaluation_batches
from esvit_scale.errors import UserError
from esvit_scale.evaluate.neighbours import nearest_neighbours
from esvit_scale.parallel import collectives
from esvit_scale.parallel.engine import Engines
from esvit_scale.parallel.world import World

IMAGES = 1024  # of the held-out set, spread over it evenly
NEIGHBOURS = 10
TEMPERATURE = 0.07  # of the votes, as in the k-NN evaluation
AT_ONCE = 32


class OnlineKnn:
    """Every image is classified by its nearest neighbours among the others (leave one out).

    Each rank keeps its share of the images in host memory (bf16: 300 MB for all of them at 224 pixels) and runs the same
    number of forwards, as ZeRO 3 needs.
    """

    def __init__(self, config: Config, world: World) -> None:
        """
        Raises:
            UserError: the held-out set cannot be read, has no labels, or too few images.
        """
        self._world = world
        images, labels = [], []
        size = config.data.global_crops.size
        for batch in evaluation_batches(
            Path(config.data.held_out), size, AT_ONCE, rank=world.rank, world_size=world.size
        ):
            images.append(batch.images.to(torch.bfloat16))
            labels.append(batch.labels)
        mine = torch.cat(images) if images else torch.empty(0, 3, size, size)
        own = torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)
        count = min(min(collectives.gather_objects(len(mine))), IMAGES // world.size)
        if count * world.size < 2 * NEIGHBOURS or collectives.gather_objects(int(own.min()))[0] < 0:
            raise UserError(
                f"data.held_out: {config.data.held_out}: needs at least {2 * NEIGHBOURS} readable images with labels "
                "(class subfolders, or shards made from them)"
            )
        chosen = torch.linspace(0, len(mine) - 1, count).round().long()
        self._images, self._labels = mine[chosen], own[chosen]

    @torch.no_grad()
    def accuracy(self, engines: Engines, autocast: torch.autocast) -> float:
        """Share of the images [0, 1] whose class wins the vote; all ranks call it."""
        with autocast:
            mine = torch.cat([features.float() for features in self._features(engines)])  # [n, C]
        parts = collectives.gather_objects((mine.cpu(), self._labels))
        features, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        similarity, rows = nearest_neighbours(features, features, NEIGHBOURS + 1, self._world.device)
        similarity[rows == torch.arange(len(rows))[:, None]] = -torch.inf  # itself
        votes = torch.zeros(len(rows), int(labels.max()) + 1)
        votes.scatter_add_(1, labels[rows], (similarity / TEMPERATURE).exp())
        return (votes.argmax(1) == labels).float().mean().item()

    def _features(self, engines: Engines) -> Iterator[Tensor]:
        network = engines.teacher.network
        trunk = getattr(network, "module", network).trunk
        for images in self._images.split(AT_ONCE):
            yield trunk([images.to(self._world.device, engines.dtype)]).view
