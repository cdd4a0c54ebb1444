"""The DeepSpeed JSON with its "auto" holes filled from the run config, or one error that lists every disagreement."""

import json
from pathlib import Path
from typing import Any

from esvit_scale.config import Config, nearest_multiple
from esvit_scale.errors import UserError
from esvit_scale.resources import ds_config_path

# Sections of a DeepSpeed config that something else in this project owns, and who.
_OWNED_ELSEWHERE = {
    "optimizer": "the run config's optim section",
    "scheduler": "the run config's optim section",
    "amp": "train.precision (this DeepSpeed has no apex amp any more: use bf16)",
    "activation_checkpointing": "train.activation_checkpointing",
}


def fill(config: Config, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config of a run.

    Raises:
        UserError: the file is missing or not JSON, a batch that does not divide over the ranks, or numbers that
            contradict the run config: every mismatch in one message.
    """
    path = ds_config_path(config.train.ds_config)
    values = _read(path)
    problems = [
        f"{key}: owned by {owner}; remove it from this file" for key, owner in _OWNED_ELSEWHERE.items() if key in values
    ]
    problems += _batch_problems(config, world_size)
    stage = values.setdefault("zero_optimization", {}).setdefault("stage", 0)
    if stage == 0 and config.train.precision in ("bf16", "fp16"):
        problems.append(
            "train.precision: ZeRO stage 0 is offered in fp32 and autocast only (in bf16 its optimizer takes one step at "
            "start-up); use train.ds_config=zero1, also on one process, or train.precision=fp32"
        )
    if stage == 3 and config.train.compile:
        problems.append(
            "train.compile: not at ZeRO 3, whose gathers run inside the blocks; use ZeRO 0–2, or set it to false"
        )
    if not problems:
        problems = _fill_holes(values, _owned_numbers(config, world_size, stage))
    if problems:
        raise UserError("\n".join(f"{path.name}: {problem}" for problem in problems))
    # Verified to be needed for equal numbers: the memory-efficient linear replaces F.linear process-wide, and
    # persistent parameters would keep the teacher's stale gathered copy.
    values["zero_optimization"]["memory_efficient_linear"] = False
    # DeepSpeed knows the optimizers that it made itself; ours are tested at every stage.
    values["zero_allow_untested_optimizer"] = True
    values["zero_force_ds_cpu_optimizer"] = False
    if stage == 3:
        values["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return values


def zero_stage(values: dict[str, Any]) -> int:
    return int(values["zero_optimization"]["stage"])


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return values


def _batch_problems(config: Config, world_size: int) -> list[str]:
    batch, accum = config.train.global_batch, config.train.grad_accum
    if batch % (world_size * accum):
        return [
            f"train.global_batch: {batch} does not divide over {world_size} ranks × train.grad_accum={accum}; "
            f"nearest: {nearest_multiple(batch, world_size * accum)}"
        ]
    return []


def _owned_numbers(config: Config, world_size: int, stage: int) -> dict[str, Any]:
    batch, accum = config.train.global_batch, config.train.grad_accum
    # The per-tensor clip, and stage 0's, are done by parallel/gradients.py; DeepSpeed's own is the global norm.
    by_deepspeed = config.optim.clip is not None and config.optim.clip_by == "global" and stage > 0
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch // world_size // accum,
        "gradient_accumulation_steps": accum,
        "gradient_clipping": config.optim.clip if by_deepspeed else 0.0,
        "bf16.enabled": config.train.precision == "bf16",
        "fp16.enabled": config.train.precision == "fp16",
        "torch_autocast.enabled": config.train.precision == "autocast",
    }


def _fill_holes(values: dict[str, Any], owned: dict[str, Any]) -> list[str]:
    problems = []
    for key, number in owned.items():
        *sections, leaf = key.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
        if node.get(leaf, "auto") not in ("auto", number):
            problems.append(f'{key}: {node[leaf]}, but the run config says {number}; write "auto"')
        node[leaf] = number
    return problems
