"""Run on every rank: every case of tests/objective/cases.py on this rank's half of the images, averaged over ranks."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from esvit_scale.models.trunk import Features
from esvit_scale.objective.koleo import koleo
from tests.objective import cases
from tests.objective.cases import Inputs


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    stored = torch.load(folder / "inputs.pt", weights_only=True)
    results = {}
    for case, (student, teacher, features, teacher_features) in stored.items():
        given = Inputs(student, teacher, Features(*features), Features(*teacher_features))
        images = given.teacher_features.grids[0][0] // 2
        part = slice(rank * images // world, (rank + 1) * images // world)
        own = [cases.part_of(f, images, part) for f in (given.features, given.teacher_features)]
        found = cases.step(case, given, *own)
        of_features = {name: found.gradients.pop(name) / world for name in cases.FEATURES & found.gradients.keys()}
        for tensor in (found.loss, *found.logs.values(), *found.gradients.values()):
            dist.all_reduce(tensor)
            tensor /= world
        of_ranks = [None] * world
        dist.all_gather_object(of_ranks, of_features)
        results[case] = (*found, of_ranks)
        if case == "dino":
            results["koleo"] = koleo_of(own[0], (part.stop - part.start), world)
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


def koleo_of(features: Features, images: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss over ranks, and its gradient of the global crops of all images, crop after crop."""
    view = features.view.clone().requires_grad_()
    loss = koleo(view, images, across_ranks=True)
    (gradient,) = torch.autograd.grad(loss, view)
    mean = loss.detach() / world
    dist.all_reduce(mean)
    of_ranks = [None] * world
    dist.all_gather_object(of_ranks, gradient[: 2 * images].view(2, images, -1) / world)
    return mean, torch.cat(of_ranks, 1).flatten(0, 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
