"""`esvit-scale plan`: estimates memory, time and disk of a config on a number of GPUs, and finds a setting that fits.

No weights are allocated. The state is exact; the peak is the state plus the largest phase of a step (memory.py). One step
of the smallest setting that fits is traced (step_trace.py), which gives its kernels, its traffic (traffic.py) and a second
estimate of the peak. The time follows from these and the rates of a machine (roofline.py), or, if an MFU is given, from
the FLOPs alone; the assumptions are printed beside it. Without a rate there are FLOPs and no time.
"""

from textwrap import wrap
from typing import Any, NamedTuple

from esvit_scale.config import Config
from esvit_scale.division import batch_problem
from esvit_scale.errors import UserError
from esvit_scale.objective import costs
from esvit_scale.objective.costs import Checkpointing
from esvit_scale.parallel.ds_config import offered_stages
from esvit_scale.scaling import memory, roofline, step_trace, traffic
from esvit_scale.scaling.memory import ElementCounts, Memory
from esvit_scale.scaling.roofline import Estimate, Machine
from esvit_scale.scaling.step_trace import StepTrace
from esvit_scale.scaling.traffic import Traffic

HEADROOM = 0.92  # usable fraction of a GPU's memory; the driver, allocator's gaps and kernels' scratch take the rest
IMAGENET = 1_281_167
ROWS = {  # the parts of a rank's memory, each with the sentence that explains its row of the table
    "parameters": "the student's weights, in the precision of the run",
    "masters": "fp32 weights, which the optimizer changes (zero0: the parameters are fp32 themselves)",
    "moments": "the optimizer's averages of each gradient, in fp32 (AdamW has two)",
    "ema": "the teacher's weights in fp32, an average of the student's",
    "teacher": "the teacher's weights, in the precision of the run",
    "gram": "the earlier teacher of Gram anchoring, its trunk alone",
    "frozen": "the frozen teacher of a distillation, in the precision of the run",
    "gradients": "this GPU's part, kept from the backward to the optimizer's step",
    "buckets": "buffers in which gradients are summed over GPUs",
    "gathered": "weights that zero3 puts together while a layer uses them",
    "activations": "crops, and what the forward keeps for the backward",
    "loss": "workspace of the cross-entropy over the prototypes",
}
PARTS = tuple(ROWS)
FURTHER = ("gram", "frozen")  # parts that most runs do not have
ASK_FOR_RATE = "give --tflops RATE for a time: what one of your GPUs reaches on large matrix products, for example 400"
NOTHING_TRACED = "no setting fits, so that no step was traced; --mfu F gives a time"
ASSUMED_MFU = 0.35  # where torch cannot trace a step
GIB, TERA = 2**30, 1e12
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full")
# Assumed fraction of a step that computes activations again: full, one of the student's four passes (forward, backward of
# two, and the forward again); selective, some of that, because it leaves the expensive products out.
RECOMPUTING = {"none": 0.0, "selective": 0.1, "full": 0.25}
CLOSED_FORM, TRACED = "in closed form", "traced on the meta device"


class Setting(NamedTuple):
    """One column of the table: a ZeRO stage, and what activation checkpointing keeps."""

    stage: int
    checkpointing: Checkpointing
    memory: Memory

    @property
    def name(self) -> str:
        """Return the setting's name, such as "zero3 + activation checkpointing"."""
        kinds = {
            "none": "",
            "selective": " + selective activation checkpointing",
            "full": " + activation checkpointing",
        }
        return f"zero{self.stage}{kinds[self.checkpointing]}"

    @property
    def keys(self) -> str:
        """Return the keys of the config that choose the setting."""
        implementation = "torch" if self.checkpointing == "full" else self.checkpointing
        return f"train.ds_config=zero{self.stage} train.activation_checkpointing={implementation}"


class Speed(NamedTuple):
    """The rate from which times are estimated."""

    tflops: float  # TFLOP/s of one GPU on large matrix products
    mfu: float  # fraction of `tflops` that training is assumed to reach
    source: str  # where the two come from, in words


class TracedStep(NamedTuple):
    """A traced step of one setting."""

    setting: Setting  # with the memory that the trace gives
    trace: StepTrace
    traffic: list[Traffic]
    estimate: Estimate | None  # None without a machine


class Plan(NamedTuple):
    """The plan of a config: memory of each setting, the cheapest setting that fits, and costs."""

    settings: list[Setting]  # cheapest first: least recomputation, least communication
    fits: Setting | None
    capacity: int  # bytes of one GPU
    numbers: dict[str, Any]
    step: TracedStep | None  # of `fits`; None if no step was traced


def plan(
    config: Config,
    gpus: int,
    capacity: int,
    images: int | None,
    speed: Speed | Machine | None,
    traced: bool = False,
) -> Plan:
    """Estimate the memory, time and disk that a config needs on `gpus` GPUs.

    Args:
        capacity: bytes of one GPU.
        images: number of images in the training set, for the length of an epoch; None: as in ImageNet-1K.
        speed: the rate, or for a traced step the machine, from which the time is estimated; None: no time.
        traced: whether to trace a step of the smallest setting that fits, by the trace as well. It takes seconds.

    Raises:
        UserError: the batch does not divide over the GPUs, or the trunk cannot be built.
    """
    if problem := batch_problem(config.train.global_batch, config.train.grad_accum, gpus, unit="GPUs"):
        raise UserError(problem)
    network = memory.network_of(config)
    settings = [
        Setting(stage, kept, memory.memory(config, network, stage, gpus, kept, capacity=capacity))
        for kept in CHECKPOINTING
        for stage in offered_stages(config.train.precision)
    ]
    step = None
    if traced:
        try:
            step = _trace_first_that_fits(config, network, gpus, capacity, settings, speed)
        except NotImplementedError:  # of torch 2.7, for heads with weight norm
            if isinstance(speed, Machine):
                how = f"MFU {ASSUMED_MFU:g} assumed, since this torch cannot trace a step of the config"
                speed = Speed(speed.tflops, ASSUMED_MFU, f"{speed.source}, {how}")
    fits = next((s for s in settings if s.memory.peak <= HEADROOM * capacity), None)
    return Plan(settings, fits, capacity, _numbers(config, network, gpus, images, speed, fits, step), step)


def _trace_first_that_fits(
    config: Config,
    network: ElementCounts,
    gpus: int,
    capacity: int,
    settings: list[Setting],
    speed: Speed | Machine | None,
) -> TracedStep | None:
    """Return a step of the first setting that fits by the formulas and by its trace; None if none does.

    The memory of a setting that fits by the formulas alone is replaced by what its trace gives.
    """
    for i, setting in enumerate(settings):
        if setting.memory.peak <= HEADROOM * capacity:
            step = _traced(config, network, gpus, capacity, setting, speed)
            if step.setting.memory.peak <= HEADROOM * capacity:
                return step
            settings[i] = step.setting
    return None


def _traced(
    config: Config, network: ElementCounts, gpus: int, capacity: int, setting: Setting, speed: Speed | Machine | None
) -> TracedStep:
    """Trace a step of a setting, and estimate its memory, and with a machine its time."""
    stage, kept = setting.stage, setting.checkpointing
    trace = step_trace.trace(config, gpus, kept, step_trace.kernels_on_gpu(config, capacity))
    needed = memory.memory(config, network, stage, gpus, kept, capacity=capacity, traced=trace.peaks)
    estimate = None
    if isinstance(speed, Machine):
        estimate = roofline.estimate(config, network, stage, gpus, trace, speed)
    said = traffic.of_step(config, network, stage, gpus, trace)
    return TracedStep(setting._replace(memory=needed), trace, said, estimate)


def refusal(found: Plan, config: Config, gpus: int, limit: int = 4096) -> str | None:
    """Return a message that no setting fits and what would fit instead (more GPUs, accumulation or memory); None if one
    fits.

    Args:
        limit: largest number of GPUs to suggest.
    """
    if found.fits:
        return None
    least = min(found.settings, key=lambda s: s.memory.peak)
    more = _enough_gpus(config, gpus, found.capacity, limit)
    accum = _enough_accumulation(config, gpus, found.capacity)
    ways = [f"{more} GPUs"] if more else []
    ways += [f"train.grad_accum={accum}"] if accum else []
    need = f"--gpu-memory {-(-least.memory.peak // int(HEADROOM * GIB))}G"
    return (
        f"does not fit: {least.name} needs {gib(least.memory.peak)} of {gib(HEADROOM * found.capacity)} usable on each of "
        f"{gpus} GPUs; would fit: {', '.join([*ways, need])}"
    )


def _enough_gpus(config: Config, gpus: int, capacity: int, limit: int) -> int | None:
    """Double the number of GPUs until the config fits with the same batch; return it.

    Return None if it exceeds `limit`, or the batch does not divide over it, before the config fits.
    """
    network, more = memory.network_of(config), 2 * gpus
    while more <= limit and config.train.global_batch % (more * config.train.grad_accum) == 0:
        if memory.memory(config, network, 3, more, "full").peak <= HEADROOM * capacity:
            return more
        more *= 2
    return None


def _enough_accumulation(config: Config, gpus: int, capacity: int) -> int | None:
    """Return the smallest larger train.grad_accum with which the config fits on these GPUs; None if there is none."""
    network, per_gpu = memory.network_of(config), config.train.global_batch // gpus
    for accum in (a for a in range(config.train.grad_accum + 1, per_gpu + 1) if per_gpu % a == 0):
        smaller = config.model_copy(update={"train": config.train.model_copy(update={"grad_accum": accum})})
        if memory.memory(smaller, network, 3, gpus, "full").peak <= HEADROOM * capacity:
            return accum
    return None


def _numbers(
    config: Config,
    network: ElementCounts,
    gpus: int,
    images: int | None,
    speed: Speed | Machine | None,
    fits: Setting | None,
    step: TracedStep | None,
) -> dict[str, Any]:
    """Return parameters, FLOPs, time and checkpoint size, and what the traced step does."""
    checkpointing = fits.checkpointing if fits else "none"
    trunk, heads = costs.parameters(config)
    count, batch = images or IMAGENET, config.train.global_batch
    steps = config.train.steps or config.train.epochs * max(1, count // batch)
    checkpoint = memory.checkpoint_bytes(network, anchored=config.objective.gram_weight > 0)
    per_image, useful = costs.image_flops(config), costs.image_flops(config, "useful")
    return {
        "trunk_params": trunk,
        "head_params": heads,
        "counted": TRACED if costs.traced(config) else CLOSED_FORM,
        "gflops_per_image": per_image / 1e9,
        "useful_gflops_per_image": useful / 1e9,
        "flops_per_step": per_image * batch,
        "images_per_epoch": count,
        "images_assumed": images is None,
        "steps": steps,
        "images_seen": steps * batch,
        "total_flops": per_image * steps * batch,
        "speed": _speed(speed, useful * batch / gpus, step),
        "machine": speed._asdict() if isinstance(speed, Machine) else None,
        "recomputes": checkpointing != "none",
        **_times(gpus, _images_per_s(gpus, useful, batch, speed, checkpointing, step), count, steps * batch),
        "step": step and _step(config, gpus, step),
        "checkpoint_bytes": checkpoint,
        "checkpoints_disk_bytes": checkpoint * (config.train.keep_checkpoints + 1),  # plus the one being written
    }


def _speed(speed: Speed | Machine | None, useful: float, step: TracedStep | None) -> dict[str, Any] | None:
    """Return the rate, the MFU and where they come from; None without a time.

    Args:
        useful: useful FLOPs of one GPU in a step.
    """
    if isinstance(speed, Speed):
        return speed._asdict()
    if speed is None or step is None or step.estimate is None:
        return None
    mfu = useful / (step.estimate.seconds * speed.tflops * TERA)
    return {"tflops": speed.tflops, "mfu": mfu, "source": speed.source, "assumed": speed.words}


def _images_per_s(
    gpus: int,
    useful: float,
    batch: int,
    speed: Speed | Machine | None,
    checkpointing: Checkpointing,
    step: TracedStep | None,
) -> float | None:
    """Return the images per second of all GPUs; None without a speed.

    From an MFU, time is useful FLOPs (as MFU counts them) over the rate, of which activation checkpointing takes its
    fraction.
    """
    if isinstance(speed, Speed):
        return gpus * speed.tflops * TERA * speed.mfu / useful * (1 - RECOMPUTING[checkpointing])
    return batch / step.estimate.seconds if step is not None and step.estimate is not None else None


def _times(gpus: int, rate: float | None, images: int, seen: int) -> dict[str, float | None]:
    """Return images per second and hours, each None without a rate."""
    if rate is None:
        return dict.fromkeys(("images_per_s", "hours_per_epoch", "hours", "gpu_hours"))
    return {
        "images_per_s": rate,
        "hours_per_epoch": images / rate / 3600,
        "hours": seen / rate / 3600,
        "gpu_hours": gpus * seen / rate / 3600,
    }


def _step(config: Config, gpus: int, step: TracedStep) -> dict[str, Any]:
    """Return what one GPU does in a traced step, as plain values."""
    batches = config.train.grad_accum
    kernels = step.trace.kernels
    return {
        "peak_bytes": step.setting.memory.peak,
        "kernels": batches * sum(kernels.values()),
        "flops": batches * sum(kernel.flops * count for kernel, count in kernels.items()),
        "bytes": batches * sum(kernel.bytes * count for kernel, count in kernels.items()),
        "sent_bytes": sum(said.wire(gpus) for said in step.traffic),
        "traffic": [said._asdict() | {"sent_bytes": said.wire(gpus)} for said in step.traffic],
        "seconds": step.estimate and step.estimate.seconds,
        "hidden_s": step.estimate and step.estimate.hidden,
        "terms": step.estimate and [term._asdict() for term in step.estimate.terms],
    }


def as_json(found: Plan, gpus: int) -> dict[str, Any]:
    """Return the plan as plain values, for `plan --json`."""
    rows = [
        {
            "zero_stage": s.stage,
            "activation_checkpointing": s.checkpointing != "none",
            "checkpointing": s.checkpointing,
            "keys": s.keys,
            "fits": s.memory.peak <= HEADROOM * found.capacity,
            "bytes": {part: getattr(s.memory, part) for part in PARTS}
            | {"state": s.memory.state, "peak": s.memory.peak},
        }
        for s in found.settings
    ]
    smallest = found.fits and {
        "zero_stage": found.fits.stage,
        "activation_checkpointing": found.fits.checkpointing != "none",
        "checkpointing": found.fits.checkpointing,
        "keys": found.fits.keys,
    }
    return {"gpus": gpus, "gpu_memory_bytes": found.capacity, "settings": rows, "smallest": smallest} | found.numbers


def table(found: Plan, config: Config, gpus: int) -> str:
    """Return the table that `plan` prints: GiB per GPU of each part of memory, with the costs below it."""
    suffixes = {"none": "", "selective": "+sel", "full": "+ckpt"}
    names = [f"zero{s.stage}{suffixes[s.checkpointing]}" for s in found.settings]
    lines = [f"GiB on each of {gpus} GPUs" + "".join(f"{name:>11s}" for name in names)]
    width = len(lines[0]) - 11 * len(names)
    for part in _shown(found):
        values = [getattr(s.memory, part) for s in found.settings]
        lines.append(f"{part:{width}s}" + "".join(f"{v / GIB:11.2f}" for v in values))
    lines.append(f"{'peak':{width}s}" + "".join(f"{s.memory.peak / GIB:11.2f}" for s in found.settings))
    usable = HEADROOM * found.capacity
    lines.append(
        f"{f'fits in {usable / GIB:.1f}':{width}s}"
        + "".join(f"{'yes' if s.memory.peak <= usable else 'no':>11s}" for s in found.settings)
    )
    lines += ["", *_explained(found), ""]
    if found.fits:
        lines.append(f"smallest that fits  {found.fits.name}: {found.fits.keys}")
    return "\n".join([*lines, *_costs(found, config)])


def _shown(found: Plan) -> list[str]:
    """Return the parts of memory that have a row: all, but those of further teachers only where there are any."""
    return [part for part in PARTS if part not in FURTHER or any(getattr(s.memory, part) for s in found.settings)]


def _explained(found: Plan) -> list[str]:
    """Return the lines that explain the table's rows and columns."""
    shown = _shown(found)
    lasting = ("five", "six", "seven")[sum(part in shown for part in FURTHER)]
    notes = {part: ROWS[part] for part in shown} | {
        "peak": f"the first {lasting} rows, which stay, and what the largest of forward, backward and the optimizer's step "
        "needs; the other rows are not all there at once, so the sum of the rows is not the peak",
        "fits in": f"{HEADROOM:.0%} of {gib(found.capacity)}: {1 - HEADROOM:.0%} are left for the driver, gaps between the "
        "allocator's blocks and scratch space of kernels",
        "+sel, +ckpt": "train.activation_checkpointing=selective and =torch: fewer activations, more computing",
    }
    lines = ["What the rows are:"]
    for name, note in notes.items():
        lines += wrap(note, 118, initial_indent=f"  {name:14s}", subsequent_indent=16 * " ")
    return lines


def _costs(found: Plan, config: Config) -> list[str]:
    """Return the lines below the table: parameters, FLOPs, time and size of a checkpoint."""
    n = found.numbers
    assumed = " (ImageNet-1K's; the shards are not given)" if n["images_assumed"] else ""
    lines = [
        f"parameters          {n['trunk_params']:,} trunk + {n['head_params']:,} heads",
        f"FLOPs               {n['gflops_per_image']:,.1f} G an image, {n['flops_per_step']:.3g} a step of "
        f"{config.train.global_batch:,} images, {n['total_flops']:.3g} in all {n['steps']:,} steps",
        f"                    FLOPs and activations {n['counted']}",
    ]
    lines += _step_lines(n["step"]) if n["step"] else []
    if n["images_per_s"]:
        lines += [
            f"time (estimate)     {_hours(n['hours_per_epoch'])} an epoch of {n['images_per_epoch']:,} images{assumed}, "
            f"{_hours(n['hours'])} in all, {n['gpu_hours']:,.1f} GPU hours",
            f"                    at {n['images_per_s']:,.0f} images/s: {n['speed']['source']}"
            + (
                f"; assumes that {RECOMPUTING[found.fits.checkpointing]:.0%} of it recomputes"
                if found.fits and n["recomputes"] and "assumed" not in n["speed"]
                else ""
            ),
        ]
        if "assumed" in n["speed"]:
            lines += wrap(f"MFU {n['speed']['mfu']:.2f} follows; assumed: {n['speed']['assumed']}", **_INDENTED)
    else:
        lines += [
            f"epoch               {n['images_per_epoch']:,} images{assumed}",
            f"time                {NOTHING_TRACED if n['machine'] else ASK_FOR_RATE}",
        ]
    lines.append(
        f"checkpoint          {gib(n['checkpoint_bytes'])} each, {gib(n['checkpoints_disk_bytes'])} on disk at "
        f"train.keep_checkpoints={config.train.keep_checkpoints}"
    )
    return lines


_INDENTED: dict[str, Any] = {"width": 118, "initial_indent": 20 * " ", "subsequent_indent": 20 * " "}


def _step_lines(step: dict[str, Any]) -> list[str]:
    """Return the lines about the traced step of one GPU: peak, kernels, traffic and, if it has a time, its largest terms."""
    lines = [
        f"traced step         on each GPU: peak {gib(step['peak_bytes'])}; {step['kernels']:,} kernels of the networks, "
        f"{step['flops'] / TERA:,.1f} TFLOP, {gib(step['bytes'])} read and written",
        f"traffic             each GPU sends {gib(step['sent_bytes'])} a step:",
    ]
    for said in sorted(step["traffic"], key=lambda one: -one["sent_bytes"]):
        what = f"{said['purpose']}: {said['kind'].replace('_', '-')} of {_size(said['bytes'])}"
        lines.append(f"                    {what}, {said['calls']} calls, {said['source']}")
    if step["seconds"]:
        largest = [f"{t['seconds'] / step['seconds']:.0%} is {t['name']} ({t['limit']})" for t in step["terms"][:3]]
        beside = f"; {step['hidden_s']:.3g} s of traffic run beside it" if step["hidden_s"] else ""
        lines += wrap(
            f"{step['seconds']:.3g} s, of which {', '.join(largest)}{beside}",
            **_INDENTED | {"initial_indent": "step (estimate)     "},
        )
    return lines


def _size(count: float) -> str:
    """Format a number of bytes in the unit that suits it."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} bytes"


def gib(count: float) -> str:
    """Format a number of bytes in GiB."""
    return f"{count / GIB:.2f} GiB"


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.1f} min"
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} days"
