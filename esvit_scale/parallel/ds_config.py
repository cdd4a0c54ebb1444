"""The DeepSpeed config of a run: the JSON file of `train.ds_config`, checked and completed from the run config."""

import json
import logging
from typing import Any, NamedTuple

from esvit_scale.config import Config
from esvit_scale.division import batch_problem
from esvit_scale.errors import UserError
from esvit_scale.parallel import collectives, ds_keys
from esvit_scale.resources import ds_config_path

log = logging.getLogger("esvit_scale")

# Keys that a DeepSpeed file must not have, and where their settings belong instead.
_OWNED_ELSEWHERE = {
    "optimizer": "the run config's optim section",
    "scheduler": "the run config's optim section",
    "amp": "train.precision (this DeepSpeed has no apex amp any more: use bf16)",
    "bfloat16": 'train.precision; the section is named "bf16"',
    "data_types.param_dtype": "train.precision",
    "activation_checkpointing": "train.activation_checkpointing",
}
# Settings that are the same in every run: DeepSpeed looks for NaN (zero.py stops it where parallel/gradients.py does), averages
# gradients over ranks and micro-batches, and keeps the optimizer's parameters and moments in fp32.
_FIXED = {
    "bf16.check_grad_overflow": True,
    "bf16.bf16_master_weights_and_grads": False,
    "bf16.bf16_optimizer_states": False,
    "fp16.fp16_master_weights_and_grads": False,
    "zero_optimization.compute_grad_norm": True,
    "gradient_allreduce_op": "mean",
    "managed_gradient_accumulation": True,
}
BUCKET = 500_000_000  # elements of DeepSpeed's reduction bucket if the config does not say
SUB_GROUP = LIVE = 1_000_000_000  # DeepSpeed's defaults of ZeroSizes, in elements
PREFETCH = 50_000_000
_DTYPES = {"bfloat16": "bf16", "torch.bfloat16": "bf16", "float16": "fp16", "torch.float16": "fp16", "half": "fp16"}
_DTYPES |= {"float32": "fp32", "torch.float32": "fp32", "float": "fp32"}


def fill(config: Config, world_size: int) -> dict[str, Any]:
    """Read a run's DeepSpeed config file, and return its content with the values that the run config determines.

    Raises:
        UserError: the file is missing, is not JSON, or has keys or types that DeepSpeed does not know; the batch does
            not divide over the ranks; or values contradict the run config. The message has one line per problem.
    """
    path = ds_config_path(config.train.ds_config)
    values = ds_keys.read(path)
    problems = ds_keys.problems(values)
    problems += [
        f"{key}: owned by {owner}; remove it from this file"
        for key, owner in _OWNED_ELSEWHERE.items()
        if _given(values, key) is not None
    ]
    if problem := batch_problem(config.train.global_batch, config.train.grad_accum, world_size):
        problems.append(problem)
    stage = _stage(values)
    if stage is None and not problems:
        problems.append(
            f"zero_optimization.stage: must be 0, 1, 2 or 3, got {json.dumps(_given(values, 'zero_optimization.stage'))}"
        )
    if stage is not None and _is_sound(values):
        values.setdefault("zero_optimization", {})
        problems += _stage_problems(config, stage) + _offload_problems(values["zero_optimization"])
        accumulation, stage = _accumulation(config, stage, values)
        values["zero_optimization"]["stage"] = stage
        owned = {**_owned_numbers(config, world_size, stage), "data_types.grad_accum_dtype": accumulation, **_FIXED}
        problems += _fill_holes(values, owned)
    if problems:
        raise UserError("\n".join(f"{path.name}: {problem}" for problem in problems))
    # Both are needed for right numbers: the memory-efficient linear replaces F.linear in the whole process, and
    # parameters that stay gathered (below, at stage 3) would keep the teacher's values of before an EMA update.
    values["zero_optimization"]["memory_efficient_linear"] = False
    # DeepSpeed treats optimizers that it did not make as "untested"; ours are tested at every stage.
    values["zero_allow_untested_optimizer"] = True
    values["zero_force_ds_cpu_optimizer"] = False
    if stage == 3:
        values["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return values


def fit_reduction_bucket(values: dict[str, Any], elements: int) -> None:
    """Set the size of the buffer in which gradients are reduced, in a filled DeepSpeed config that leaves it open.

    DeepSpeed allocates the buffer in full, whatever the network needs; here it holds what the network has. No number
    changes: at either size, all gradients of a network with fewer than BUCKET elements are reduced together.

    Args:
        elements: number of trainable elements of the network.
    """
    section = values["zero_optimization"]
    if section.get("reduce_bucket_size", "auto") == "auto":
        section["reduce_bucket_size"] = bucket_elements(elements)


def bucket_elements(elements: int) -> int:
    """Return the number of elements in the reduction bucket for a network of so many trainable elements."""
    return max(1, min(elements, BUCKET))


class ZeroSizes(NamedTuple):
    """Numbers of elements in a run's DeepSpeed file that decide memory and traffic, with DeepSpeed's defaults."""

    reduce_bucket_size: int | None = None  # None: as large as the network, at most BUCKET
    sub_group_size: int = SUB_GROUP  # after which stage 3 begins another part of a parameter group
    stage3_max_live_parameters: int = LIVE  # that stage 3 keeps gathered
    stage3_max_reuse_distance: int = LIVE  # within which stage 3 keeps parameters for their next use
    stage3_prefetch_bucket_size: int = PREFETCH  # that stage 3 gathers ahead in one collective

    def bucket(self, elements: int) -> int:
        """Return the number of elements of the reduction bucket, for a network of so many."""
        return bucket_elements(elements) if self.reduce_bucket_size is None else self.reduce_bucket_size


def zero_sizes(config: Config) -> ZeroSizes:
    """Read the ZeroSizes of a run's DeepSpeed file; what is no positive number there has its default.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    section = ds_keys.read(ds_config_path(config.train.ds_config)).get("zero_optimization")
    given = {name: section.get(name) for name in ZeroSizes._fields} if isinstance(section, dict) else {}
    return ZeroSizes(**{name: int(x) for name, x in given.items() if isinstance(x, int | float) and x >= 1})


def offloads_optimizer(values: dict[str, Any]) -> bool:
    """Return whether a filled DeepSpeed config keeps the optimizer's state outside the GPU."""
    section = values["zero_optimization"]
    given = section.get("offload_optimizer") or {}
    return bool(section.get("cpu_offload")) or given.get("device", "none") != "none"


def gather_whole(values: dict[str, Any], modules: list[str]) -> None:
    """Let ZeRO 3 gather all parameters of each of these modules at once, before its forward and its backward, and have
    no hooks inside; at other stages, do nothing.

    Args:
        values: a filled DeepSpeed config.
        modules: names of modules of the network.
    """
    if zero_stage(values) == 3:
        leaf = values["zero_optimization"].setdefault("leaf_module", {})
        given = leaf.get("names", [])
        leaf["names"] = [*([given] if isinstance(given, str) else given), *modules]


def without_optimizer(ds: dict[str, Any]) -> dict[str, Any]:
    """Return the sections of a filled DeepSpeed config that an engine without an optimizer (the teacher) needs: precision
    and partitions."""
    kept = {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "bf16",
        "fp16",
        "torch_autocast",
        "zero_optimization",
    }
    config = {key: value for key, value in ds.items() if key in kept}
    # A copy of the parameters in each node would serve the gathers of a backward, and the teacher has none.
    config["zero_optimization"] = {k: v for k, v in ds["zero_optimization"].items() if k != "zero_hpz_partition_size"}
    return config


def zero_stage(values: dict[str, Any]) -> int:
    """Return the ZeRO stage that a filled DeepSpeed config runs."""
    return int(values["zero_optimization"]["stage"])


def offered_stages(precision: str) -> tuple[int, ...]:
    """Return the ZeRO stages at which a run can train in this precision (`train.precision`). Stage 0 is not offered in
    bf16 and fp16, where DeepSpeed's optimizer takes one step at start-up."""
    return (1, 2, 3) if precision in ("bf16", "fp16") else (0, 1, 2, 3)


def _is_sound(values: dict[str, Any]) -> bool:
    """Return whether the sections that this module reads and writes are JSON objects, so that it can go on checking."""
    sections = ("zero_optimization", "bf16", "fp16", "torch_autocast", "data_types")
    return all(isinstance(values.get(s, {}), dict) for s in sections)


def _stage(values: dict[str, Any]) -> int | None:
    """Return the ZeRO stage that a file asks for: 0 if it names none, None if its value is not a stage."""
    section = values.get("zero_optimization", {})
    stage = section.get("stage", 0) if isinstance(section, dict) else 0
    return stage if type(stage) is int and 0 <= stage <= 3 else None


def _dtype(value: Any) -> Any:
    """Return the short name of a dtype, such as `bf16`, for any spelling that DeepSpeed accepts; return other text in
    lower case, and other values as they are."""
    return _DTYPES.get(value.lower(), value.lower()) if isinstance(value, str) else value


def _given(values: dict[str, Any], key: str) -> Any:
    """Return the value of a dotted key, None if the file has no such key."""
    node: Any = values
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _stage_problems(config: Config, stage: int) -> list[str]:
    problems = []
    if stage not in offered_stages(config.train.precision):
        problems.append(
            "train.precision: ZeRO stage 0 is offered in fp32 and autocast only (in bf16 and fp16, its optimizer takes one "
            "step at start-up); use train.ds_config=zero1, which also runs on one process, or train.precision=fp32"
        )
    return problems


def _offload_problems(section: dict[str, Any]) -> list[str]:
    """Return the problems of kinds of offloading that DeepSpeed offers with its own optimizer alone."""
    given = {name: section.get(name) for name in ("offload_optimizer", "offload_param")}
    problems = [
        f'zero_optimization.{name}.device: "nvme" is not offered, since the teacher\'s average and checkpoints read fp32 '
        'weights and moments in memory; use "cpu"'
        for name, values in given.items()
        if isinstance(values, dict) and values.get("device") == "nvme"
    ]
    optimizer = given["offload_optimizer"]
    if isinstance(optimizer, dict) and optimizer.get("ratio", 1) != 1:
        problems.append(
            f"zero_optimization.offload_optimizer.ratio: must be 1, got {json.dumps(optimizer['ratio'])}; DeepSpeed "
            "offloads a part with its own Adam alone"
        )
    return problems


def accumulates_in_fp32(config: Config) -> bool:
    """Return whether gradients must be summed in fp32 although the run trains in bf16 or fp16: if a step has several
    micro-batches."""
    return config.train.precision in ("bf16", "fp16") and config.train.grad_accum > 1


def _accumulation(config: Config, stage: int, values: dict[str, Any]) -> tuple[str, int]:
    """Return the dtype in which gradients are summed over micro-batches, and the ZeRO stage to run.

    Stage 1 becomes stage 2 if bf16 gradients are summed in fp32: there DeepSpeed's stage 1 uses another optimizer
    (BF16_Optimizer), which parallel/zero.py does not know, while its stage 2 does the same arithmetic.
    """
    precision = config.train.precision
    if precision in ("fp32", "autocast"):
        return "fp32", stage
    if not accumulates_in_fp32(config) and _dtype(_given(values, "data_types.grad_accum_dtype")) != "fp32":
        return precision, stage
    if precision == "fp16" or stage != 1:
        return "fp32", stage
    if collectives.rank() == 0:
        log.warning("running ZeRO 2 in place of ZeRO 1, because bf16 gradients are summed in fp32 over micro-batches")
    return "fp32", 2


def _owned_numbers(config: Config, world_size: int, stage: int) -> dict[str, Any]:
    batch, accum = config.train.global_batch, config.train.grad_accum
    # DeepSpeed clips by the global norm at stages 1–3; parallel/gradients.py clips per tensor, and at stage 0.
    by_deepspeed = config.optim.clip is not None and config.optim.clip_by == "global" and stage > 0
    autocast = {
        # Without it, DeepSpeed enters torch.autocast without a dtype: on a GPU that is fp16, without loss scaling.
        "torch_autocast.dtype": "bf16",
        # Without it, DeepSpeed averages gradients of linear layers and convolutions over ranks in bf16.
        "torch_autocast.lower_precision_safe_modules": [],
    }
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch // world_size // accum,
        "gradient_accumulation_steps": accum,
        "gradient_clipping": config.optim.clip if by_deepspeed else 0.0,
        "bf16.enabled": config.train.precision == "bf16",
        "fp16.enabled": config.train.precision == "fp16",
        "torch_autocast.enabled": config.train.precision == "autocast",
        **(autocast if config.train.precision == "autocast" else {}),
    }


def _fill_holes(values: dict[str, Any], owned: dict[str, Any]) -> list[str]:
    """Write the values `owned` (dotted key → value) into the config. Return a message for every key for which the file
    has another value that is not "auto"."""
    problems = []
    for key, number in owned.items():
        *sections, leaf = key.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
        if _dtype(node.get(leaf, "auto")) not in ("auto", number):
            says = "must be" if key in _FIXED else "but the run config says"
            problems.append(f'{key}: {json.dumps(node[leaf])}, {says} {json.dumps(number)}; write "auto"')
        node[leaf] = number
    return problems
