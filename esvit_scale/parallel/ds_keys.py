"""The keys that a DeepSpeed config may have. DeepSpeed itself ignores a misspelt top-level key and uses the default.

DeepSpeed's own pydantic models check names and types in the sections that have one. The other keys are listed here,
from DeepSpeed 0.19.8; tests/parallel/test_ds_config.py compares the list with the keys that the installed DeepSpeed
reads.
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
REMOVED = frozenset(_REMOVED.split())  # DeepSpeed refuses these
WITHOUT_MODEL = {  # sections that DeepSpeed reads key by key
    "aio": "block_size intra_op_parallelism overlap_events queue_depth single_submit use_gds",
    "checkpoint": "checkpoint_serialization load_universal parallel_write tag_validation use_node_local_storage writer",
    "data_types": "buffer_dtype grad_accum_dtype keep_in_fp32_modules param_dtype",
    "flops_profiler": "detailed enabled module_depth output_file profile_step recompute_fwd_factor top_modules",
    "timers": "throughput",
    "torch_autocast": "dtype enabled lower_precision_safe_modules",
}
_REPLACED = (
    "cpu_offload",
    "cpu_offload_param",
    "cpu_offload_use_pin_memory",
)  # deprecated keys of zero_optimization


def read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: the file is not JSON, holds no object, or has an object with the same key twice.
    """
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice.extend(name for name in dict.fromkeys(names) if names.count(name) > 1)
        return dict(pairs)

    try:
        values = json.loads(path.read_text(), object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if twice:
        raise UserError(f"{path}: {', '.join(map(repr, twice))} appears twice in one object; keep one")
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a JSON object ({{…}})")
    return values


def problems(values: dict[str, Any]) -> list[str]:
    """Return a message for each unknown key (with the nearest known one) and for each value of a wrong type."""
    return list(_problems(values))


def _problems(values: dict[str, Any]) -> Iterator[str]:
    models = _models()
    for key, value in values.items():
        if key in REMOVED and key != "amp":  # ds_config.py names amp's replacement
            yield f"{key}: this DeepSpeed has removed it; remove it from this file"
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
    """Return DeepSpeed's pydantic models, by section."""
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
    """Check the section `where` by its pydantic model: yield a message for each unknown key, at any depth, and for each
    value of a wrong type."""
    from pydantic import ValidationError

    names = {**model.model_fields, **{f.alias: f for f in model.model_fields.values() if f.alias}}
    unknown = [key for key in value if key not in names]
    yield from (f"{where}.{key}: DeepSpeed has no such key{_nearest(key, names)}" for key in unknown)
    nested = [key for key in value if key in names and isinstance(value[key], dict) and _model_in(names[key])]
    for key in nested:
        yield from _of_model(_model_in(names[key]), value[key], f"{where}.{key}")
    if any(key in _REPLACED for key in value):
        return  # while it validates, DeepSpeed replaces these by the newer keys and warns
    try:
        model(**{k: v for k, v in value.items() if k not in (*unknown, *nested)})
    except ValidationError as error:
        for found in error.errors():
            at = ".".join([where, *map(str, found["loc"])])
            given = f", got {json.dumps(found['input'])}" if found["loc"] else ""
            yield f"{at}: {found['msg'].removeprefix('Value error, ')}{given}"


def _model_in(field: Any) -> Any:
    """Return the pydantic model of a field declared as `Model` or `Optional[Model]`; None for a plain field."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if hasattr(kind, "model_fields"):
            return kind
    return None


def _nearest(key: str, known: Any) -> str:
    """Return "; did you mean …" if a known key is similar, else "", where `errors.nearest` would list all keys."""
    found = nearest(key, known)
    return found if found.startswith("; did you mean") else ""
