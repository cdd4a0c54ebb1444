"""What is known about a run once student and teacher are built: their sizes, the devices, and the crops' region tokens."""

from dataclasses import replace

import torch
from torch import nn

from esvit_scale.checkpoint import frozen_teacher
from esvit_scale.config import Config
from esvit_scale.data import stream
from esvit_scale.machine import usable_cpus
from esvit_scale.objective import frozen
from esvit_scale.objective.network import Network, build_network
from esvit_scale.objective.schedules import Schedules
from esvit_scale.parallel.engine import Engines
from esvit_scale.parallel.frozen_teacher import FrozenTeacher
from esvit_scale.parallel.world import World
from esvit_scale.parallel.zero import full_shape
from esvit_scale.train import learning
from esvit_scale.train.learning import RunFacts


def lines(
    schedules: Schedules, engines: Engines, world: World, facts: RunFacts, origin: str, shorter: Config | None
) -> list[str]:
    """Return what the log says before the first step: the model, notes about the settings, and what takes long.

    Args:
        origin: where the weights come from, or "".
        shorter: the config that the run had so far, if it is now made longer.
    """
    config, found = schedules.config, [] if schedules.run_steps == schedules.total_steps else [stage_line(schedules)]
    found += [*([origin] if origin else []), model_line(engines, world, facts.prototypes)]
    if engines.frozen is not None:
        found.append(frozen_teacher_line(config, engines.frozen))
    if shorter is not None and len(before := shorter.of_stages) > schedules.number:
        earlier = replace(schedules, config=before[schedules.number])
        if earlier.total_steps != schedules.total_steps:
            found.append(lengthening(earlier, schedules, facts.steps))
    found += notes(config, facts)
    if config.train.compile:
        found.append("train.compile: the first step compiles the trunk's blocks, which takes minutes")
    if config.train.knn_every and not facts.steps:
        what = "the weights at the start" if config.model.init_from else "the untrained trunk"
        found.append(f"measuring k-NN with {what} and with raw pixels …")
    return found


def notes(config: Config, facts: RunFacts) -> list[str]:
    """Return the lines about settings that hardly work."""
    return [f"{'note':<10} {note}" for note in learning.notes_at_start(config, facts)]


def stage_line(schedules: Schedules) -> str:
    """Return a line with a training stage's place in the run."""
    first, last = schedules.first_step, schedules.last_step
    return f"{'stage':<10} stages.{schedules.number}, from step {first:,} to {last:,} of {schedules.run_steps:,}"


def lengthening(before: Schedules, now: Schedules, step: int) -> str:
    """Return the message that a run goes on longer than planned, and with which learning rate."""
    return (
        f"lengthened from {before.last_step:,} to {now.last_step:,} steps at step {step:,}: from here on every schedule "
        f"is that of a run planned with {now.last_step:,} steps; the learning rate goes from "
        f"{before.lr(max(step - 1, before.first_step)):.3g} to {now.lr(step):.3g}"
    )


def model_line(engines: Engines, world: World, prototypes: int) -> str:
    """Return a line with the parameters of trunk and heads, the number of prototypes (0: none), and the devices."""
    module = engines.student.module
    trunk, whole = sum(map(parameters, module.trunks)), parameters(module)
    few = "trunk" if len(module.trunks) == 1 else f"{len(module.trunks)} students: trunks"
    sizes = f"{few} {_millions(trunk)}, heads {_millions(whole - trunk)} parameters"
    sizes += f", {prototypes:,} prototypes" if prototypes else ""
    return f"{'model':<10} {sizes}, on {devices(world)}"


def frozen_teacher_line(config: Config, teacher: FrozenTeacher) -> str:
    """Return a line with the frozen teacher's trunk, its parameters, and what the student learns from it."""
    name, learned = frozen.teacher_name(config.objective), config.objective.targets
    what = {"prototypes": "its prototypes", "cosine": "the direction of its features", "features": "its features"}[
        learned
    ]
    return (
        f"{'teacher':<10} {config.objective.teacher}: {name}, {_millions(parameters(teacher.module))} parameters, frozen; "
        f"the student learns {what}"
    )


def devices(world: World) -> str:
    """Return what the run trains on, in words, such as "8 × NVIDIA H200" or "CPU, 1 rank of 2 threads (2 cores here)"."""
    if world.device.type == "cuda":
        return f"{world.size} × {torch.cuda.get_device_name(world.device)}"
    ranks = f"{world.size} rank{'s' if world.size > 1 else ''}"
    return f"CPU, {ranks} of {torch.get_num_threads()} threads ({usable_cpus()} cores here)"


def parameters(module: nn.Module) -> int:
    """Return the number of parameters of a module, partitioned or not."""
    return sum(full_shape(p).numel() for p in module.parameters())


def run_facts(engines: Engines, schedules: Schedules, steps: int, images: int) -> RunFacts:
    """Return what advice about a run needs.

    Args:
        steps: number of steps that are done.
        images: number of images in the data set.
    """
    return _facts(engines.student.module, schedules, steps, images)


def planned_facts(config: Config) -> RunFacts:
    """Return the same facts about a run that has not begun, without memory for its weights.

    Raises:
        UserError: the network cannot be built, or the training data cannot be read.
    """
    config = frozen_teacher.described_in(config)
    with torch.device("meta"):
        network = build_network(config)
    data = stream.open_data(config)
    return _facts(network, Schedules(config, stream.steps_per_epoch(config, data)), 0, data.samples)


def _facts(network: Network, schedules: Schedules, steps: int, images: int) -> RunFacts:
    trunk = network.trunk
    cell = trunk.reductions[-1] if trunk.has_regions and trunk.reductions else None
    tokens = {size: (-(-size // cell)) ** 2 for size in set(schedules.config.crop_sizes)} if cell else {}
    prototypes = getattr(network.objective, "prototypes", 0)
    return RunFacts(steps, schedules.steps_per_epoch, images, tokens, prototypes)


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"
