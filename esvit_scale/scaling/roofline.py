"""The time of a training step on an assumed machine, from its traced kernels and its traffic.

A kernel takes the longest of three times: its FLOPs at the rate of large matrix products, the bytes that it reads and
writes at the rate of memory, and what the host needs to launch it. A collective takes the longer of its way within a
node and its way between nodes, and a latency for each doubling of the ranks:

    within a node   bytes · (g − 1)/g / rate of a GPU's links to the others of its node         (g GPUs in a node)
    between nodes   bytes · (n − 1)/n / (g · rate of a GPU's link to another node)              (n nodes)

An all-reduce takes twice that. At ZeRO 3 collectives of forward and backward run beside the kernels, so the longer of
both counts; at stages 0 to 2 DeepSpeed waits for them. What is not counted: loading and augmenting images, products that
are too small to reach the rate, torch.compile, metrics, checkpoints, and ranks that wait for the slowest.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from esvit_scale.config import Config
from esvit_scale.scaling import traffic
from esvit_scale.scaling.memory import ElementCounts
from esvit_scale.scaling.step_trace import BACKWARD, RECOMPUTE, Kernel, StepTrace
from esvit_scale.scaling.traffic import Traffic

TERA, GIGA = 1e12, 1e9


class Machine(NamedTuple):
    """The rates of a machine. The defaults are an H100 SXM's data sheet, and 400 Gb/s for each GPU."""

    tflops: float  # TFLOP/s of one GPU on large matrix products
    source: str  # where this rate comes from, in words
    bandwidth: float = 3350.0  # GB/s at which one GPU reads and writes its memory
    reached: float = 0.8  # fraction of `bandwidth` that elementwise kernels of the networks reach
    streamed: float = (
        0.8  # fraction of it that kernels over all parameters reach: optimizer, buckets, teacher's average
    )
    launch: float = 5e-6  # seconds in which the host launches one kernel
    gpus_per_node: int = 8
    node_link: float = 450.0  # GB/s that a GPU sends to the others of its node (NVLink, one direction)
    network: float = 400.0  # Gb/s that a GPU sends to one of another node
    latency: float = 10e-6  # seconds of a collective for each doubling of its ranks

    def kernel_seconds(self, kernel: Kernel) -> float:
        """Return the time of one launch of a kernel."""
        return max(self._seconds_by_limit(kernel).values())

    def limit(self, kernel: Kernel) -> str:
        """Return what limits a kernel: FLOPs, memory or launches."""
        times = self._seconds_by_limit(kernel)
        return max(times, key=lambda name: times[name])

    def _seconds_by_limit(self, kernel: Kernel) -> dict[str, float]:
        reached = self.reached if kernel.kind else self.streamed
        memory = kernel.bytes / (self.bandwidth * reached * GIGA)
        return {"FLOPs": kernel.flops / (self.tflops * TERA), "memory": memory, "launches": self.launch}

    @property
    def words(self) -> str:
        """Return the assumptions as a clause."""
        return (
            f"memory {self.bandwidth:,.0f} GB/s ({self.reached:.0%} reached), {self.gpus_per_node} GPUs a node with "
            f"{self.node_link:,.0f} GB/s each, {self.network:,.0f} Gb/s each between nodes, {1e6 * self.launch:.0f} µs a "
            f"kernel and {1e6 * self.latency:.0f} µs a collective and doubling of its ranks at the least"
        )

    def collective_seconds(self, said: Traffic, ranks: int) -> float:
        """Return the time of all calls of a collective."""
        if ranks == 1:
            return 0.0
        within = min(ranks, self.gpus_per_node)
        nodes = -(-ranks // self.gpus_per_node)
        volume = said.bytes * (2 if said.kind == "all_reduce" else 1)
        inside = volume * (within - 1) / within / (self.node_link * GIGA)
        between = volume * (nodes - 1) / nodes / (within * self.network / 8 * GIGA)
        return max(inside, between) + said.calls * self.latency * math.log2(ranks)


class Term(NamedTuple):
    """A part of a step, and what limits it."""

    name: str
    seconds: float
    limit: str  # FLOPs, memory, launches or links


class Estimate(NamedTuple):
    """The time of a step in parts, which add up to it."""

    terms: list[Term]  # longest first
    seconds: float
    kernels: int  # launches in a step
    flops: float  # of one rank
    bytes: float  # that one rank's kernels read and write
    traffic: list[Traffic]
    hidden: float  # seconds of communication that run beside kernels


def estimate(
    config: Config, network: ElementCounts, stage: int, ranks: int, step: StepTrace, machine: Machine
) -> Estimate:
    """Return the time of a step of the config at a ZeRO stage on so many ranks."""
    batches = config.train.grad_accum
    said = traffic.of_step(config, network, stage, ranks, step)
    seconds: dict[tuple[str, str], float] = {}
    limits: dict[tuple[str, str], dict[str, float]] = {}
    kernels = [(kernel, batches * count) for kernel, count in step.kernels.items()]
    kernels += [(kernel, 1) for kernel in _around(config, network, stage, ranks, said)]
    for kernel, count in kernels:
        key = (kernel.phase, kernel.kind)
        taken = count * machine.kernel_seconds(kernel)
        seconds[key] = seconds.get(key, 0.0) + taken
        of_limit = limits.setdefault(key, {})
        of_limit[machine.limit(kernel)] = of_limit.get(machine.limit(kernel), 0.0) + taken
    terms = [
        Term(
            f"{phase}: {kind}" if kind else phase, taken, max(limits[phase, kind], key=lambda x: limits[phase, kind][x])
        )
        for (phase, kind), taken in seconds.items()
    ]
    exposed, hidden = _exposed(said, stage, ranks, machine, kernels)
    terms += exposed
    terms.sort(key=lambda term: -term.seconds)
    return Estimate(
        terms,
        sum(term.seconds for term in terms),
        sum(count for _, count in kernels),
        float(sum(kernel.flops * count for kernel, count in kernels)),
        float(sum(kernel.bytes * count for kernel, count in kernels)),
        said,
        hidden,
    )


def _exposed(
    said: list[Traffic], stage: int, ranks: int, machine: Machine, kernels: Iterable[tuple[Kernel, int]]
) -> tuple[list[Term], float]:
    """Return the terms of communication that kernels wait for, and the seconds that run beside them."""
    times = [(one, machine.collective_seconds(one, ranks)) for one in said]
    names = {"all_reduce": "all-reduce", "all_gather": "all-gather", "reduce_scatter": "reduce-scatter"}
    name = lambda one: f"{one.purpose}: {names.get(one.kind, one.kind)}"  # noqa: E731
    if stage < 3:
        return [Term(name(one), taken, "links") for one, taken in times if taken], 0.0
    terms, hidden = [], 0.0
    compute = {True: 0.0, False: 0.0}
    for kernel, count in kernels:
        if kernel.kind:
            compute[kernel.phase in (BACKWARD, RECOMPUTE)] += count * machine.kernel_seconds(kernel)
    for backward in (False, True):
        beside = [(one, t) for one, t in times if one.backward == backward and one.kind != "all_reduce"]
        total = sum(t for _, t in beside)
        shown = max(0.0, total - compute[backward])
        hidden += total - shown
        terms += [Term(name(one), t * shown / total, "links") for one, t in beside if total and shown]
    terms += [Term(name(one), t, "links") for one, t in times if one.kind == "all_reduce" and t]
    return terms, hidden


def _around(config: Config, network: ElementCounts, stage: int, ranks: int, said: list[Traffic]) -> list[Kernel]:
    """Return the kernels around the networks, which are modelled: gathering, buckets, norms, optimizer, teacher.

    Each is one kernel for a tensor that it goes over: a parameter before ZeRO's partition, an interval after it.
    """
    element = 2 if config.train.precision in ("bf16", "fp16") else 4
    every = [size for sizes in network.groups.values() for size in sizes]
    owned = [-(-size // ranks) for size in every] if stage == 3 else every[: -(-len(every) // ranks)]
    total, part = sum(every), sum(every) if stage == 0 else -(-sum(every) // ranks)
    if stage == 0:
        owned = every
    batches = config.train.grad_accum
    found: list[Kernel] = []

    def over(phase: str, tensors: int, count: float) -> None:
        found.extend([Kernel(phase, "", 0, int(count / max(1, tensors)))] * max(1, tensors))

    for one in said if stage == 3 and ranks > 1 else ():
        if one.kind == "all_gather" and one.source == traffic.MODELLED:  # from parts, which are joined from parameters
            over("gathered parameters", one.calls, 2 * one.bytes + 2 * one.bytes / ranks)
    # Into the bucket and divided by the number of ranks; what is this rank's out of it, in fp32.
    for _ in range(1 if stage == 0 else batches):
        over("gradient buckets", len(every), 2 * element * total)
        over("gradient buckets", 1, 2 * element * total)
    over("gradient buckets", len(owned), (element + 4) * part if stage else 2 * 4 * part)
    over("norms and clipping", 2, 2 * 4 * part)
    if config.optim.clip is not None:
        over("norms and clipping", len(owned), 2 * 4 * part)
    for name, sizes in network.groups.items():
        elements = sum(sizes) if stage == 0 else -(-sum(sizes) // ranks)
        over("optimizer", 1, 4 * (3 + 2 * network.moments[name]) * elements)
    over("teacher's average", len(owned), 3 * 4 * part)
    if stage:
        over("working weights", len(owned), 2 * (4 + element) * part)
    return found
