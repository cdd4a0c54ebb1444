"""Access to floating-point buffers, such as a batch norm's running statistics. No ZeRO stage partitions them."""

from torch import Tensor, nn


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the floating-point buffers that `module.state_dict()` would save, by full name."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, child in module.named_modules()
        for name, buffer in child._buffers.items()
        if buffer is not None and buffer.is_floating_point() and name not in child._non_persistent_buffers_set
    }


def cast_buffers_to_fp32(module: nn.Module) -> None:
    """Cast every floating-point buffer of a module to fp32, in place; bf16 would round away small updates."""
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                child._buffers[name] = buffer.float()
