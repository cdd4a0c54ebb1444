"""The keys that a DeepSpeed config may have: DeepSpeed ignores a misspelt one at the top level, and takes the default.

Sections for which DeepSpeed has a pydantic model are checked by it, field names, types and all. The other names are
listed here, as DeepSpeed 0.19.8 asks for them; a test compares the list with what it asks for.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from esvit_scale.errors import UserError, nearest

_TOP_LEVEL = """
activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type compile
csv_monitor data_efficiency data_parallel_size data_types dataloader_drop_last datastates_ckpt disable_allgather
disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op
gradient_clipping gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation memory_breakdown
optimizer pipeline prescale_gradients scheduler seq_parallel_communication_data_type sequence_parallel_size
steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization
zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
"""
_REMOVED = """
amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula progressive_layer_drop
quantize_training sparse_attention sparse_gradients
"""
TOP_LEVEL = frozenset(_TOP_LEVEL.split())
REMOVED = frozenset(_REMOVED.split())  # by DeepSpeed, which refuses them
WITHOUT_MODEL = {  # sections that DeepSpeed reads key by key
    "aio": "block_size intra_op_parallelism overlap_events queue_depth single_submit use_gds",
    "checkpoint": "checkpoint_serialization load_universal parallel_write tag_validation use_node_local_storage writer",
    "data_types": "buffer_dtype grad_accum_dtype keep_in_fp32_modules param_dtype",
    "flops_profiler": "detailed enabled module_depth output_file profile_step recompute_fwd_factor top_modules",
    "timers": "throughput",
    "torch_autocast": "dtype enabled lower_precision_safe_modules",
}
_REPLACED = ("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory")  # of zero_optimization, by newer keys


def read(path: Path) -> dict[str, Any]:
    """Return a JSON file's object.

    Raises:
        UserError: not JSON, not an object, or a key that stands twice in one object.
    """
    twice: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice.extend(name for name in dict.fromkeys(names) if names.count(name) > 1)
        return dict(pairs)

    try:
        values = json.loads(path.read_text(), object_pairs_hook=once)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if twice:
        raise UserError(f"{path}: {', '.join(map(repr, twice))} stands twice in one object; keep one")
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return values


def problems(values: dict[str, Any]) -> list[str]:
    """Return what is wrong with names and types in a DeepSpeed config, a line each, with the nearest right key."""
    return list(_problems(values))


def _problems(values: dict[str, Any]) -> Iterator[str]:
    models = _models()
    for key, value in values.items():
        if key in REMOVED and key != "amp":  # ds_config says what is in amp's place
            yield f"{key}: DeepSpeed has removed it; leave it out"
        elif key not in TOP_LEVEL | REMOVED:
            yield f"{key}: DeepSpeed has no such key{_nearest(key, TOP_LEVEL)}"
        elif key in models or key in WITHOUT_MODEL:
            if not isinstance(value, dict):
                yield f"{key}: must be an object, got {json.dumps(value)}"
            elif key in models:
                yield from _of_model(models[key], value, key)
            else:
                known = WITHOUT_MODEL[key].split()
                yield from (
                    f"{key}.{k}: DeepSpeed has no such key{_nearest(k, known)}" for k in value if k not in known
                )


def _models() -> dict[str, Any]:
    """Return DeepSpeed's pydantic models by the section that each is for."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    monitors = {name: field.annotation for name, field in DeepSpeedMonitorConfig.model_fields.items()}
    return {
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "zero_optimization": DeepSpeedZeroConfig,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        **{name: monitors[name] for name in ("tensorboard", "wandb", "csv_monitor", "comet")},
    }


def _of_model(model: Any, value: dict[str, Any], where: str) -> Iterator[str]:
    """Yield the unknown keys of a section, at any depth, and the values of a wrong type."""
    from pydantic import ValidationError

    names = {**model.model_fields, **{f.alias: f for f in model.model_fields.values() if f.alias}}
    unknown = [key for key in value if key not in names]
    yield from (f"{where}.{key}: DeepSpeed has no such key{_nearest(key, names)}" for key in unknown)
    nested = [key for key in value if key in names and isinstance(value[key], dict) and _model_in(names[key])]
    for key in nested:
        yield from _of_model(_model_in(names[key]), value[key], f"{where}.{key}")
    if any(key in _REPLACED for key in value):
        return  # DeepSpeed rewrites these, with a warning, while it validates
    try:
        model(**{k: v for k, v in value.items() if k not in (*unknown, *nested)})
    except ValidationError as error:
        for found in error.errors():
            at = ".".join([where, *map(str, found["loc"])])
            given = f", got {json.dumps(found['input'])}" if found["loc"] else ""
            yield f"{at}: {found['msg'].removeprefix('Value error, ')}{given}"


def _model_in(field: Any) -> Any:
    """Return the model that a field's value must fit (`Model` or `Optional[Model]`), None for plain values."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if hasattr(kind, "model_fields"):
            return kind
    return None


def _nearest(key: str, known: Any) -> str:
    """Return the nearest key in words, or nothing: a section's whole list would fill the screen."""
    found = nearest(key, known)
    return found if found.startswith("; did you mean") else ""
