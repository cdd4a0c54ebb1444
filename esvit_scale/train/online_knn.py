"""The teacher's k-NN accuracy on a few labelled images during training. In an unstable run, it falls before the loss
shows anything.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from esvit_scale.config import Config
from esvit_scale.data.evaluation import evaluation_batches
from esvit_scale.data.pixel_format import pixel_format
from esvit_scale.data.remote import place
from esvit_scale.errors import UserError
from esvit_scale.evaluate.knn import TEMPERATURE, count_true_class_ranks
from esvit_scale.evaluate.neighbours import nearest_neighbours
from esvit_scale.evaluate.pixels import small_pixels
from esvit_scale.parallel import collectives
from esvit_scale.parallel.engine import Engines
from esvit_scale.parallel.world import World

IMAGES = 1024  # at most, spread evenly over the held-out set
NEIGHBOURS = 10
BATCH = 32  # images per forward


class OnlineKnn:
    """A leave-one-out k-NN test: every image is classified by its nearest neighbours among the others.

    Each rank keeps its share of the images in host memory (bf16; 300 MB for all of them at 224 pixels). All ranks run
    the same number of forwards, as ZeRO 3 requires.

    Attributes:
        images: number of images of all ranks together.
        largest_class: the fraction of them that is of the most frequent class.
    """

    def __init__(self, config: Config, world: World) -> None:
        """Read this rank's share of the held-out images.

        Raises:
            UserError: the held-out set cannot be read, has no labels, or too few images.
        """
        self._world = world
        size, source = config.data.global_crops.size, place.local_folder(config.data.held_out, config.data)
        pixels = pixel_format(config.data)
        images = [torch.empty(0, pixels.channels, size, size, dtype=torch.bfloat16)]
        labels = [torch.empty(0, dtype=torch.int64)]
        share = (world.rank, world.size)
        for batch in evaluation_batches(source, size, BATCH, 0, *share, most=IMAGES, pixels=pixels):
            images.append(batch.images.to(torch.bfloat16))
            labels.append(batch.labels)
        own = torch.cat(labels)
        count = min(collectives.gather_objects(len(own)))
        unlabelled = any(collectives.gather_objects(bool((own < 0).any())))
        if count * world.size < 2 * NEIGHBOURS or unlabelled:
            raise UserError(
                f"data.held_out: {source}: needs at least {2 * NEIGHBOURS} readable images with labels "
                "(class subfolders, or shards made from them)"
            )
        self._images, self._labels = torch.cat(images)[:count], own[:count]
        self.images = count * world.size
        of_all = torch.cat(collectives.gather_objects(self._labels))
        self.largest_class = of_all.bincount().max().item() / len(of_all)

    @torch.no_grad()
    def accuracy(self, engines: Engines, autocast: torch.autocast) -> float:
        """Return the fraction of images that the vote of their neighbours classifies correctly. All ranks call it."""
        with autocast:
            mine = torch.cat([features.float() for features in self._features(engines)])  # [n, C]
        return self._accuracy_of(mine)

    def pixels_accuracy(self) -> float:
        """Return the accuracy of raw pixels instead of features. All ranks call it."""
        return self._accuracy_of(torch.cat([small_pixels(images.float()) for images in self._images.split(BATCH)]))

    def _accuracy_of(self, mine: Tensor) -> float:
        """Return the accuracy with this rank's features [n, C]."""
        parts = collectives.gather_objects((mine.cpu(), self._labels))
        features, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        similarity, rows = nearest_neighbours(features, features, NEIGHBOURS + 1, self._world.device)
        similarity[rows == torch.arange(len(rows))[:, None]] = -torch.inf  # an image is no neighbour of itself
        votes = (similarity / TEMPERATURE).exp()
        right = count_true_class_ranks(labels[rows], votes, labels, [NEIGHBOURS + 1], int(labels.max()) + 1, 1)
        # Rank 0's count for all: ranks act on it together, and GPUs may differ in a vote that is nearly a tie.
        return collectives.run_on_rank0_and_broadcast(lambda: right.item() / len(labels))

    def _features(self, engines: Engines) -> Iterator[Tensor]:
        trunk = cast(nn.Module, engines.teacher.module.trunk)
        trunk.eval()  # batch norm: running statistics, and these images do not move them
        for images in self._images.split(BATCH):
            yield trunk([images.to(self._world.device, engines.dtype)]).view
        trunk.train()
