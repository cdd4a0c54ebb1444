"""The `plan` command: estimates a config's memory at each ZeRO stage, its FLOPs, traffic, time and disk space."""

import argparse
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from esvit_scale.commands import option_types
from esvit_scale.commands.parser import add_overrides, command, positive
from esvit_scale.errors import UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esvit_scale.scaling.plan import Plan

UNITS = {"": 2**30, "G": 2**30, "GB": 2**30, "GIB": 2**30, "M": 2**20, "MB": 2**20, "MIB": 2**20}
RATES = ("bandwidth", "gpus_per_node", "node_link", "network")  # options that are fields of roofline.Machine


def add(commands: Any) -> None:
    """Declare `plan`."""
    plan = command(commands, "plan", _plan, "what a config needs: memory at each ZeRO stage, FLOPs, time and disk")
    plan.add_argument("config", metavar="CONFIG", help="name of a preset, or a YAML file")
    add_overrides(plan, "config values to change, for example train.global_batch=1024")
    plan.add_argument("--gpus", type=positive, required=True, metavar="N", help="number of GPUs, over all nodes")
    plan.add_argument("--gpu-memory", type=memory_bytes, required=True, metavar="80G", help="memory of one GPU")
    plan.add_argument(
        "--images",
        type=positive,
        metavar="N",
        help="images in the training set (default: those of data.train, or ImageNet-1K's)",
    )
    plan.add_argument(
        "--tflops",
        type=option_types.rate,
        metavar="T",
        help="TFLOP/s of one GPU on large matrix products (default: measured on this machine's GPU; without a "
        "GPU there are FLOPs and no time)",
    )
    plan.add_argument(
        "--mfu",
        type=option_types.fraction,
        metavar="F",
        help="fraction of --tflops that training reaches (default: the time follows from a traced step and the rates below)",
    )
    plan.add_argument(
        "--bandwidth",
        type=option_types.rate,
        metavar="GB/S",
        help="GB/s at which one GPU reads and writes its memory (default: 3350, an H100 SXM's)",
    )
    plan.add_argument("--gpus-per-node", type=positive, metavar="N", help="GPUs in a node (default: 8)")
    plan.add_argument(
        "--node-link",
        type=option_types.rate,
        metavar="GB/S",
        help="GB/s that a GPU sends to the others of its node (default: 450, an H100's NVLink)",
    )
    plan.add_argument(
        "--network",
        type=option_types.rate,
        metavar="GBIT/S",
        help="Gb/s that a GPU sends to one of another node (default: 400)",
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _plan(options: argparse.Namespace) -> int:
    import json

    from esvit_scale import config as configs
    from esvit_scale.checkpoint import frozen_teacher
    from esvit_scale.scaling import plan as plans
    from esvit_scale.train import header

    o = options
    whole = frozen_teacher.described_in(configs.resolve(o.config, o.overrides))
    rates = {name: getattr(o, name) for name in RATES if getattr(o, name) is not None}
    speed = speed_of(whole, o.tflops, o.mfu) if o.mfu is not None else machine_of(whole, o.tflops, rates)
    stages = whole.of_stages
    found = [plans.plan(one, o.gpus, o.gpu_memory, o.images or images_of(one), speed, traced=True) for one in stages]
    if o.json:
        print(json.dumps(as_json(found, o.gpus), indent=2))
    else:
        for number, (one, config) in enumerate(zip(found, stages, strict=True)):
            heading = f"{header.stage_line(config, number, o.images or images_of(config))}\n" if whole.stages else ""
            print(f"{heading}{plans.table(one, config, o.gpus)}" + ("\n" if whole.stages else ""))
        if whole.stages:
            print(_sum(as_json(found, o.gpus)))
    refusals = [plans.refusal(one, config, o.gpus) for one, config in zip(found, stages, strict=True)]
    if problems := [
        f"stages.{n}: {problem}" if whole.stages else problem for n, problem in enumerate(refusals) if problem
    ]:
        raise UserError("\n".join(problems))
    return 0


def as_json(found: "Sequence[Plan]", gpus: int) -> dict[str, Any]:
    """Return the plan of a run as plain values; of a run in training stages, their plans and the sums over them."""
    from esvit_scale.scaling import plan as plans

    values = [plans.as_json(one, gpus) for one in found]
    if len(values) == 1:
        return values[0]
    sums = {key: sum(one[key] for one in values) for key in ("steps", "images_seen", "total_flops")}
    has_times = values[0]["hours"] is not None
    sums |= {key: sum(one[key] for one in values) if has_times else None for key in ("hours", "gpu_hours")}
    return {"stages": values, **sums}


def _sum(values: dict[str, Any]) -> str:
    time = "" if values["hours"] is None else f", {values['hours']:,.1f} h, {values['gpu_hours']:,.1f} GPU hours"
    return f"all stages          {values['steps']:,} steps, {values['total_flops']:.3g} FLOPs{time}"


def images_of(config: Any) -> int | None:
    """Return the number of images in an epoch of a config's training set; None if it names none."""
    from esvit_scale.data import mix

    return mix.epoch_samples(config.data) if config.data.train or config.data.mix else None


def speed_of(config: Any, tflops: float | None, mfu: float) -> Any:
    """Return the Speed from which times are estimated by an MFU; None without `tflops` on a machine without a GPU.

    Raises:
        UserError: the MFU or the rate is no such number.
    """
    from esvit_scale.scaling.plan import Speed

    if not 0 < mfu <= 1:
        raise UserError(f"plan: mfu={mfu}: must be above 0 and at most 1")
    rate = _rate(config, tflops)
    return rate and Speed(rate[0], mfu, f"{rate[1]}, MFU {mfu:g} assumed")


def machine_of(config: Any, tflops: float | None, rates: Mapping[str, Any]) -> Any:
    """Return the Machine from which times are estimated by a traced step; None without `tflops` on a machine without a
    GPU.

    Args:
        rates: the fields in RATES that are not the defaults.

    Raises:
        UserError: a rate has another name, or is no positive number.
    """
    from esvit_scale.scaling.roofline import Machine

    for name, value in rates.items():
        if name not in RATES:
            raise UserError(f"plan: no rate is named {name!r}{nearest(name, RATES)}")
        if not 0 < value < math.inf:
            raise UserError(f"plan: {name}={value}: must be a number above 0")
    rate = _rate(config, tflops)
    return rate and Machine(*rate, **rates)


def _rate(config: Any, tflops: float | None) -> tuple[float, str] | None:
    """Return TFLOP/s of one GPU and where they come from; None without `tflops` on a machine without a GPU.

    Without `tflops` it is the rate of this machine's GPU. The rate of a CPU would say nothing about the GPUs to plan for.

    Raises:
        UserError: `tflops` is no positive number.
    """
    if tflops is not None:
        if not 0 < tflops < math.inf:
            raise UserError(f"plan: tflops={tflops}: must be a number above 0")
        return tflops, f"{tflops:g} TFLOP/s for each GPU as given"
    import torch

    if not torch.cuda.is_available():
        return None
    from esvit_scale.train.mfu import matmul_rate

    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    rate = matmul_rate(torch.device("cuda"), dtype) / 1e12
    return rate, f"{rate:.3g} TFLOP/s for each GPU as measured on {torch.cuda.get_device_name()}"


def memory_bytes(text: str) -> int:
    """Convert an option's value such as 80G to bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]*)", text)
    if not found or found[2].upper() not in UNITS or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a size like 80G, got {text!r}")
    return int(float(found[1]) * UNITS[found[2].upper()])
