"""Measurements with the teacher on a few held-out images during training: its k-NN accuracy, and without labels what
train.guard compares. In an unstable run, they fall before the loss shows anything.
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
from esvit_scale.train.structure import effective_rank, neighbours_of

IMAGES = 1024  # at most, spread evenly over the held-out set
NEIGHBOURS = 10
BATCH = 32  # images per forward


class OnlineKnn:
    """A leave-one-out k-NN test: every image is classified by its nearest neighbours among the others.

    Each rank keeps its share of the images in host memory (bf16; 300 MB for all of them at 224 pixels). All ranks run
    the same number of forwards, as ZeRO 3 requires.

    Attributes:
        images: number of images of all ranks together.
        has_labels: whether they have labels; without, `train.guard` alone can measure on them.
        largest_class: the fraction of them that is of the most frequent class; None without labels.
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
        self.has_labels = not unlabelled
        if count * world.size < 2 * NEIGHBOURS or (unlabelled and config.train.guard == "off"):
            raise UserError(
                f"data.held_out: {source}: needs at least {2 * NEIGHBOURS} readable images with labels "
                "(class subfolders, or shards made from them); train.guard also measures without labels"
            )
        self._images, self._labels = torch.cat(images)[:count], own[:count]
        self.images = count * world.size
        of_all = torch.cat(collectives.gather_objects(self._labels))
        self.largest_class = of_all.bincount().max().item() / len(of_all) if self.has_labels else None

    def accuracy(self, engines: Engines, autocast: torch.autocast) -> float:
        """Return the fraction of images that the vote of their neighbours classifies correctly. All ranks call it."""
        return self._accuracy_of(self._features_of_rank(engines, autocast))

    def structure(self, engines: Engines, autocast: torch.autocast) -> tuple[float, Tensor]:
        """Return the effective rank of the features, and the nearest neighbours of each image among the others as numbers
        of images [images, NEIGHBOURS]. All ranks call it, and have rank 0's."""
        parts = collectives.gather_objects(self._features_of_rank(engines, autocast).cpu())

        def measure() -> tuple[float, Tensor]:
            features = torch.cat(parts)
            return effective_rank(features), neighbours_of(features, NEIGHBOURS, self._world.device)

        return collectives.run_on_rank0_and_broadcast(measure)

    def pixels_accuracy(self) -> float | None:
        """Return the accuracy of raw pixels instead of features; None without labels. All ranks call it."""
        if not self.has_labels:
            return None
        return self._accuracy_of(torch.cat([small_pixels(images.float()) for images in self._images.split(BATCH)]))

    @torch.no_grad()
    def _features_of_rank(self, engines: Engines, autocast: torch.autocast) -> Tensor:
        """Return the teacher's features of this rank's images [n, C]."""
        with autocast:
            return torch.cat([features.float() for features in self._features(engines)])

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
