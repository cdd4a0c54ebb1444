"""Saving and restoring a run's state: student, teacher, optimizer, centres and the data cursor.

checkpoints/step-00000100/ holds the tensors (storage.py) and state.json (cursor, shapes, config, checksums). A save is
atomic: it writes a temporary folder, renames it when all ranks have finished, and then makes checkpoints/latest name
it. A resume reads the newest folder whose checksums match (step_folders.py). The state of random number generators is
not saved, because every random draw of a run is a function of (seed, epoch, sample key, crop) or of (seed, step,
position, crop, block).
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from esvit_scale import config as configs
from esvit_scale.checkpoint import (
    carried,
    positions,
    safetensors_file,
    signal_lead,
    state_file,
    step_folders,
    storage,
)
from esvit_scale.checkpoint.storage import Interval, whole_interval
from esvit_scale.checkpoint.weights import TRUNK, Weights, check_shapes, network_shapes, shapes_of
from esvit_scale.config import Config
from esvit_scale.errors import RestartCanHelp, UserError
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.trunk import Trunk
from esvit_scale.objective.param_groups import MATRICES, kind_of
from esvit_scale.parallel import collectives
from esvit_scale.parallel.buffers import persistent_buffers
from esvit_scale.parallel.engine import Engines
from esvit_scale.parallel.zero import Frozen

log = logging.getLogger("esvit_scale")

T = TypeVar("T")

NETWORK_PREFIXES = {"student": "student/", "teacher": "ema/"}  # network → prefix of its tensors' names in storage
CENTER = "center/"
GRAM = "gram/"  # prefix of the Gram teacher's tensors


class NotSaved(RestartCanHelp):
    """Raised when a checkpoint could not be written; earlier checkpoints are untouched."""


class Snapshot(NamedTuple):
    """The part of a run's state that this rank writes to a checkpoint, with the content of state.json."""

    intervals: dict[str, Interval]
    state: dict[str, Any]  # the content of state.json without the checksums of the files


def take_snapshot(config: Config, engines: Engines, centers: dict[str, Tensor], cursor: dict[str, int]) -> Snapshot:
    """Return this rank's part of the state at step `cursor["step"]`, as views and not copies. All ranks call it."""
    optimizer_steps = _optimizer_steps(engines)
    state = {
        "cursor": cursor,
        "optimizer_steps": optimizer_steps,
        "shapes": shapes_of(engines.student.module),
        "config": config.model_dump(mode="json"),
    }
    return Snapshot(_intervals(engines, optimizer_steps, centers) | _gram_intervals(engines, cursor["step"]), state)


def save(run: Path, config: Config, engines: Engines, centers: dict[str, Tensor], cursor: dict[str, int]) -> Path:
    """Write a checkpoint at step `cursor["step"]`, remove old ones (`step_folders.prune`), and return its folder.

    All ranks call it.

    Raises:
        NotSaved: a rank could not write, for example because the disk is full; earlier checkpoints are untouched.
    """
    return write(run, config, take_snapshot(config, engines, centers, cursor))


@signal_lead.warn_if_longer()
def write(
    run: Path,
    config: Config,
    snapshot: Snapshot,
    check_ownership: Callable[[], None] = lambda: None,
    is_best: bool = False,
) -> Path:
    """Write a snapshot as a step folder, remove old ones (`step_folders.prune`), and return the new folder.

    All ranks call it; it may run in a background thread.

    Args:
        check_ownership: function that rank 0 calls before it renames the finished folder into place; it raises
            RestartCanHelp if another process has taken over the run.
        is_best: also make checkpoints/best name the new folder.

    Raises:
        NotSaved: as `save`.
    """
    folder = run / "checkpoints" / f"step-{snapshot.state['cursor']['step']:08d}"
    tmp = folder.with_name(f".{folder.name}.partial")
    _on_rank_0(folder, lambda: _make_empty(tmp))
    _run_on_all_ranks(folder, lambda: storage.save(tmp, snapshot.intervals))
    written = _run_on_all_ranks(folder, lambda: storage.checksums(tmp, collectives.rank()))
    recorded = {name: checksum for files_of_rank in written for name, checksum in files_of_rank.items()}
    _on_rank_0(folder, check_ownership)
    _on_rank_0(folder, lambda: _commit(tmp, folder, snapshot.state | {"files": recorded}, is_best))
    collectives.run_on_rank0_and_broadcast(lambda: step_folders.prune(folder, config))
    return folder


def _on_rank_0(folder: Path, work: Callable[[], None]) -> None:
    _run_on_all_ranks(folder, work if collectives.rank() == 0 else lambda: None)


def _run_on_all_ranks(folder: Path, work: Callable[[], T]) -> list[T]:
    """Run `work` on every rank and return the results of all ranks, in the order of the ranks.

    Args:
        folder: the step folder that is being saved; its temporary folder is removed after a failure.

    Raises:
        NotSaved: on all ranks, if the storage failed on one of them.
    """
    try:
        result, problem = work(), None
    except (OSError, RestartCanHelp, CheckpointException) as error:
        result, problem = None, storage.error_text(error)
    answers = collectives.gather_objects((result, problem))
    problems = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(answers) if problem]
    if problems:
        if collectives.rank() == 0:
            shutil.rmtree(folder.with_name(f".{folder.name}.partial"), ignore_errors=True)
        raise NotSaved(f"{folder}: could not be saved: {'; '.join(problems[:3])}; earlier checkpoints are untouched")
    return [result for result, _ in answers]


def _gram_intervals(engines: Engines, step: int) -> dict[str, Interval]:
    """Return this rank's part of the Gram teacher's tensors, as views; none if there is none after `step` steps.

    Frozen parameters are the student's. Which earlier teacher it is follows from the step (parallel/gram.py).
    """
    gram = engines.gram
    if gram is None or not gram.is_on(step):
        return {}
    pairs = zip(gram.partitions, gram.values, strict=True)
    intervals = {f"{GRAM}{p.name}": Interval(values, p.start, p.shape.numel()) for p, values in pairs}
    return intervals | {f"{GRAM}{n}": whole_interval(buffer) for n, buffer in persistent_buffers(gram.module).items()}


def find_nonfinite(engines: Engines, centers: dict[str, Tensor]) -> list[str]:
    """Return the sorted names of the state's tensors that hold NaN or infinity on any rank. All ranks call it."""
    intervals = _intervals(engines, _optimizer_steps(engines), centers)
    owned = {name: interval.values for name, interval in intervals.items() if interval.values.numel()}
    largest = [torch.linalg.vector_norm(values, torch.inf).to(engines.clipper.device) for values in owned.values()]
    finite = torch.isfinite(torch.stack(largest)).tolist() if largest else []
    mine = [name for name, is_finite in zip(owned, finite, strict=True) if not is_finite]
    return sorted({name for of_rank in collectives.gather_objects(mine) for name in of_rank})


def restore(folder: Path, engines: Engines, centers: dict[str, Tensor]) -> dict[str, int]:
    """Load a step folder, saved at any world size and ZeRO stage, into `engines` and `centers`; return its cursor.

    Raises:
        UserError: the checkpoint is of another architecture (the message names the first tensors that differ), was
            saved by another kind of optimizer, is damaged, or holds NaN or infinity (older versions could save these).
    """
    state = state_file.read_state(folder)
    shapes = shapes_of(engines.student.module)
    old = set() if state["shapes"].keys() >= shapes.keys() else {f.name for f in _frozen_parameters(engines)}
    check_shapes(folder, state["shapes"], {name: shape for name, shape in shapes.items() if name not in old})
    _check_optimizer_kind(folder, engines, state["optimizer_steps"])
    if missing := set(engines.group_of.values()) - state["optimizer_steps"].keys():
        raise UserError(
            f"{folder}: does not record the optimizer's step count of the parameter groups {', '.join(sorted(missing))}"
        )
    _prepare_optimizer_state(engines, state["optimizer_steps"])
    intervals = _intervals(engines, state["optimizer_steps"], centers)
    intervals |= _gram_intervals(engines, state["cursor"]["step"])
    storage.load(folder, {key: i for key, i in intervals.items() if key.partition("/")[2] not in old})
    _sync_loaded(folder, engines, centers)
    if engines.gram is not None:
        engines.gram.sync_after_restore()
    return state["cursor"]


@torch.no_grad()
def carry_over(folder: Path, engines: Engines, centers: dict[str, Tensor]) -> tuple[dict[str, int], str]:
    """Load the last checkpoint of the training stage before into `engines` and `centers`; carried.py says what of it.

    Centres that it does not have are removed from `centers`, and the optimizer has no state afterwards.

    Returns:
        The cursor, and what was carried over, for the log.

    Raises:
        UserError: a tensor fits neither as it is nor resized, or as `restore`.
    """
    state, wanted = state_file.read_state(folder), shapes_of(engines.student.module)
    parts, stored = carried.compare(folder, state["shapes"], wanted), storage.tensor_sizes(folder)
    for name in [name for name in centers if f"{CENTER}{name}" not in stored]:
        del centers[name]
    none = dict.fromkeys(engines.group_of.values(), 0)
    _prepare_optimizer_state(engines, none)
    ours, intervals, tables = _intervals(engines, none, centers), dict[str, Interval](), dict[str, Tensor]()
    for key, interval in ours.items():
        name = key.partition("/")[2]
        if name in parts.resized:
            tables[key] = torch.empty(state["shapes"][name])
        elif name not in parts.fresh:
            intervals[key] = interval
    storage.load(folder, intervals | {key: whole_interval(table) for key, table in tables.items()})
    for key, table in tables.items():
        name, interval = key.partition("/")[2], ours[key]
        resized, _ = positions.resize_to_fit(folder, {name: table}, {name: wanted[name]})
        interval.values.copy_(resized[name].flatten()[interval.start : interval.start + interval.values.numel()])
    _sync_loaded(folder, engines, centers)
    if engines.gram is not None:
        engines.gram.refresh()
    return state["cursor"], parts.note


def _sync_loaded(folder: Path, engines: Engines, centers: dict[str, Tensor]) -> None:
    """Let the forwards of student and teacher use what was loaded. Raise UserError if it is not finite."""
    engines.layout.sync_working_weights()
    engines.teacher.sync_frozen()
    engines.teacher.sync_working_weights()
    if bad := find_nonfinite(engines, centers):
        raise UserError(
            f"{folder}: holds NaN or infinite values ({', '.join(bad[:3])}); remove this folder to resume from the "
            "checkpoint before it"
        )


def load_teacher(checkpoint: Path) -> tuple[Trunk, Config]:
    """Load the trunk of a run dir, a step folder or a safetensors file; return it in fp32 on the CPU, and its config.

    A run dir or step folder gives the teacher's trunk; a file gives that of the network it holds. Neither DeepSpeed nor
    a process group is needed.

    Raises:
        UserError: the checkpoint does not exist or is damaged, or its tensors do not fit its config.
    """
    if checkpoint.suffix == safetensors_file.SUFFIX:
        return _load_trunk_from_file(checkpoint)
    folder = step_folders.resolve(checkpoint)
    state = state_file.read_state(folder)
    config = configs.validate(state["config"], where=str(folder / "state.json"))
    trunk = build_trunk(config)
    stored = {n.removeprefix(TRUNK): s for n, s in state["shapes"].items() if n.startswith(TRUNK)}
    check_shapes(folder, stored, shapes_of(trunk))
    state_file.check_index(folder, state)
    tensors = {**dict(trunk.named_parameters()), **persistent_buffers(trunk)}
    values = {f"ema/trunk.{name}": whole_interval(tensor.data) for name, tensor in tensors.items()}
    storage.load(folder, values, single_process=True)
    return trunk.eval(), config


def read_weights(folder: Path) -> Weights:
    """Return student, teacher and centres of a step folder as whole tensors in memory.

    Raises:
        UserError: the folder is no checkpoint or is damaged.
    """
    state = state_file.read_state(folder)
    config = configs.validate(state["config"], where=str(folder / "state.json"))
    state_file.check_index(folder, state)
    networks = {role: {n: torch.empty(s) for n, s in state["shapes"].items()} for role in NETWORK_PREFIXES}
    stored = storage.tensor_sizes(folder)
    centers = {n.removeprefix(CENTER): torch.empty(size) for n, size in stored.items() if n.startswith(CENTER)}
    storage.load(folder, _whole_intervals(networks, centers), single_process=True)
    for name, shape in network_shapes(config).items():
        if (
            name.endswith(".weight_g") and name not in state["shapes"]
        ):  # fixed at 1 by norm_last_layer, and therefore not saved
            for tensors in networks.values():
                tensors[name] = torch.ones(shape)
    return Weights(config, networks, centers)


def write_weights(folder: Path, weights: Weights) -> None:
    """Write weights as a step folder at step 0, without optimizer state, for `load_teacher` and `read_weights`.

    Only one process calls it.
    """
    tmp = folder.with_name(f".{folder.name}.partial")
    _make_empty(tmp)
    storage.save(tmp, _whole_intervals(weights.networks, weights.centers))
    state = {
        "cursor": {"step": 0, "optimizer_step": 0, "batch_index": 0, "data_offset": 0, "images_seen": 0},
        "files": storage.checksums(tmp, 0),
        "optimizer_steps": {"decay": 0, "no_decay": 0, "last_layer": 0},
        "shapes": {name: list(tensor.shape) for name, tensor in weights.networks["student"].items()},
        "config": weights.config.model_dump(mode="json"),
    }
    state_file.commit(tmp, folder, state)


def _load_trunk_from_file(path: Path) -> tuple[Trunk, Config]:
    config, networks, _ = safetensors_file.read(path)
    trunk = build_trunk(config)
    tensors = {n.removeprefix(TRUNK): t for of in networks.values() for n, t in of.items() if n.startswith(TRUNK)}
    check_shapes(path, {name: list(tensor.shape) for name, tensor in tensors.items()}, shapes_of(trunk))
    trunk.load_state_dict(tensors)
    return trunk.eval(), config


def _whole_intervals(networks: dict[str, dict[str, Tensor]], centers: dict[str, Tensor]) -> dict[str, Interval]:
    intervals = {f"{CENTER}{name}": whole_interval(center) for name, center in centers.items()}
    for role, tensors in networks.items():
        intervals |= {f"{NETWORK_PREFIXES[role]}{name}": whole_interval(tensor) for name, tensor in tensors.items()}
    return intervals


def _intervals(engines: Engines, optimizer_steps: dict[str, int], centers: dict[str, Tensor]) -> dict[str, Interval]:
    """Return this rank's part of every tensor of the state, by name, as views: loading into them sets the tensors."""
    intervals = {f"{CENTER}{name}": whole_interval(center) for name, center in centers.items()}
    for p, ema in zip(engines.partitions, engines.teacher.values, strict=True):
        total = p.shape.numel()
        intervals[f"student/{p.name}"] = Interval(p.master, p.start, total)
        intervals[f"ema/{p.name}"] = Interval(ema, p.start, total)
        if optimizer_steps[engines.group_of[p.name]] > 0:
            moments = engines.optimizer.state[p.flat]
            for key in engines.moments[engines.group_of[p.name]]:
                intervals[f"{key}/{p.name}"] = Interval(p.within(moments[key]), p.start, total)
    for prefix, network in zip(
        NETWORK_PREFIXES.values(), (engines.student.module, engines.teacher.module), strict=True
    ):
        for name, buffer in persistent_buffers(network).items():
            intervals[f"{prefix}{name}"] = whole_interval(buffer)
    for f in _frozen_parameters(engines):
        for prefix in NETWORK_PREFIXES.values():
            intervals[f"{prefix}{f.name}"] = Interval(f.values, f.start, f.shape.numel())
    return intervals


def _optimizer_steps(engines: Engines) -> dict[str, int]:
    """Return the optimizer's step count for each parameter group; 0 for a group that was never updated (frozen so far).

    For optimizers that count no steps (SGD, LARS) it is 1 if the group has state. The count is read from the
    parameter's state or, as apex has it, from the parameter group.
    """
    counted = {group["name"]: group.get("step", 1) for group in engines.optimizer.param_groups}
    mine = dict.fromkeys(engines.group_of.values(), 0)
    for p in engines.partitions:
        state, group = engines.optimizer.state.get(p.flat), engines.group_of[p.name]
        if state:
            mine[group] = int(state.get("step", counted[group]))
    everyone = collectives.gather_objects(mine)
    return {group: max(steps[group] for steps in everyone) for group in mine}


def _prepare_optimizer_state(engines: Engines, optimizer_steps: dict[str, int]) -> None:
    """Create zero state tensors for parameters whose state the checkpoint holds; remove the state of all others."""
    for p in engines.partitions:
        step = optimizer_steps[engines.group_of[p.name]]
        if step == 0:
            engines.optimizer.state.pop(p.flat, None)
        elif p.flat not in engines.optimizer.state:
            counter = torch.tensor(float(step), device=p.flat.device)  # fused AdamW needs the counter on this device
            engines.optimizer.state[p.flat] = {"step": counter} | {
                key: torch.zeros_like(p.flat) for key in engines.moments[engines.group_of[p.name]]
            }
    for group in engines.optimizer.param_groups:
        if "step" in group:
            group["step"] = optimizer_steps[group["name"]]


def _check_optimizer_kind(folder: Path, engines: Engines, optimizer_steps: dict[str, int]) -> None:
    """Raise UserError if the checkpoint lacks a state tensor that this run's optimizer needs, or if one of them was
    saved with Muon's group of matrices and the other has none."""
    stored = {name.partition("/")[0] for name in storage.tensor_sizes(folder)}
    missing = {key for keys in engines.moments.values() for key in keys} - stored
    without = MATRICES in map(kind_of, optimizer_steps) and MATRICES not in map(kind_of, engines.moments)
    if (missing or without) and any(optimizer_steps.values()):
        holds = f"it holds no {', '.join(sorted(missing))}" if missing else "Muon"
        raise UserError(
            f"{folder}: was saved by another kind of optimizer ({holds}); continue with "
            f"the same optim.name, or start a new run with model.init_from={folder}"
        )


def _frozen_parameters(engines: Engines) -> list[Frozen]:
    return engines.layout.frozen(engines.student.module)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _commit(tmp: Path, folder: Path, state: dict[str, Any], is_best: bool) -> None:
    state_file.commit(tmp, folder, state)
    step_folders.write_latest(folder)
    if is_best:
        step_folders.write_best(folder)
