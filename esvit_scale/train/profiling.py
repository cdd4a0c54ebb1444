"""`train.profile=STEPS`: a trace of some training steps by torch's profiler, in the run dir's folder profile/.

Rank 0 traces STEPS steps after the first WARM_UP of a start, in which caches fill and kernels are compiled, and writes
trace.json.gz (for Perfetto or chrome://tracing) and operators.txt (where the time went). All other steps run without a
profiler. If the trace cannot be written, a warning is logged and training goes on. docs/profiling.md shows how to read both.
"""

import gzip
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from esvit_scale import files, ranges
from esvit_scale.config import Config
from esvit_scale.data.stream import Batch
from esvit_scale.parallel.world import World

log = logging.getLogger("esvit_scale")

FOLDER, TRACE, TABLE = "profile", "trace.json.gz", "operators.txt"
WARM_UP = 5  # steps of a start that are not traced
PREPARING = 1  # the last of these steps, in which the profiler runs already, because its own first step is slow
OPERATORS = 25  # rows of the table
RANGES = (  # names of a step's parts, in the order of the table
    "wait for the batch",
    "crops to the device",
    "teacher forward",
    "Gram teacher forward",
    "student forward",
    "backward",
    "optimizer step",
    "teacher update",
    "Gram teacher refresh",
    "copy for the checkpoint",
)


def profiled(batches: Iterator[Batch], run: Path, config: Config, world: World) -> Iterator[Batch]:
    """Yield the batches; on rank 0, if `train.profile` is set, trace the training steps that use some of them."""
    steps = config.train.profile if world.rank == 0 else None
    trace = run / FOLDER / TRACE
    if steps and trace.exists():
        log.info(
            "train.profile: %s is there from an earlier start, so nothing is traced; remove it to trace again", trace
        )
        steps = None
    if not steps:
        yield from batches
        return
    tracer = _Tracer(run / FOLDER, steps, on_gpu=world.device.type == "cuda")
    try:
        while True:
            tracer.begin_step()
            with ranges.named("wait for the batch"):
                batch = next(batches, None)
            if batch is None:
                break
            yield batch
        tracer.finish()
    finally:
        tracer.abandon()


class _Tracer:
    """A profiler that runs in the steps from WARM_UP − PREPARING to WARM_UP + `steps` of a start."""

    def __init__(self, folder: Path, steps: int, on_gpu: bool) -> None:
        self._folder, self._steps, self._on_gpu = folder, steps, on_gpu
        self._begun = 0  # steps of this start
        self._profiler: profile | None = None

    def begin_step(self) -> None:
        """Start, continue or end the trace before a step."""
        first, last = WARM_UP - PREPARING, WARM_UP + self._steps
        if self._begun == first:
            _without_failing(self._start)
        elif self._begun == last:
            self.finish()
        elif self._profiler is not None:
            self._profiler.step()
        self._begun += 1

    def finish(self) -> None:
        """End the trace and write what was traced, if anything was."""
        profiler = self._profiler
        if profiler is None:
            return
        self.abandon()
        if self._begun > WARM_UP:
            _without_failing(lambda: self._write(profiler))

    def abandon(self) -> None:
        """Stop the profiler, if it runs, without writing anything."""
        if self._profiler is not None:
            ranges.trace(False)
            with suppress(RuntimeError):
                self._profiler.stop()
            self._profiler = None

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        phases = schedule(wait=0, warmup=PREPARING, active=self._steps + 1, repeat=1)  # `finish` ends the last phase
        profiler = profile(activities=activities, schedule=phases)
        profiler.start()
        self._profiler = profiler
        ranges.trace(True)

    def _write(self, profiler: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        steps = min(self._steps, self._begun - WARM_UP)
        files.write_text(self._folder / TABLE, table(profiler.key_averages(), steps, self._on_gpu))
        plain, packed = self._folder / ".trace.json", self._folder / f".{TRACE}"
        try:
            profiler.export_chrome_trace(str(plain))
            _check_whole(plain)
            with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=6) as target:
                shutil.copyfileobj(source, target)
            packed.replace(self._folder / TRACE)
        finally:
            plain.unlink(missing_ok=True)
            packed.unlink(missing_ok=True)
        log.info("train.profile: %d steps are traced in %s", steps, self._folder)


def table(events: Iterable[Any], steps: int, on_gpu: bool) -> str:
    """Return the text of operators.txt: time of the step's named parts, and the operators with the most own time.

    Args:
        events: torch's averages by name (`profile.key_averages`).
        steps: number of traced steps.
        on_gpu: whether to show the device's time too, and to sort by it.
    """
    found = {event.key: event for event in events}
    lines = [
        f"{steps} steps; milliseconds per step",
        "",
        f"{'part of a step':<42}{'host':>10}" + on_gpu * f"{'GPU':>10}",
    ]
    for name in RANGES:
        if event := found.get(name):
            times = [event.cpu_time_total, *([event.device_time_total] if on_gpu else [])]
            lines.append(f"{name:<42}" + "".join(f"{t / 1e3 / steps:>10.2f}" for t in times))
    own: Callable[[Any], float] = lambda e: e.self_device_time_total if on_gpu else e.self_cpu_time_total  # noqa: E731
    operators = [e for key, e in found.items() if key not in RANGES and not key.startswith("ProfilerStep")]
    whole = max(sum(own(e) for e in found.values()), 1e-9)
    where = "GPU" if on_gpu else "host"
    lines += ["", f"{f'operator, without those that it calls ({where})':<60}{'ms':>8}{'share':>8}{'calls':>8}"]
    for event in sorted(operators, key=own, reverse=True)[:OPERATORS]:
        name = event.key if len(event.key) < 60 else event.key[:57] + "…"
        calls = f"{event.count / steps:.0f}"
        lines.append(f"{name:<60}{own(event) / 1e3 / steps:>8.2f}{own(event) / whole:>8.1%}{calls:>8}")
    return "\n".join(lines) + "\n"


def _check_whole(trace: Path) -> None:
    """Raise OSError if the profiler, which reports no error of its own, wrote an incomplete file."""
    with trace.open("rb") as file:
        file.seek(max(0, trace.stat().st_size - 64))
        if not file.read().rstrip().endswith(b"}"):
            raise OSError("the file is incomplete; is the disk full?")


def _without_failing(work: Callable[[], None]) -> None:
    """Run `work`; log an error of the profiler or the disk instead of raising it."""
    try:
        work()
    except (OSError, RuntimeError) as error:
        ranges.trace(False)
        text = " ".join(str(error).split())
        log.warning("train.profile: no trace: %s; training goes on", text)
