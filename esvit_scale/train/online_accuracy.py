"""The accuracy of a run's classifier on the whole held-out set during training, with its averaged and its own weights."""

from collections.abc import Callable
from contextlib import closing

import torch
from torch import Tensor

from esvit_scale.config import Config
from esvit_scale.data.evaluation import evaluation_batches, items_of
from esvit_scale.data.pixel_format import pixel_format
from esvit_scale.data.remote import place
from esvit_scale.division import share
from esvit_scale.errors import UserError
from esvit_scale.evaluate.features import source_info
from esvit_scale.evaluate.labels import require_training_samples
from esvit_scale.evaluate.metrics import predicted_class, wilson_interval
from esvit_scale.parallel import collectives
from esvit_scale.parallel.engine import Engines
from esvit_scale.parallel.world import World
from esvit_scale.train.accuracies import Accuracy

TOP = 5


class OnlineAccuracy:
    """A measurement of top-1 and top-5 on data.held_out; memory does not grow with the number of its images."""

    def __init__(self, config: Config, world: World, progress: Callable[[], None] = lambda: None) -> None:
        """Match the classes of the held-out set with those of the run by their names.

        Args:
            progress: is called after every batch, for the watchdog.

        Raises:
            UserError: the held-out set cannot be read, has samples without label, or classes that the run has not.
        """
        self._config, self._world, self._progress = config, world, progress
        self._source = place.local_folder(config.data.held_out, config.data)
        self._number, self._samples = collectives.run_on_rank0_and_broadcast(self._match)

    def _match(self) -> tuple[dict[int, int], int]:
        """Return the run's class number of every label of the held-out set, and its number of samples."""
        objective = self._config.objective
        items, names = items_of(self._source, notes=False), source_info(self._source).classes
        with closing(items):
            labels = sorted(items.labels())
        where = f"data.held_out: {self._source}"
        if not labels or labels[0] < 0:
            raise UserError(f"{where}: needs a label for every image (class subfolders, or shards made from them)")
        if objective.class_names and names:
            known = {name: number for number, name in enumerate(objective.class_names)}
            try:
                require_training_samples(known, [names[label] for label in labels])
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            return {label: known[names[label]] for label in labels}, len(items)
        if labels[-1] >= objective.classes:
            raise UserError(f"{where}: label {labels[-1]} is out of range: objective.classes={objective.classes}")
        return {label: label for label in labels}, len(items)

    @torch.no_grad()
    def measure(self, engines: Engines, autocast: torch.autocast) -> Accuracy:
        """Return the accuracy with the weights that the teacher's network has at present. All ranks call it.

        All ranks run the same number of forwards, as ZeRO 3 requires.
        """
        config, world, network = self._config, self._world, engines.teacher.network
        size, pixels = config.data.global_crops.size, pixel_format(config.data)
        batch = max(config.train.global_batch // world.size // config.train.grad_accum, 1)
        most = len(range(self._samples)[share(self._samples, 0, world.size)])
        counts = torch.zeros(3, dtype=torch.int64)  # right, right among five, all
        workers = config.data.workers
        found = evaluation_batches(self._source, size, batch, workers, world.rank, world.size, pixels=pixels)
        engines.teacher.module.eval()  # batch norm: running statistics, and these images do not move them
        with closing(found):  # type: ignore[type-var]
            for _ in range(-(-most // batch)):
                own = next(found, None)
                images = torch.zeros(1, pixels.channels, size, size) if own is None else own.images
                with autocast:
                    logits = network([images.to(world.device, engines.dtype)])
                if own is not None:
                    labels = torch.tensor([self._number[label] for label in own.labels.tolist()])
                    counts += _counts(logits.float().cpu(), labels)
                self._progress()
        engines.teacher.module.train()
        right, among, images_seen = (
            sum(column) for column in zip(*collectives.gather_objects(counts.tolist()), strict=True)
        )
        if not images_seen:
            raise UserError(f"data.held_out: {self._source}: none of its images can be read")
        top1 = right / images_seen
        low, high = wilson_interval(100 * top1, images_seen)
        top5 = among / images_seen if config.objective.classes > TOP else None
        return Accuracy(top1, top5, images_seen, (low / 100, high / 100))


def _counts(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many labels are the first, and among the first five, by logits [B, K]; and how many there are."""
    among = logits.topk(min(TOP, logits.shape[1])).indices == labels[:, None]
    return torch.stack([(predicted_class(logits) == labels).sum(), among.any(1).sum(), torch.tensor(len(labels))])
